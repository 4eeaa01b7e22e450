"""The figures of a report: one pass over the row tables, in memory that doesn't grow with the rows."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..dataset import FLAG_MISSING, FLAG_NON_FINITE, FLAG_SATURATED, GradientDataset
from ..dataset.format.row_table import NORM

# Norms are counted in bins of a 40th of a decade: a percentile out of them is right to 6 %.
PER_DECADE = 40
LOWEST, HIGHEST = -46, 39  # decades of float32, the smallest denormal included
SHOWN_LARGEST = 12
SHOWN_BAD = 12
SAMPLED_ROWS = 2048  # of which the positions are looked at


@dataclass
class Norms:
    """How the norms of one point's rows are distributed."""

    counts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((HIGHEST - LOWEST) * PER_DECADE, np.int64))
    n_zero: int = 0
    n_non_finite: int = 0
    largest: float = 0.0

    def add(self, norms: np.ndarray[Any, Any]) -> None:
        """Count the norms of some rows."""
        positive = norms[np.isfinite(norms) & (norms > 0)]
        self.n_non_finite += int(np.count_nonzero(~np.isfinite(norms)))
        self.n_zero += int(np.count_nonzero(norms == 0))
        if positive.size:
            bins = np.floor((np.log10(positive.astype(np.float64)) - LOWEST) * PER_DECADE).astype(np.int64)
            self.counts += np.bincount(bins.clip(0, len(self.counts) - 1), minlength=len(self.counts))
            self.largest = max(self.largest, float(positive.max()))

    def percentile(self, percent: float) -> float:
        """Return about the norm that so many percent of the finite ones are below; NaN without any."""
        total = int(self.counts.sum()) + self.n_zero
        if not total:
            return float("nan")
        rank = percent / 100 * total - self.n_zero
        if rank <= 0 and self.n_zero:
            return 0.0
        k = int(np.searchsorted(np.cumsum(self.counts), max(rank, 1)))
        return float(min(10.0 ** (LOWEST + (k + 0.5) / PER_DECADE), self.largest))


@dataclass(order=True)
class LargeRow:
    """One of the largest rows: its norm over all points that are ranked together, and the point of the largest."""

    norm: float
    row: int
    point: str = field(compare=False)
    example: dict[str, Any] = field(compare=False)


@dataclass
class Summary:
    """What a report says of the rows."""

    norms: dict[str, Norms]
    ranked: list[str]  # points whose norms are added up to rank the rows: of one kind, as others have other sizes
    n_rows: int = 0
    n_tokens: int = 0
    flags: Counter[str] = field(default_factory=Counter)  # rows per flag
    largest: list[LargeRow] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)  # the first rows with values that are not finite
    sample: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0, np.int64))  # rows, evenly spaced
    sample_lengths: np.ndarray[Any, Any] = field(default_factory=lambda: np.empty(0, np.int64))


_FLAGS = {"non-finite": FLAG_NON_FINITE, "missing": FLAG_MISSING, "saturated": FLAG_SATURATED}


def summarize(dataset: GradientDataset, progress: Callable[[int], None] | None = None) -> Summary:
    """Read every row table once; ``progress`` is called with the number of rows just read."""
    kinds = {point: dataset.column(point).of for point in dataset.points}
    first = "grad" if "grad" in kinds.values() else next(iter(kinds.values()))
    ranked = [point for point, kind in kinds.items() if kind == first]
    summary = Summary({point: Norms() for point in dataset.points}, ranked, n_rows=len(dataset))
    sample = np.unique(np.linspace(0, max(len(dataset) - 1, 0), SAMPLED_ROWS, dtype=np.int64))[: len(dataset)]
    lengths: list[np.ndarray[Any, Any]] = []
    start = 0
    for k, unit in enumerate(dataset.units):
        table = dataset.examples.table(k)
        _add(summary, table, start, dataset.points)
        there = sample[(sample >= start) & (sample < start + len(unit))] - start
        lengths.append(table.column("length").to_numpy()[there])
        start += len(unit)
        if progress is not None:
            progress(len(unit))
    summary.largest.sort(reverse=True)
    summary.sample = sample
    summary.sample_lengths = np.concatenate([np.empty(0, np.int64), *lengths])
    return summary


def _add(summary: Summary, table: Any, first: int, points: Sequence[str]) -> None:
    flags = table.column("flags").to_numpy()
    for name, bit in _FLAGS.items():
        summary.flags[name] += int(np.count_nonzero(flags & bit))
    summary.n_tokens += int(table.column("length").to_numpy().sum(dtype=np.int64))
    norms = np.stack([table.column(NORM + point).to_numpy() for point in points])  # [points, rows]
    for point, row in zip(points, norms, strict=True):
        summary.norms[point].add(row)
    place = {point: number for number, point in enumerate(points)}
    of_rank = norms[[place[point] for point in summary.ranked]]
    with np.errstate(all="ignore"):
        together = np.sqrt(np.square(of_rank, dtype=np.float64).sum(0))
    finite = np.isfinite(norms).all(0) & (flags & FLAG_NON_FINITE == 0)
    ranked = np.where(finite, together, -1.0)
    for local in np.argsort(-ranked, kind="stable")[:SHOWN_LARGEST].tolist():
        if ranked[local] > (summary.largest[0].norm if len(summary.largest) == SHOWN_LARGEST else 0.0):
            point = summary.ranked[int(of_rank[:, local].argmax())]
            found = LargeRow(float(ranked[local]), first + local, point, _example(table, local))
            (heapq.heappushpop if len(summary.largest) == SHOWN_LARGEST else heapq.heappush)(summary.largest, found)
    for local in np.flatnonzero(~finite)[: SHOWN_BAD - len(summary.bad)].tolist():
        where = [point for point, norm in zip(points, norms[:, local], strict=True) if not np.isfinite(norm)]
        summary.bad.append(_example(table, local) | {"points": where})


def _example(table: Any, local: int) -> dict[str, Any]:
    keys = ("id", "input_ids", "source", "start", "length")
    found: dict[str, Any] = table.select(keys).slice(local, 1).to_pylist()[0]
    return found
