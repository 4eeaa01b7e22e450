"""The rows of a unit into its open file, with their checksum and norms: natively past the page cache, or in Python."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..format.layout import DTYPE_NAMES, as_integers
from ..format.norms import row_norms
from ..places.durable import PendingFile, crc32c, write_all

# Large enough for the disk to reach its rate, small enough for two blocks of it to be little beside a unit.
PIECE_BYTES = 4 << 20
_SUMMARY_BYTES = 256 << 10  # read once for checksum and norms: in float64 it still fits the second-level cache


_BYTES = "I8"  # what the native writer calls codes, of whatever dtype


class Rows(NamedTuple):
    """Contiguous rows [rows, values] on the CPU, and where their norms (float32) and which are odd (bool) go.

    Nobody asks for those of codes: None.
    """

    rows: torch.Tensor
    norms: np.ndarray[Any, Any] | None
    odd: np.ndarray[Any, Any] | None


class PayloadStream(Protocol):
    """Writes rows behind a header of whole pages."""

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
        The norms by name, float32 [examples], 0 of codes, and which examples hold a NaN or an infinity, bool.
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
    if flat.dtype not in DTYPE_NAMES:
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
                (rows.data_ptr(), *rows.shape, DTYPE_NAMES.get(rows.dtype, _BYTES), *map(_address, (norms, odd)))
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


class PythonStream:
    """The same bytes in Python: block for block, through the page cache."""

    def __init__(self, file: PendingFile) -> None:
        self._file = file
        self._position, self._crc = file.position, file.crc

    def append(self, blocks: Sequence[Rows]) -> None:
        """Write the blocks; each row is fetched from memory once for its checksum, its norm and its way to the disk."""
        for rows, norms, odd in blocks:
            step = max(1, _SUMMARY_BYTES // max(1, rows.shape[1] * rows.dtype.itemsize))
            for part in (slice(start, start + step) for start in range(0, len(rows) if rows.shape[1] else 0, step)):
                data: np.ndarray[Any, Any] = as_integers(rows[part]).reshape(-1).view(np.uint8)
                self._crc = crc32c(data, self._crc)
                if norms is not None and odd is not None:
                    norms[part], odd[part] = row_norms(rows[part])
                write_all(self._file.fd, data.data, self._position, self._file.final)
                self._position += data.size

    def finish(self) -> tuple[int, int]:
        """Everything is written."""
        return self._position, self._crc

    def close(self) -> None:
        """Nothing is on its way."""
