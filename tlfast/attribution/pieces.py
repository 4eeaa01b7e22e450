"""What of a dataset is read at once, in the order of the disk: a unit's columns one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from math import prod
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch

from ..dataset.read.ahead import read_ahead
from ..dataset.read.columns import read_stretches

PIECE_BYTES = 8 << 20  # read at once: a disk's rate
_STRETCH_BYTES = 256 << 20  # a larger unit is cut
_ALIGNED = 64  # bytes


class Piece(NamedTuple):
    """Some rows of some columns; those of a stretch come behind each other."""

    names: list[str]
    start: int
    stop: int
    first: int  # row of the stretch
    end: int  # of the stretch
    is_last: bool


def stretches(ds: Any, row_bytes: int, most_rows: int) -> Iterator[tuple[int, int]]:
    """Yield bounds of rows: a unit each, several small ones together, or parts of a large one."""
    most_rows = max(1, min(most_rows, _STRETCH_BYTES // row_bytes))
    first = end = 0
    for stop in ds.unit_bounds[1].tolist():
        if end > first and ((stop - first) * row_bytes > PIECE_BYTES or stop - first > most_rows):
            yield first, end
            first = end
        while stop - first > most_rows:
            yield first, first + most_rows
            first += most_rows
        end = stop
    if end > first:
        yield first, end


def pieces(ds: Any, points: Sequence[str], most_rows: int) -> Iterator[Piece]:
    """Yield all rows of some columns, at most ``most_rows`` in a stretch."""
    sizes = {point: ds.column(point).row_bytes for point in points}
    for first, end in stretches(ds, sum(sizes.values()), most_rows):
        groups: list[list[str]] = [[]]
        for point in points:
            if groups[-1] and sum(sizes[name] for name in [*groups[-1], point]) * (end - first) > PIECE_BYTES:
                groups.append([])
            groups[-1].append(point)
        for names in groups:
            step = max(1, PIECE_BYTES // sum(sizes[name] for name in names))
            for start in range(first, end, step):
                stop = min(end, start + step)
                yield Piece(names, start, stop, first, end, names is groups[-1] and stop == end)


def read_pieces(ds: Any, points: Sequence[str], most_rows: int) -> Iterator[tuple[Piece, dict[str, torch.Tensor]]]:
    """Yield each piece and its rows, [rows, values of a row] by column; the next ones are read meanwhile.

    A piece's memory is read into again once the next is asked for.
    """
    columns = {point: ds[point] for point in points}
    free = SimpleQueue[torch.Tensor]()

    def read(piece: Piece) -> tuple[Piece, dict[str, torch.Tensor], torch.Tensor]:
        wanted, n = [columns[name] for name in piece.names], piece.stop - piece.start
        fields = list(chain.from_iterable(column.fields for column in wanted))
        n_bytes = sum(_padded(n * field.row_bytes) for field in fields)
        memory = torch.empty(0, dtype=torch.uint8)
        with suppress(Empty):  # new memory costs as much as copying into it
            memory = free.get_nowait()
        if len(memory) < n_bytes:
            memory = torch.empty(max(n_bytes, PIECE_BYTES + _ALIGNED * len(fields)), dtype=torch.uint8)
        into, at = {}, 0
        for field in fields:
            part = memory[at : at + n * field.row_bytes]
            into[field.name] = part.view(field.dtype).view(n, *field.shape[1:])
            at += _padded(n * field.row_bytes)
        found = read_stretches(wanted, [(piece.start, piece.stop)], into)
        return piece, {name: rows.reshape(n, prod(rows.shape[1:])) for name, rows in found.items()}, memory

    for piece, rows, memory in read_ahead(pieces(ds, points, most_rows), read):
        yield piece, rows
        free.put(memory)


def rows_of(ds: Any, points: Sequence[str], numbers: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return some rows, their columns behind each other: float64 [rows, values]."""
    return torch.cat([ds[point][numbers].reshape(len(numbers), -1).double() for point in points], 1)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNED) * _ALIGNED
