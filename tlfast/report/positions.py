"""How large rows are at each position, from a sample of examples, where rows keep their positions or are tokens'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..dataset import GradientDataset
from ..dataset.read.row_dataset import per_example

_CHUNK_BYTES = 32 << 20  # of rows in memory at a time

Array = np.ndarray[Any, Any]


def points_with_positions(dataset: GradientDataset) -> list[str]:
    """Return the points of which positions are known: those with a row for each token, and those whose rows begin with
    the dimension of positions, by what the header says of their specs."""
    return [p for p in dataset.points if dataset.column(p).per == "token" or dataset.keeps_positions(p)]


def norms_by_position(
    dataset: GradientDataset, points: Sequence[str], rows: Array, lengths: Array
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the mean norm at each position, float64 [positions], of the real tokens of some rows; NaN where none is.

    Positions count an example's real tokens from 0, whichever side the padding of rows is on: points per token and
    others stand on one axis.

    Args:
        dataset: where the rows are.
        points: some of points_with_positions.
        rows: row numbers.
        lengths: real tokens of each.
    """
    means = {}
    for point in points:
        is_token = dataset.column(point).per == "token"
        parts = (_of_tokens if is_token else _of_rows)(dataset, point, rows, lengths)
        width = int(lengths.max(initial=0)) if is_token else dataset.column(point).row_shape[0]
        total, count = np.zeros(width), np.zeros(width, np.int64)
        for positions, norms in parts:
            good = np.isfinite(norms)
            total += np.bincount(positions[good], norms[good], width)[:width]
            count += np.bincount(positions[good], minlength=width)[:width]
        with np.errstate(invalid="ignore"):
            means[point] = total / count
    return means


def _of_rows(dataset: GradientDataset, point: str, rows: Array, lengths: Array) -> Iterator[tuple[Array, Array]]:
    """Yield positions and norms of the real tokens of rows [positions, ...], some rows at a time."""
    left = dataset.header["batching"].get("padding_side") == "left"  # there, as it says how wide rows are
    column = per_example("write_report", dataset, point)
    width = column.shape[1]
    for part in _chunks(len(rows), column.dtype.itemsize * int(np.prod(column.shape[1:], dtype=np.int64))):
        values = column[rows[part]].to(torch.float64)
        norms = (values.flatten(2).norm(dim=2) if values.dim() > 2 else values.abs()).numpy()
        length, positions = lengths[part, None], np.broadcast_to(np.arange(width), norms.shape)
        first = width - length if left else 0
        real = (positions >= first) & (positions < first + length)
        yield (positions - first)[real], norms[real]


def _of_tokens(dataset: GradientDataset, point: str, rows: Array, lengths: Array) -> Iterator[tuple[Array, Array]]:
    """Yield positions and norms of the tokens of some rows at a time."""
    column: Any = dataset[point]
    token_bytes = column.dtype.itemsize * int(np.prod(column.flat.shape[1:], dtype=np.int64))
    for part in _chunks(len(rows), token_bytes * int(lengths.max(initial=1))):
        values, counts = column.joined(rows[part])
        firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        wide = values.to(torch.float64)
        norms = wide.flatten(1).norm(dim=1) if wide.dim() > 1 else wide.abs()
        yield (torch.arange(len(values)) - firsts).numpy(), norms.numpy()


def _chunks(n_rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, n_rows, step):
        yield slice(start, start + step)
