"""The rows of a unit into its open file: whole pages by two threads, checksum and norms beside them, past the cache."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..format.layout import FIELD_DTYPE_NAMES, PAGE_BYTES, as_integers
from ..format.norms import row_norms
from ..places.durable import PendingFile, crc32c
from ..places.local_file import set_direct

# Large enough for the disk to reach its rate, small enough for two blocks of it to be little beside a unit.
PIECE_BYTES = 4 << 20
_THREADS = 2  # one prepares the next write while the disk is at the other's
_SUMMARY_BYTES = 256 << 10  # read once for checksum and norms: in float64 it still fits the second-level cache
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Rows(NamedTuple):
    """Contiguous rows [rows, values] on the CPU, and where their norms (float32) and which are odd (bool) go.

    Nobody asks for those of codes (int8): None.
    """

    rows: torch.Tensor
    norms: np.ndarray[Any, Any] | None
    odd: np.ndarray[Any, Any] | None


class PayloadStream(Protocol):
    """Writes rows behind a header of whole pages; whole pages go to the disk at once, the rest at the end."""

    def append(self, blocks: Sequence[Rows]) -> None:
        """Write blocks one behind the other; returns when their norms are there, while the disk may be at work."""
        ...

    def finish(self) -> tuple[int, int]:
        """Write what is left; return where the file ends, and the CRC32C of all before that."""
        ...

    def close(self) -> None:
        """Leave the memory alone from now on, whatever is written by then."""
        ...


@contextmanager
def writing(
    file: PendingFile,
    tensors: Mapping[str, torch.Tensor],
    native: ModuleType | None,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]]:
    """Write the rows of a unit behind the header; inside the block their norms are there, after it the bytes too.

    Args:
        file: its header is there, nothing else is.
        tensors: in the order of the file, [rows, *row shape] on any device.
        native: the native module, or None for Python: the same bytes.
        lengths: how many rows each example has in a tensor, where it is not one; their norm is that of all together.

    Yields:
        The norms by name, float32 [examples], 0 of codes (int8), and which examples hold a NaN or an infinity, bool.
    """
    lengths = lengths or {}
    first = next(iter(tensors))
    n = len(lengths.get(first, tensors[first]))
    norms = {name: np.zeros(n, dtype=np.float32) for name in tensors}
    odd = {name: np.zeros(n, dtype=bool) for name in tensors}
    stream: PayloadStream = PythonStream(file) if native is None else NativeStream(file, native)
    try:
        at_hand: list[Rows] = []
        for name, tensor in tensors.items():
            of_examples = lengths.get(name)
            flat = tensor.detach().reshape(len(tensor), -1) if tensor.numel() else tensor.new_empty(len(tensor), 0)
            if flat.device.type == "cpu" and flat.is_contiguous():
                at_hand += _blocks(flat, norms[name], odd[name], of_examples)  # what lies together is written together
                continue
            stream.append(at_hand)
            at_hand = []
            for rows, examples in _pieces(flat, of_examples):
                here, of_these = flat[rows].to("cpu").contiguous(), of_examples and of_examples[examples]
                stream.append(_blocks(here, norms[name][examples], odd[name][examples], of_these))
        stream.append(at_hand)
        yield norms, np.any(list(odd.values()), axis=0)
        file.position, file.crc = stream.finish()
    finally:
        stream.close()


def _blocks(
    flat: torch.Tensor, norms: np.ndarray[Any, Any], odd: np.ndarray[Any, Any], lengths: Sequence[int] | None
) -> list[Rows]:
    """The rows of some examples as blocks: one, or one for each example where it has several rows."""
    if flat.dtype == torch.int8:
        return [Rows(flat, None, None)]
    if lengths is None:
        return [Rows(flat, norms, odd)]
    parts = flat.split(list(lengths))
    return [Rows(part.reshape(1, -1), norms[i : i + 1], odd[i : i + 1]) for i, part in enumerate(parts)]


def _pieces(flat: torch.Tensor, lengths: Sequence[int] | None) -> Iterator[tuple[slice, slice]]:
    """Yield rows of about PIECE_BYTES that are fetched together, and the examples whose rows they are."""
    step = max(1, PIECE_BYTES // max(1, flat.shape[1] * flat.dtype.itemsize))
    if lengths is None:
        yield from ((slice(start, start + step),) * 2 for start in range(0, len(flat), step))
        return
    stops = [0, *accumulate(lengths)]
    example = 0
    while example < len(lengths):
        end = max(example + 1, bisect_right(stops, stops[example] + step) - 1)
        yield slice(stops[example], stops[end]), slice(example, end)
        example = end


class NativeStream:
    """The native one, without the GIL."""

    def __init__(self, file: PendingFile, native: ModuleType) -> None:
        self._stream = native.PayloadStream(file.fd, file.position, file.crc, PIECE_BYTES, str(file.final))
        self._held: Sequence[Rows] = ()  # the disk may be at work on their memory

    def append(self, blocks: Sequence[Rows]) -> None:
        """Hand over addresses."""
        before, self._held = self._held, blocks
        self._stream.append(
            [
                (rows.data_ptr(), *rows.shape, FIELD_DTYPE_NAMES[rows.dtype], *map(_address, (norms, odd)))
                for rows, norms, odd in blocks
            ]
        )
        del before

    def finish(self) -> tuple[int, int]:
        """Write what is left."""
        self._stream.finish()
        return self._stream.position, self._stream.crc

    def close(self) -> None:
        """Wait for the pieces that are on their way."""
        self._stream.close()


def _address(array: np.ndarray[Any, Any] | None) -> int:
    return 0 if array is None else array.ctypes.data


class _Run:
    """Pieces of memory as one sequence of bytes."""

    def __init__(self, parts: Sequence[_Bytes]) -> None:
        self._parts = parts
        self._stops = list(accumulate(map(len, parts)))
        self.n_bytes = self._stops[-1] if parts else 0

    def from_byte(self, at: int) -> _Bytes:
        """Return the bytes from number ``at`` on that lie together."""
        k = bisect_right(self._stops, at)
        part = self._parts[k]
        return part[at - (self._stops[k] - len(part)) :]

    def gather(self, start: int, out: _Bytes) -> _Bytes:
        """Copy the bytes from number ``start`` on until ``out`` is full; return it."""
        done = 0
        while done < len(out):
            part = self.from_byte(start + done)[: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out


class PythonStream:
    """The same in Python: call for call, and in the same order."""

    def __init__(self, file: PendingFile) -> None:
        self._fd, self._path = file.fd, str(file.final)
        self._position, self._crc = file.position, file.crc
        self._kept: _Bytes = np.empty(0, np.uint8)
        self._direct = set_direct(self._fd, True)
        self._leaving = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._closed = False

    def append(self, blocks: Sequence[Rows]) -> None:
        """Write whole pages in two threads, and find checksum and norms in this one."""
        self._wait()
        parts = [self._kept, *(as_integers(block.rows).reshape(-1).view(np.uint8) for block in blocks)]
        run = _Run([part for part in parts if len(part)])
        n_whole = run.n_bytes // PAGE_BYTES * PAGE_BYTES
        starts = iter(range(0, n_whole, PIECE_BYTES))  # gives each piece to one thread alone
        work = (run, self._position, starts, n_whole)
        for _ in range(min(_THREADS, -(-n_whole // PIECE_BYTES))):
            thread = threading.Thread(target=self._write_pieces, args=work, name="tlfast-disk")
            thread.start()
            self._threads.append(thread)
        self._kept = run.gather(n_whole, np.empty(run.n_bytes - n_whole, np.uint8))
        self._position += n_whole
        self._crc = _summarise(blocks, self._crc)

    def finish(self) -> tuple[int, int]:
        """Wait for the disk, and write what fills no page, through the cache."""
        self._wait()
        self._leave_direct()
        self._write_all(self._kept, self._position)
        return self._position + len(self._kept), self._crc

    def close(self) -> None:
        """Wait for the pieces that are on their way."""
        self._closed = True
        while self._threads:
            self._threads.pop().join()

    def _wait(self) -> None:
        while self._threads:
            self._threads.pop().join()
        if self._errors:
            raise self._errors[0]

    def _write_pieces(self, run: _Run, position: int, starts: Iterator[int], n_whole: int) -> None:
        block: _Bytes | None = None
        try:
            for start in starts:
                n = min(PIECE_BYTES, n_whole - start)
                piece = run.from_byte(start)[:n]
                if len(piece) < n or (self._direct and piece.ctypes.data % PAGE_BYTES):
                    if block is None:  # anonymous memory begins at a page
                        block = np.frombuffer(mmap.mmap(-1, PIECE_BYTES), np.uint8)
                    piece = run.gather(start, block[:n])
                self._write_all(piece, position + start)
                if self._errors or self._closed:
                    return
        except BaseException as error:  # whatever it was, the caller must hear of it
            self._errors.append(error)

    def _write_all(self, data: _Bytes, at: int) -> None:
        while len(data):
            direct = self._direct  # the other thread may give it up meanwhile
            try:
                written = os.pwrite(self._fd, data.data, at)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:  # a filesystem may take the flag and refuse the write
                    self._leave_direct()
                    continue
                raise OSError(error.errno, error.strerror, self._path) from None
            if written == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), self._path)
            if written % PAGE_BYTES:  # the disk may be full: what is left begins within a page
                self._leave_direct()
            data, at = data[written:], at + written

    def _leave_direct(self) -> None:
        with self._leaving:
            if self._direct:
                set_direct(self._fd, False)
            self._direct = False  # after the flag is gone: who reads this writes from any address


def _summarise(blocks: Sequence[Rows], crc: int) -> int:
    """The checksum goes on from block to block, the norms go row by row; each row is fetched from memory once."""
    for rows, norms, odd in blocks:
        step = max(1, _SUMMARY_BYTES // max(1, rows.shape[1] * rows.dtype.itemsize))
        for part in (slice(start, start + step) for start in range(0, len(rows) if rows.shape[1] else 0, step)):
            crc = crc32c(as_integers(rows[part]).reshape(-1).view(np.uint8), crc)
            if norms is not None and odd is not None:
                norms[part], odd[part] = row_norms(rows[part])
    return crc
