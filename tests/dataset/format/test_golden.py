"""The tiny dataset of each version of the format opens for ever, with its values, and is written the same today."""

import hashlib
import math
import shutil

import make_golden
import numpy as np
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
    assert VERSIONS == sorted(make_golden.COLUMNS) == ["v1", "v2", "v3"]


def stored(name, i):
    """Codes and scales of an example of v2 at an encoded point, worked out by numpy from what docs/format.md says."""
    block = {"int8": 3, "int8:64": 64}[make_golden.column("v2", name).encoding]
    values = np.atleast_2d(make_golden.row("v2", name, i).numpy())
    per_code = np.float32((1 - 2.0**-22) / 127)
    codes, scales = np.zeros(values.shape, np.int8), []
    for start in range(0, values.shape[1], block):
        part = values[:, start : start + block]
        scales.append(np.abs(part).max(1) * per_code)
        with np.errstate(invalid="ignore"):
            quotients = part / scales[-1][:, None]
        codes[:, start : start + block] = np.rint(np.where(np.isnan(quotients), 0, quotients))
    decoded = codes * np.repeat(np.stack(scales, 1), block, axis=1)[:, : values.shape[1]]
    return codes, np.stack(scales, 1), decoded


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_opens_with_its_values(version, access):
    ds = open_dataset(GOLDEN / version, access=access)
    assert ds.points == list(make_golden.COLUMNS[version])
    assert [len(unit) for unit in ds.units] == [3, 2, 2]
    for name in ds.points:
        assert ds.column(name) == make_golden.column(version, name)
        if ds.column(name).encoding is None:
            for i in range(N):
                assert same_bits(ds[name][i], make_golden.row(version, name, i))
    for i, row in enumerate(ds.examples):
        assert {key: row[key] for key in ("id", "input_ids", "source", "start", "length")} == vars(
            make_golden.example(i)
        )
    kept = [{name: row[name] for name in ds.kept} for row in ds.examples]
    assert kept == [make_golden.kept(i) if version in make_golden.KEPT else {} for i in range(N)]
    assert [row["flags"] for row in ds.examples] == [0, 1, 0, 0, 3, 0, 0]
    assert ds.skipped == [tuple(skipped) for skipped in make_golden.SKIPPED]
    assert ds.header["model"] == {"name": "golden"}


@pytest.mark.parametrize("version", VERSIONS)
def test_its_norms_are_of_its_values(version):
    ds = open_dataset(GOLDEN / version)
    for name in ds.points:
        for i in range(N):
            expected = torch.linalg.vector_norm(ds[name][i].double()).item()
            norm = ds.examples[i]["norms"][name]
            if math.isfinite(expected):
                assert abs(norm - expected) <= expected * 2**-23  # rounded to float32, and once before
            else:
                assert i in (make_golden.NON_FINITE, make_golden.MISSING)
                assert repr(norm) == repr(expected)


@pytest.mark.parametrize("name", ["low é", "low tokens"])
def test_its_encoded_values(name):
    ds = open_dataset(GOLDEN / "v2")
    for i in range(N):
        codes, scales, decoded = stored(name, i)
        raw = ds.raw(name)[i]
        np.testing.assert_array_equal(raw.codes.numpy().reshape(codes.shape), codes)
        np.testing.assert_array_equal(raw.scales.numpy().reshape(scales.shape), scales)
        np.testing.assert_array_equal(ds[name][i].numpy().reshape(codes.shape), decoded)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_verifies_and_one_changed_byte_is_found(version, tmp_path):
    copy = shutil.copytree(GOLDEN / version, tmp_path / version)
    assert verify_dataset(copy).ok
    file = copy / "data" / "u000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [problem.unit for problem in verify_dataset(copy).problems] == ["u000001"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("backend", ["native", "python"])
def test_it_is_written_today_to_the_byte(backend, version, tmp_path, monkeypatch):
    usable(backend)
    monkeypatch.setattr(make_golden, "BACKEND", backend)
    make_golden.write(version, tmp_path)
    golden = GOLDEN / version
    same = ["data/*", "plan/*", "config.yaml"]  # Parquet's bytes are its library's, the card may say it better
    there = {path.relative_to(golden) for pattern in same for path in golden.glob(pattern)}
    assert len(there) == 5
    for path in there:
        assert (tmp_path / path).read_bytes() == (golden / path).read_bytes(), path


def test_safetensors_reads_version_1():
    tensors = load_file(GOLDEN / "v1" / "data" / "u000000.safetensors")
    for name, expected in make_golden.rows("v1", 0, 3).items():
        assert same_bits(tensors[name], expected)


def test_safetensors_reads_version_2():
    tensors = load_file(GOLDEN / "v2" / "data" / "u000000.safetensors")
    given = make_golden.rows("v2", 0, 3)
    for name in ("h.3", "h.3:act", "tokens"):
        assert same_bits(tensors.pop(name), given[name])
    for name in ("low é", "low tokens"):
        codes, scales, _ = (np.concatenate(part) for part in zip(*(stored(name, i) for i in range(3)), strict=True))
        np.testing.assert_array_equal(tensors.pop(f"{name}:codes").numpy(), codes)
        np.testing.assert_array_equal(tensors.pop(f"{name}:scales").numpy().reshape(scales.shape), scales)
    assert not tensors


@pytest.mark.parametrize(
    "version, expected",
    [
        ("v1", "fb82fc0c8e138819753612595665b92a53fdad45b1c6ddf11c01385d51534e6f"),
        ("v2", "971c66b195d19cf0905198ebbea5db7a9fa1c0e59e8f45b8d15f0533fcd1dde2"),
        ("v3", "97226cff8c53eff46ead9c9ac9c574996a742c27807c8c19886addf74a1e37ec"),
    ],
)
def test_nobody_has_touched_it(version, expected):
    digest = hashlib.sha256()
    for path in sorted((GOLDEN / version).rglob("*")):
        if path.is_file() and path.name != ".lock":
            digest.update(path.relative_to(GOLDEN).as_posix().encode() + path.read_bytes())
    assert digest.hexdigest() == expected
