"""When the units of a dataset were committed: rows per second over the time that the collection ran."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..dataset import GradientDataset

_BINS = 48
_PAUSE = 10  # a gap so many times the median one, and longer than a minute, is a pause and not slow work
_PAUSE_S = 60.0


@dataclass(frozen=True)
class Timeline:
    """Rows per second in equal stretches of working time; ``pauses`` are (working time in s, length in s)."""

    edges_s: np.ndarray[Any, Any]
    rows_per_s: np.ndarray[Any, Any]
    pauses: list[tuple[float, float]]
    n_rows: int

    @property
    def work_s(self) -> float:
        """Seconds of work, pauses left out."""
        return float(self.edges_s[-1])


def commit_times(dataset: GradientDataset) -> list[tuple[float, int]]:
    """Return when each unit was committed (seconds since 1970) and its rows, in time; empty for a remote dataset."""
    if not isinstance(dataset.path, Path):
        return []
    folder = dataset.path / "commits"
    return sorted(((folder / f"{unit.name}.json").stat().st_mtime, len(unit)) for unit in dataset.units)


def timeline(commits: list[tuple[float, int]], created: object = None) -> Timeline | None:
    """Return the rates; None where there are too few commits to tell.

    Args:
        commits: what commit_times returns.
        created: when dataset.json was written, as it says itself.
    """
    start = _seconds(created)
    times = np.array([time for time, _ in commits])
    rows = np.array([n for _, n in commits], dtype=np.float64)
    if start is not None and len(times) and times[0] - 24 * 3600 < start < times[0]:
        times = np.concatenate([[start], times])
    else:
        rows = rows[1:]  # when the first unit was begun, nobody knows
    gaps = np.diff(times)
    if len(gaps) < 2 or times[-1] - times[0] < 1e-3 * len(gaps):  # copied files bear the time of the copy
        return None
    longest = max(_PAUSE * float(np.median(gaps)), _PAUSE_S)
    worked = np.where(gaps > longest, np.median(gaps), gaps)
    ends = np.cumsum(worked)
    pauses = [(float(ends[k] - worked[k]), float(gaps[k])) for k in np.flatnonzero(gaps > longest)]
    edges = np.linspace(0.0, ends[-1], min(_BINS, len(gaps)) + 1)
    done = np.interp(edges, np.concatenate([[0.0], ends]), np.concatenate([[0.0], np.cumsum(rows)]))
    return Timeline(edges, np.diff(done) / np.diff(edges), pauses, int(rows.sum()))


def _seconds(created: object) -> float | None:
    try:
        return datetime.fromisoformat(created).timestamp()  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
