"""The tiny dataset of each version of the format opens for ever, with its values, and is written the same today."""

import hashlib
import shutil

import make_golden
import pytest
import torch
from backends import usable
from checkout import TESTS
from dataset_cases import same_bits
from safetensors.torch import load_file

from tlfast.dataset import open_dataset, verify_dataset

GOLDEN = TESTS / "dataset" / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("v*"))
N = make_golden.PLAN.n_examples + make_golden.MORE


def test_every_version_until_now_is_kept():
    assert VERSIONS == ["v1"]


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_opens_with_its_values(version, access):
    ds = open_dataset(GOLDEN / version, access=access)
    assert ds.points == list(make_golden.COLUMNS)
    assert [len(unit) for unit in ds.units] == [3, 2, 2]
    for name, expected in make_golden.rows(0, N).items():
        assert same_bits(ds[name][:], expected)
    for i, row in enumerate(ds.examples):
        assert {key: row[key] for key in ("id", "input_ids", "source", "start", "length")} == vars(
            make_golden.example(i)
        )
    assert [row["flags"] for row in ds.examples] == [0, 1, 0, 0, 3, 0, 0]
    norm = torch.linalg.vector_norm(make_golden.rows(0, 1)["double é"].double())
    assert ds.examples[0]["norms"]["double é"] == norm.float()
    assert ds.skipped == [tuple(skipped) for skipped in make_golden.SKIPPED]
    assert ds.header["model"] == {"name": "golden"}


@pytest.mark.parametrize("version", VERSIONS)
def test_it_verifies_and_one_changed_byte_is_found(version, tmp_path):
    copy = shutil.copytree(GOLDEN / version, tmp_path / version)
    assert verify_dataset(copy).ok
    file = copy / "data" / "u000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [problem.unit for problem in verify_dataset(copy).problems] == ["u000001"]


@pytest.mark.parametrize("backend", ["native", "python"])
def test_the_version_of_today_is_written_to_the_byte(backend, tmp_path, monkeypatch):
    usable(backend)
    monkeypatch.setattr(make_golden, "BACKEND", backend)
    make_golden.write(tmp_path)
    same = ["data/*", "plan/*", "config.yaml"]  # Parquet's bytes are its library's, the card may say it better
    there = {path.relative_to(GOLDEN / "v1") for pattern in same for path in (GOLDEN / "v1").glob(pattern)}
    assert len(there) == 5
    for path in there:
        assert (tmp_path / path).read_bytes() == (GOLDEN / "v1" / path).read_bytes(), path


def test_safetensors_reads_it():
    tensors = load_file(GOLDEN / "v1" / "data" / "u000000.safetensors")
    for name, expected in make_golden.rows(0, 3).items():
        assert same_bits(tensors[name], expected)


def test_nobody_has_touched_it():
    digest = hashlib.sha256()
    for path in sorted((GOLDEN / "v1").rglob("*")):
        if path.is_file() and path.name != ".lock":
            digest.update(path.relative_to(GOLDEN).as_posix().encode() + path.read_bytes())
    assert digest.hexdigest() == "fb82fc0c8e138819753612595665b92a53fdad45b1c6ddf11c01385d51534e6f"
