"""Scores of rows of several columns, added up column by column as these lie on the disk: a product for each piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..dataset.read.search import Block, directions, narrowed
from ..errors import broken_rule
from .methods import Prepared
from .pieces import PIECE_BYTES, read_pieces, rows_of
from .queries import WHO

SUMS_BYTES = 32 << 20  # of the scores of a stretch of rows
_CACHED_BYTES = 1 << 20  # of rows as they are multiplied: they stay in a core's second cache
_SAFE = 2.0**-60, 2.0**60  # norms of which neither squares nor products leave the range of float32
_SCORES, _SQUARES = "scores", "squares"


def dtype_of(ds: Any, points: list[str]) -> torch.dtype:
    """Return the dtype of scores: float64 where a column is, else float32."""
    return torch.float64 if any(ds.column(point).dtype == torch.float64 for point in points) else torch.float32


class Taken(NamedTuple):
    """What a stretch of rows came to."""

    scores: torch.Tensor  # [rows, queries]
    norms: torch.Tensor | None  # [rows], to divide by


class Sums:
    """The scores of all columns together, stretch by stretch.

    Args:
        ds: whose rows.
        prepared: queries and maps.
        dtype: of the scores; where the user lets float32 products be rounded more, they are made in float64.
        stops: whether a row that isn't finite is an error; else its scores are NaN, and ``n_skipped`` counts it.
    """

    def __init__(self, ds: Any, prepared: Prepared, dtype: torch.dtype, stops: bool) -> None:
        points = list(prepared.queries)
        joined = torch.cat(list(prepared.queries.values()), 1)
        if prepared.is_cosine:
            joined = directions(joined / joined.abs().amax(1, keepdim=True))
        exact = torch.get_float32_matmul_precision() != "highest"  # the user's choice is of his model's products
        self._work = torch.float64 if exact else dtype
        self.n_queries, self.itemsize, self.n_skipped = len(joined), dtype.itemsize, 0
        self.most_rows = max(1, SUMS_BYTES // (self._work.itemsize * (self.n_queries + 1)))
        ends = list(accumulate(query.shape[1] for query in prepared.queries.values()))
        self._slices = {p: slice(a, b) for p, a, b in zip(points, [0, *ends[:-1]], ends, strict=True)}
        narrow = narrowed(WHO, joined, self._work)
        self._queries = {p: narrow[:, where].T.contiguous() for p, where in self._slices.items()}
        self._maps = {p: m.to(joined.device) for p, m in prepared.maps.items()}
        self._narrow_maps = {p: m.to(self._work) for p, m in self._maps.items()}
        self._ds, self._dtype, self._wide = ds, dtype, joined
        self._is_cosine, self._stops = prepared.is_cosine, stops
        self._memory: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def _points(self) -> list[str]:
        return list(self._slices)

    def blocks(self) -> Iterator[Block]:
        """Yield the scores and squares of each stretch; its memory is used again once the next is asked for."""
        sums = self._wide.new_empty(0, self.n_queries, dtype=self._work)
        squares = sums.new_empty(0)
        for piece, values in read_pieces(self._ds, self._points, self.most_rows):
            n = piece.end - piece.first
            if len(sums) < n:
                sums, squares = sums.new_empty(n, self.n_queries), squares.new_empty(n)
            if piece.start == piece.first and piece.names[0] == self._points[0]:
                sums[:n].zero_()
                squares[:n].zero_()
            where = slice(piece.start - piece.first, piece.stop - piece.first)
            self._add(values, sums[where], squares[where])
            if piece.is_last:
                rows = torch.arange(piece.first, piece.end)
                yield Block({_SCORES: sums[:n], _SQUARES: squares[:n]}, rows, None, n)

    def _add(self, values: Mapping[str, torch.Tensor], sums: torch.Tensor, squares: torch.Tensor) -> None:
        for point, rows in values.items():
            width = rows.shape[1]
            n = max(1, _CACHED_BYTES // (width * self._work.itemsize)) if sums.device.type == "cpu" else len(rows)
            for start in range(0, len(rows), n):
                here = slice(start, start + n)
                part = self._converted(rows[here])
                if self._maps:
                    part = torch.mm(part, self._narrow_maps[point], out=self._room(1, len(part), width))
                sums[here].addmm_(part, self._queries[point])
                if self._is_cosine:
                    squares[here] += torch.linalg.vector_norm(part, dim=1).square_()

    def _converted(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype == self._work and rows.device == self._wide.device:
            return rows
        return self._room(0, *rows.shape).copy_(rows)

    def _room(self, number: int, n: int, width: int) -> torch.Tensor:
        """Memory that is used again: new memory for each product would cost four times as much."""
        found = self._memory.get((number, width))
        if found is None or len(found) < n:
            found = self._memory[number, width] = self._wide.new_empty(n, width, dtype=self._work)
        return found[:n]

    def take(self, block: Block) -> Taken:
        """Return the scores of a stretch, and by what they are divided; odd rows are read and scored again."""
        sums, squares = block.values[_SCORES], block.values[_SQUARES]
        norms = squares.sqrt() if self._is_cosine else None
        odd = ~sums.isfinite().all(1) if norms is None else ~((norms > _SAFE[0]) & (norms < _SAFE[1]))
        if bool(odd.any()):
            places = odd.nonzero()[:, 0]
            stored = sum(self._ds.column(point).row_bytes for point in self._points)
            for some in places.split(max(1, PIECE_BYTES // stored)):
                sums[some] = self._exact(block.rows[some.cpu()]).to(self._work)
            if norms is not None:
                norms[places] = 1.0
        return Taken(sums, norms)

    def _exact(self, numbers: torch.Tensor) -> torch.Tensor:
        """The scores of some rows in float64, [rows, queries]; NaN of rows that aren't finite."""
        rows = rows_of(self._ds, self._points, numbers.numpy()).to(self._wide.device)
        bad = ~rows.isfinite().all(1)
        n_bad = int(bad.count_nonzero())
        if n_bad and self._stops:
            got = f"NaN or infinity in row {int(numbers[bad.cpu()][0])}"
            remedy = 'non_finite="skip" leaves such rows out, and counts them.'
            raise FloatingPointError(broken_rule(WHO, "rows", "be finite", got, remedy))
        self.n_skipped += n_bad
        if self._is_cosine:
            largest = rows.abs().amax(1, keepdim=True)
            rows = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
            for point, where in self._slices.items():
                if self._maps:
                    rows[:, where] = rows[:, where] @ self._maps[point]
            rows = directions(rows)
        rows[bad] = torch.nan
        return rows @ self._wide.T

    def scores(self, rows: Taken, which: slice) -> torch.Tensor:
        """Return the scores of some queries: [queries, rows]."""
        found = rows.scores[:, which].T
        return (found / rows.norms if rows.norms is not None else found).to(self._dtype).contiguous()
