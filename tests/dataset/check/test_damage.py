"""Damaged and hostile folders: a clear DatasetError, never wrong rows, nothing read outside the folder."""

import json
import os
import random

import pytest
import torch
from dataset_cases import PLAN, check_rows, flip, make_dataset, make_writer, truth, write_units

from tlfast.dataset import DatasetError, open_dataset, verify_dataset
from tlfast.dataset.check import verify


@pytest.fixture
def out(tmp_path):
    """The folder of a complete dataset."""
    make_dataset(tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize("name", ["data/u000001.safetensors", "rows/u000000.parquet", "data/u000002.safetensors"])
@pytest.mark.parametrize("block_bytes", [verify._BLOCK_BYTES, 4096], ids=["one block", "several"])
def test_every_flipped_bit_is_found(out, monkeypatch, name, block_bytes):
    monkeypatch.setattr(verify, "_BLOCK_BYTES", block_bytes)
    size = (out / name).stat().st_size
    choose = random.Random(name)
    for position in [0, 8, 4095, 4096, size - 1, *(choose.randrange(size) for _ in range(20))]:
        if position >= size:
            continue
        bit = choose.randrange(8)
        flip(out / name, position, bit)
        report = verify_dataset(out)
        assert [problem.unit for problem in report.problems] == [name[5:12]], (name, position, bit)
        assert "CRC32C" in str(report)
        assert report.n_units == 2
        flip(out / name, position, bit)
    assert verify_dataset(out).ok


def test_flips_in_commits_and_dataset_json_are_found_or_change_nothing(out):
    for name in ("commits/u000001.json", "dataset.json"):
        before = json.loads((out / name).read_text())
        for position in range(0, (out / name).stat().st_size, 3):
            flip(out / name, position, position % 8)
            report = verify_dataset(out)
            if report.ok:
                assert json.loads((out / name).read_text()) == before, (name, position)
            flip(out / name, position, position % 8)
    assert verify_dataset(out).ok


def test_a_flip_in_the_header_is_no_wrong_row(out):
    header = (out / "data" / "u000000.safetensors").read_bytes()[:4096]
    for position in range(0, len(header.rstrip()), 7):
        flip(out / "data" / "u000000.safetensors", position, 1)
        with pytest.raises(DatasetError, match="must begin with the header of its plan"):
            open_dataset(out)["loss"][0]
        flip(out / "data" / "u000000.safetensors", position, 1)


@pytest.mark.parametrize("keep", [0, 7, 8, 4095, 4096, 4100, -1])
def test_truncated_unit(out, keep):
    path = out / "data" / "u000001.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    with pytest.raises(DatasetError, match=r"u000001.safetensors must have \d+ bytes"):
        open_dataset(out)
    with pytest.raises(DatasetError, match=r"u000001.safetensors must have \d+ bytes"):
        make_writer(out)
    assert [problem.unit for problem in verify_dataset(out).problems] == ["u000001"]


def test_truncated_between_opening_and_reading(out):
    ds = open_dataset(out)
    os.truncate(out / "data" / "u000001.safetensors", 5000)
    with pytest.raises(DatasetError, match="must have"):
        ds["loss"][5]
    assert torch.equal(ds["loss"][0], truth()["loss"][0])


def test_missing_unit(out):
    (out / "commits" / "u000001.json").unlink()
    with pytest.raises(DatasetError, match=r"without 1 \(u000001, ...\)\. Run the collection again"):
        open_dataset(out)
    assert "1 of 3 units are not there (u000001" in str(verify_dataset(out))
    ds = open_dataset(out, partial=True)
    check_rows(ds, truth())
    assert len(ds) == 7
    assert "2 of 3 units" in repr(ds)
    assert ds.examples[4]["id"] == 8
    report = ds.verify()
    assert report.ok
    assert report.unnamed == ["data/u000001.safetensors", "rows/u000001.parquet"]
    write_units(make_writer(out))
    check_rows(open_dataset(out), truth())


def test_no_unit_at_all(tmp_path):
    make_writer(tmp_path / "d")
    ds = open_dataset(tmp_path / "d", partial=True)
    check_rows(ds, truth())
    assert ds["loss"][:].shape == (0,)
    assert ds["blocks.1.attn"][[]].shape == (0, 2, 3)
    assert ds.norms("loss").shape == (0,)
    with pytest.raises(IndexError):
        ds["loss"][0]
    with pytest.raises(DatasetError, match=r"hold all 3 units of its plan, got .* without 3"):
        open_dataset(tmp_path / "d")


@pytest.mark.parametrize("name", ["data/u000000.safetensors", "rows/u000000.parquet"])
def test_missing_file(out, name):
    (out / name).unlink()
    with pytest.raises(DatasetError, match="must exist, its commit names it"):
        open_dataset(out)


@pytest.mark.parametrize("name", ["data", "rows", "commits", "dataset.json"])
def test_missing_part(out, name):
    (out / name).rename(out.parent / "away")
    with pytest.raises(DatasetError, match=name):
        open_dataset(out)
    assert not verify_dataset(out).ok


@pytest.mark.parametrize(
    "name", ["data", "rows", "commits", "dataset.json", "data/u000000.safetensors", "rows/u000001.parquet",
             "commits/u000002.json"]
)  # fmt: skip
def test_links_are_refused(out, name):
    (out / name).rename(out.parent / "elsewhere")
    (out / name).symlink_to(out.parent / "elsewhere")
    with pytest.raises(DatasetError):
        open_dataset(out)
    assert not verify_dataset(out).ok


def test_a_fifo_does_not_block(out):
    for name in ("commits/u000000.json", "data/u000001.safetensors"):
        (out / name).unlink()
        os.mkfifo(out / name)
    with pytest.raises(DatasetError, match="must be a regular file"):
        open_dataset(out)
    assert len(verify_dataset(out).problems) == 2


def test_report_counts(out):
    seen = []
    report = verify_dataset(out, progress=seen.append)
    sizes = [path.stat().st_size for part in ("data", "rows") for path in (out / part).iterdir()]
    assert (report.n_units, report.n_rows, report.n_bytes) == (PLAN.n_units, PLAN.n_examples, sum(sizes))
    assert sum(seen) == report.n_bytes
    assert str(report) == f"ok: 11 rows in 3 units, {report.n_bytes / 1e6:.1f} MB read"
