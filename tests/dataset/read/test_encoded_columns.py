"""Encoded columns per example: decoded where they are read, and their codes and scales as they are stored."""

import re

import numpy as np
import pytest
import torch
from kinds_cases import LENGTHS, make_writer, truth, write_units
from safetensors.torch import load_file

from tlfast.dataset import Column, GradientColumn, open_dataset
from tlfast.dataset.format.encodings import BLOCKS, STOCHASTIC, decode, encode
from tlfast.dataset.format.norms import decoded_norms
from tlfast.dataset.format.rounding import rounding_of
from tlfast.dataset.write import native as native_writer

N = len(LENGTHS)


@pytest.fixture(params=["mmap", "pread"])
def ds(tmp_path, request):
    write_units(make_writer(tmp_path / "d"))
    return open_dataset(tmp_path / "d", access=request.param)


def test_any_index_gives_decoded_rows(ds):
    stored = encode(torch.cat(truth()["q"]), "int8:64")
    scales = stored.scales.repeat_interleave(64, 1)[:, :70]
    expected = stored.codes * scales
    column = ds["q"]
    assert isinstance(column, GradientColumn)
    assert column.shape == (N, 70)
    assert column.dtype == torch.float32
    for index in (3, slice(1, 6, 2), [5, 0, 0], torch.tensor([[1, 2], [6, 4]]), torch.arange(N) > 2, []):
        assert torch.equal(column[index], expected[index])
    np.testing.assert_array_equal(column.numpy(1), expected[3:6].numpy())
    assert not column.numpy(1).flags.writeable


def test_codes_and_scales_as_they_are_stored(ds):
    stored, raw = encode(torch.cat(truth()["q"]), "int8:64"), ds.raw("q")
    assert len(raw) == N
    for index in (0, slice(2, 5), [6, 1]):
        for ours, theirs in zip(raw[index], stored, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs[index])
    assert raw.codes.numpy(2).dtype == np.int8


def test_a_norm_is_that_of_the_decoded_row(ds):
    expected = torch.linalg.vector_norm(ds["q"][:].double(), dim=1).float()
    torch.testing.assert_close(ds.norms("q"), expected, rtol=2**-23, atol=0)


def test_a_plain_point_has_no_codes(ds):
    message = "GradientDataset.raw: point must name an encoded point, got the plain 'h'. Read ds['h']."
    with pytest.raises(ValueError, match=re.escape(message)):
        ds.raw("h")
    with pytest.raises(KeyError, match="point must be one of"):
        ds.raw("other")


def test_its_bytes_are_not_its_rows(ds):
    with pytest.raises(TypeError, match=re.escape("Index it, or read ds.raw('q').")):
        ds["q"].ranges(0, 1, torch.zeros(70))


def test_a_row_that_is_not_finite_is_flagged_and_reads_back_as_nan(tmp_path):
    values = truth()
    values["q"][4][0, 66] = torch.inf
    write_units(make_writer(tmp_path / "d2"), values)
    ds = open_dataset(tmp_path / "d2")
    assert [row["flags"] for row in ds.examples] == [0, 0, 0, 0, 1, 0, 0]
    assert ds["q"][4].isnan().tolist() == [False] * 64 + [True] * 6
    assert np.isnan(ds.examples[4]["norms"]["q"])
    assert ds.info()["non_finite_rows"] == 1


@pytest.mark.parametrize("backend", ["python", "native"])
def test_every_encoding_is_written_and_read_back(tmp_path, backend):
    columns = {
        f"{encoding} {per}": Column(torch.float32, (5, 13), per=per, encoding=encoding)
        for encoding in BLOCKS
        for per in ("example", "token")
    }
    if backend == "native" and native_writer.loaded() is None:
        pytest.skip("needs the native writer")
    values = truth(columns)
    write_units(make_writer(tmp_path / "d", columns=columns, backend=backend), values)
    file = load_file(tmp_path / "d" / "data" / "u000001.safetensors")
    for access in ("mmap", "pread"):
        ds = open_dataset(tmp_path / "d", access=access)
        assert ds.verify().ok
        for name, column in columns.items():
            counts = [len(part) for part in values[name]]
            rounding = rounding_of(name, 0, counts) if column.encoding in STOCHASTIC else None
            stored = encode(torch.cat(values[name]), column.encoding, rounding=rounding)
            rows = ds[name] if column.per == "example" else ds[name].flat
            expected = decode(*stored, column.encoding, column.row_shape)
            assert torch.equal(rows[:], expected)
            assert torch.equal(rows[[3, 0, 3]], expected[[3, 0, 3]])
            raw = ds.raw(name).codes if column.per == "example" else ds.raw(name).codes.flat
            assert raw.dtype == stored.codes.dtype == file[f"{name}:codes"].dtype
            assert torch.equal(raw[:].view(torch.uint8), stored.codes.view(torch.uint8))
            lengths = [len(part) for part in values[name]]
            norms = torch.stack([part.double().norm() for part in expected.split(lengths)])
            torch.testing.assert_close(ds.norms(name).double(), norms, rtol=1e-6, atol=0)
            in_python = decoded_norms(stored, column, lengths if column.per == "token" else None)
            np.testing.assert_array_equal(ds.norms(name).numpy(), in_python)
    assert ds.info()["points"]["int4:64 token"]["encoding"] == "int4:64"
