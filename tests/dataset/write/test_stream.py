"""The stream of a unit's rows: the bytes, checksums and norms of both writers, from any memory and at any size."""

import errno
import math
import os
import threading
from types import SimpleNamespace

import google_crc32c
import numpy as np
import pytest
import torch
from backends import usable
from fresh_python import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payload_cases import HEADER, check_checksums, write

from tlfast.dataset.format.layout import DTYPE_NAMES, PAGE_BYTES, as_integers
from tlfast.dataset.format.norms import LANES, row_norms
from tlfast.dataset.places.durable import PendingFile
from tlfast.dataset.write import native as native_writer
from tlfast.dataset.write import payload

DTYPES = list(DTYPE_NAMES)
PIECE_BYTES = 2 * PAGE_BYTES  # small ones, so that small tensors have many


@pytest.fixture
def writer(backend):
    """The native module, or None for Python."""
    return native_writer.loaded() if backend == "native" else None


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(payload, "PIECE_BYTES", PIECE_BYTES)


def at_offset(tensor, offset):
    """A copy of a tensor that lies ``offset`` bytes behind a page."""
    room = torch.empty(tensor.nbytes + 2 * PAGE_BYTES, dtype=torch.uint8)
    start = -room.data_ptr() % PAGE_BYTES + offset
    copy = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def bytes_of(tensor):
    return as_integers(tensor.contiguous()).tobytes()


@st.composite
def units(draw):
    """Columns of one unit: any dtypes and widths, contiguous at any place, side by side, or strided."""
    n_rows = draw(st.integers(1, 40))
    tensors = {}
    for k in range(draw(st.integers(1, 4))):
        dtype, width = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0, 1, 31, 32, 33, 700, 3000]))
        tensor = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(k), dtype=torch.float64).to(dtype)
        how = draw(st.sampled_from(["page", "near", "strided", "as it comes"]))
        if how in ("page", "near"):
            tensor = at_offset(tensor, 0 if how == "page" else 8)
        elif how == "strided":
            tensor = tensor.T.contiguous().T
        tensors[f"c{k}"] = tensor
    if draw(st.booleans()):  # all in one piece, as the drain has them
        room = at_offset(torch.zeros(sum(t.nbytes for t in tensors.values()), dtype=torch.uint8), 0)
        at = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            together = room[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensors[name], at = together.copy_(tensor), at + tensor.nbytes
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    return tensors


@given(units())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bytes_from_any_memory(tmp_path, writer, tensors):
    content, crc, norms, odd = write(tmp_path, tensors, writer)
    assert content == HEADER + b"".join(map(bytes_of, tensors.values()))
    assert crc == google_crc32c.value(content)
    assert not odd.any()
    for name, tensor in tensors.items():
        expected, _ = row_norms(tensor)
        assert norms[name].tobytes() == expected.tobytes(), name


def test_the_cache_is_passed_where_the_filesystem_allows_it(tmp_path, native):
    tensor = at_offset(torch.randn(16, 1024), 0)
    with PendingFile(tmp_path / "unit", len(HEADER) + tensor.nbytes) as file:
        file.start_with(HEADER)
        stream = payload.NativeStream(file, native_writer.loaded())._stream
        try:
            os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 1 << 40)))
            allowed = True
        except (OSError, OverflowError):
            allowed = False
        assert stream.direct == allowed


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64, 100, 768, 5000])
def test_norms_have_the_same_bits_and_are_right(tmp_path, native, dtype, width):
    scale = 10.0 ** torch.arange(-6, 6, dtype=torch.float64)[:, None]
    rows = (torch.randn(12, width, dtype=torch.float64) * scale).to(dtype)
    rows[3] = 0
    rows[4] = -0.0
    rows[5] = torch.finfo(dtype).smallest_normal / 4  # subnormal
    rows[6] = torch.finfo(dtype).max
    for row, bad in ((7, math.nan), (8, math.inf), (9, -math.inf)):
        rows[row, width // 2] = bad
    rows[10, 0], rows[10, -1] = math.inf, -math.nan
    _, _, norms, odd = write(tmp_path, {"x": rows}, native_writer.loaded())
    python, python_odd = row_norms(rows)
    assert norms["x"].tobytes() == python.tobytes()
    assert odd.tolist() == python_odd.tolist() == (~rows.isfinite()).any(1).tolist()
    for row in (r for r in range(12) if r != 6 and not odd[r]):
        truth = math.sqrt(math.fsum(float(value) ** 2 for value in rows[row]))
        # One rounding to float32, and at most one of float64 per addition.
        bound = truth * (np.finfo(np.float32).eps + width * np.finfo(np.float64).eps) + np.finfo(np.float32).tiny
        assert abs(float(python[row]) - truth) <= bound


def test_the_order_of_addition_is_that_of_the_format():
    """Lane i % 32 by rising i, then a tree: as docs/format.md has it, in Python's own floats."""
    values = torch.randn(1, 3 * LANES + 5, dtype=torch.float64)
    lanes = [0.0] * LANES
    for i, value in enumerate(values[0].tolist()):
        lanes[i % LANES] += value * value
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    assert row_norms(values)[0].tobytes() == np.float32(math.sqrt(lanes[0])).tobytes()
    other = sum(value * value for value in values[0].tolist())
    assert other != lanes[0], "another order has other bits, or this test shows nothing"


@pytest.mark.sanitize
def test_checksums(native):
    check_checksums(native_writer.loaded())
    assert native_writer.loaded().crc32c_name() in ("sse4.2", "arm", "table")


OTHER_SET = """
import sys
from pathlib import Path
sys.path[:0] = ["tests/support"]
import torch
from encoding_cases import check_codes
from payload_cases import check_checksums, write
from tlfast.dataset.format.norms import row_norms
from tlfast import _disk
check_checksums(_disk)
check_codes(_disk, widths=[65])
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for width in (1, 33, 769):
        rows = torch.randn(9, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        assert write(Path(sys.argv[1]), {"x": rows}, _disk)[2]["x"].tobytes() == row_norms(rows)[0].tobytes()
print(_disk.crc32c_name())
"""


@pytest.mark.parametrize("most", ["baseline", "avx2"])
def test_every_instruction_set_has_the_same_checksums_norms_and_codes(native, most, tmp_path):
    done = run("-c", OTHER_SET, str(tmp_path), TLFAST_CPU=most)
    assert done.returncode == 0, done.stderr
    assert most == "avx2" or done.stdout == "table\n"


def stand_in(fd, position=PAGE_BYTES):
    """What a stream needs of a PendingFile."""
    return SimpleNamespace(fd=fd, final="out/data/u000000.safetensors", position=position, crc=0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("width", [1, 5 * PAGE_BYTES])
def test_a_full_disk_is_told_with_the_name_of_the_file(writer, width):
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        full = pytest.raises(OSError, match=r"No space left on device: 'out/data/u000000\.safetensors'")
        with full as caught, payload.writing(stand_in(fd), {"x": torch.zeros(1, width)}, writer):
            pass
        assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(fd)


def test_other_errors_keep_their_number(tmp_path, writer):
    (tmp_path / "read only").touch()
    fd = os.open(tmp_path / "read only", os.O_RDONLY)
    try:
        bad = pytest.raises(OSError, match="Bad file descriptor: 'out")
        with bad as caught, payload.writing(stand_in(fd), {"x": torch.zeros(1, 5 * PAGE_BYTES)}, writer):
            pass
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(fd)


def test_an_error_of_the_block_wins_and_nothing_goes_on(tmp_path, writer):
    tensor = torch.zeros(100, PAGE_BYTES)
    with PendingFile(tmp_path / "unit", len(HEADER) + tensor.nbytes) as file:
        file.start_with(HEADER)
        with pytest.raises(LookupError, match="no table"), payload.writing(file, {"x": tensor}, writer):
            raise LookupError("no table")
        assert file.position == len(HEADER)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tlfast-disk")]
    assert os.listdir(tmp_path) == []


def test_a_closed_stream_says_so(tmp_path, native):
    stream = native_writer.loaded().PayloadStream(0, 0, 0, PAGE_BYTES, "x")
    stream.close()
    stream.close()
    for call in (stream.finish, lambda: stream.append([]), lambda: stream.crc):
        with pytest.raises(ValueError, match=r"PayloadStream: stream must be open, got a closed one\. Start another\."):
            call()


@pytest.mark.parametrize("n_values", [0, 1, 7, 3001])
def test_codes_are_bytes_without_norms(tmp_path, writer, n_values):
    rows = torch.tensor([[1.0], [math.inf], [3.0]])
    codes = torch.arange(3 * n_values).view(3, n_values).to(torch.int8)
    for tensors in ({"x": rows, "codes": codes}, {"x": rows, "codes": codes.T.contiguous().T}):
        content, crc, norms, odd = write(tmp_path, tensors, writer)
        assert content == HEADER + bytes_of(rows) + bytes_of(codes)
        assert crc == google_crc32c.value(content)
        assert norms["x"].tolist() == [1.0, math.inf, 3.0]
        assert not norms["codes"].any()
        assert odd.tolist() == [False, True, False]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_example_of_several_rows_has_one_norm(tmp_path, writer, dtype, strided):
    tokens = torch.randn(9, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens[8, 3] = math.nan
    lengths = [3, 0, 5, 1]
    given = tokens.T.contiguous().T if strided else tokens
    each = torch.ones(4, 2)
    content, _, norms, odd = write(tmp_path, {"t": given, "x": each}, writer, {"t": lengths})
    assert content == HEADER + bytes_of(tokens) + bytes_of(each)
    for i, part in enumerate(tokens.split(lengths)):
        expected = row_norms(part.reshape(1, -1))[0][0] if len(part) else np.float32(0)
        assert norms["t"][i].tobytes() == expected.tobytes()
    assert odd.tolist() == [False, False, False, True]
    assert len(norms["x"]) == 4


def test_arguments_of_the_native_stream(native):
    module = usable("native") and native_writer.loaded()
    with pytest.raises(
        ValueError, match=r"PayloadStream: position and piece_bytes must be multiples of 4096, got 5 and"
    ):
        module.PayloadStream(0, 5, 0, 4096, "x")
    stream = module.PayloadStream(0, 0, 0, 4096, "x")
    with pytest.raises(
        ValueError, match=r"PayloadStream: dtype must be F64, F32, F16, BF16 or I8, got I32\. Cast it\."
    ):
        stream.append([(0, 0, 0, "I32", 0, 0)])
