"""When the units of a dataset were committed: rows per second over the time that the collection ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..dataset import GradientDataset
from ..dataset.format import extension

_BINS = 48
# A gap so many times the usual one for its rows, and longer than a process takes to start, is a pause, not slow work.
_PAUSE = 10
_PAUSE_S = 10.0


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


def extension_times(dataset: GradientDataset) -> list[float]:
    """Return when the dataset was extended, each time at the beginning of a run; empty for a remote dataset."""
    if not isinstance(dataset.path, Path):
        return []
    return sorted(path.stat().st_mtime for path in (dataset.path / extension.FOLDER).glob("x*.json"))


def timeline(commits: list[tuple[float, int]], created: object = None, begun: Sequence[float] = ()) -> Timeline | None:
    """Return the rates; None where there are too few commits to tell.

    Where a run began is known of extensions. Of one that goes on with what another has left, it shows in a gap: what is
    usual is then what the quickest quarter of the units took for a row, so that it shows also where units are few.

    Args:
        commits: what commit_times returns.
        created: when dataset.json was written, as it says itself.
        begun: when further runs began.
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
    idle = np.zeros_like(gaps)
    for time in begun:
        k = int(np.searchsorted(times, time)) - 1
        if 0 <= k < len(gaps):
            idle[k] = max(idle[k], time - times[k])
    usual = rows * np.quantile((gaps - idle) / rows, 0.25, method="lower")
    paused = gaps - idle > np.maximum(_PAUSE * usual, _PAUSE_S)
    idle[paused] = gaps[paused]
    worked = np.where(paused, usual, gaps - idle)
    ends = np.cumsum(worked)
    pauses = [(float(ends[k] - worked[k]), float(idle[k])) for k in np.flatnonzero(idle)]
    edges = np.linspace(0.0, ends[-1], min(_BINS, len(gaps)) + 1)
    done = np.interp(edges, np.concatenate([[0.0], ends]), np.concatenate([[0.0], np.cumsum(rows)]))
    return Timeline(edges, np.diff(done) / np.diff(edges), pauses, int(rows.sum()))


def _seconds(created: object) -> float | None:
    try:
        return datetime.fromisoformat(created).timestamp()  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
