"""Scores of rows of several columns, laid behind each other in memory: one matrix product for a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch

from ..dataset.read import search as searching
from ..dataset.read.search import Block, directions, narrowed
from ..errors import broken_rule
from .methods import Prepared
from .queries import WHO

_JOINED_BYTES = 64 << 20  # of rows in the dtype of the arithmetic
_MOST_ROWS = 1 << 16
_SAFE = 2.0**-60, 2.0**60  # norms of which neither squares nor products leave the range of float32


def dtype_of(ds: Any, points: Sequence[str]) -> torch.dtype:
    """Return the dtype of scores: float64 where a column is, else float32."""
    return torch.float64 if any(ds.column(point).dtype == torch.float64 for point in points) else torch.float32


def rows_at_once(ds: Any, points: Sequence[str]) -> int:
    """Return how many rows are read and scored at once: 8 MiB of all columns together, one row at least."""
    stored: int = sum(ds.column(point).row_bytes for point in points)
    joined: int = dtype_of(ds, points).itemsize * sum(prod(ds.column(point).row_shape) for point in points)
    return max(1, min(_MOST_ROWS, searching.BLOCK_BYTES // stored, _JOINED_BYTES // joined))


class Taken(NamedTuple):
    """A block's rows, behind each other by column."""

    rows: torch.Tensor  # [rows, values of all columns], as they are multiplied
    norms: torch.Tensor | None  # [rows], to divide by
    numbers: torch.Tensor  # int64 [rows]


class JoinedScoring:
    """The scores of all columns together.

    Args:
        prepared: queries and maps.
        dtype: of the scores; where the user lets float32 products be rounded more, they are made in float64.
        step: rows at once.
        stops: whether a row that isn't finite is an error; else its scores are NaN, and ``n_skipped`` counts it.
    """

    def __init__(self, prepared: Prepared, dtype: torch.dtype, step: int, stops: bool) -> None:
        joined = torch.cat(list(prepared.queries.values()), 1)
        if prepared.is_cosine:
            largest = joined.abs().amax(1, keepdim=True)
            if not bool((largest > 0).all()):
                got = f"zeros alone in query {int((largest[:, 0] == 0).nonzero()[0])}"
                raise ValueError(broken_rule(WHO, "queries", "have a direction", got, "Leave it out."))
            joined = directions(joined / largest)
        exact = torch.get_float32_matmul_precision() != "highest"  # the user's choice is of his model's products
        self._dtype, self._wide = dtype, joined
        self._queries = narrowed(WHO, joined, torch.float64 if exact else dtype)
        self.n_queries, self.itemsize = len(joined), dtype.itemsize
        ends = list(accumulate(query.shape[1] for query in prepared.queries.values()))
        starts = [0, *ends[:-1]]
        self._slices = {p: slice(a, b) for p, a, b in zip(prepared.queries, starts, ends, strict=True)}
        self._is_cosine, self._stops = prepared.is_cosine, stops
        self._maps = {p: m.to(joined.device) for p, m in prepared.maps.items()}
        self._narrow_maps = {p: m.to(self._queries.dtype) for p, m in self._maps.items()}
        # New memory for each block would cost four times as much.
        self._memory = [self._queries.new_empty(step, joined.shape[1]) for _ in range(2 if self._maps else 1)]
        self.n_skipped = 0

    def take(self, block: Block) -> Taken:
        """Return the rows as they are multiplied, and by what their products are divided."""
        given = self._joined(block.values)
        rows = given
        if self._maps:
            rows = self._memory[1][: len(given)]
            for point, where in self._slices.items():
                torch.mm(given[:, where], self._narrow_maps[point], out=rows[:, where])
        if not self._is_cosine:
            return Taken(rows, None, block.rows)
        norms = torch.linalg.vector_norm(rows, dim=1)
        odd = ~((norms > _SAFE[0]) & (norms < _SAFE[1]))
        if bool(odd.any()):
            made = self._directions(given[odd])
            rows[odd], norms[odd] = made.to(rows.dtype), 1.0
            self._count(made.isnan().any(1), block.rows[odd.cpu()])
        return Taken(rows, norms, block.rows)

    def _joined(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        only = next(iter(values.values()))
        if len(values) == 1 and only.dtype == self._queries.dtype and only.device == self._queries.device:
            return only
        joined = self._memory[0][: len(only)]
        for point, where in self._slices.items():
            joined[:, where].copy_(values[point])
        return joined

    def _directions(self, rows: torch.Tensor) -> torch.Tensor:
        """Directions of very small and very large rows, in float64: zeros of zeros, NaN of what isn't finite."""
        rows = rows.double()
        largest = rows.abs().amax(1, keepdim=True)
        rows = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
        for point, where in self._slices.items():
            if self._maps:
                rows[:, where] = rows[:, where] @ self._maps[point]
        made = directions(rows)
        made[~rows.isfinite().all(1)] = torch.nan
        return made

    def scores(self, rows: Taken, which: slice) -> torch.Tensor:
        """Return the scores of some queries: [queries, rows]."""
        total = self._queries[which] @ rows.rows.T
        if rows.norms is not None:
            return total.div_(rows.norms).to(self._dtype)
        found = total.to(self._dtype)
        odd = ~found.isfinite().all(0)
        if bool(odd.any()):  # a row that isn't finite, or one whose products are too large for float32
            wide = rows.rows[odd].double()
            bad = ~wide.isfinite().all(1)
            wide[bad] = torch.nan
            found[:, odd] = (self._wide[which] @ wide.T).to(self._dtype)
            if which.start == 0:
                self._count(bad, rows.numbers[odd.cpu()])
        return found

    def _count(self, bad: torch.Tensor, numbers: torch.Tensor) -> None:
        n_bad = int(bad.count_nonzero())
        if n_bad and self._stops:
            got = f"NaN or infinity in row {int(numbers[bad.cpu()][0])}"
            remedy = 'non_finite="skip" leaves such rows out, and counts them.'
            raise FloatingPointError(broken_rule(WHO, "rows", "be finite", got, remedy))
        self.n_skipped += n_bad
