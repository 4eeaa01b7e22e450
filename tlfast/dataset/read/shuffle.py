"""In which order rows come in an epoch: blocks of rows shuffled, several blocks mixed, cut into equal shares."""

from __future__ import annotations

from collections.abc import Iterator
from operator import index
from typing import Any, NamedTuple

import numpy as np

from ...errors import broken_rule

Array = np.ndarray[Any, Any]

_GOLDEN = 0x9E3779B97F4A7C15  # the constants of SplitMix64 (Steele, Lea and Flood 2014)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permutation(n: int, *key: int) -> Array:
    """Return 0..n-1 (int64) in the random order that belongs to a key.

    By sorting hashes and not by numpy's or torch's generators: those may change with a version, and a run that is
    resumed then would see rows twice.
    """
    state = 0
    for part in key:
        state = int(_mix(np.array([(state ^ part) & (2**64 - 1)], np.uint64))[0])
    return np.argsort(_mix(np.arange(n, dtype=np.uint64) + np.uint64(state)), kind="stable")


def check_seed(who: str, seed: Any) -> int:
    """Return a seed as an int; TypeError or ValueError for what is none, or would give the order of another seed."""
    try:
        value = index(seed)
    except TypeError:
        raise TypeError(broken_rule(who, "seed", "be an int", repr(seed), "Give a whole number.")) from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(broken_rule(who, "seed", "be in -2**63..2**63-1", value, "Give one of 64 bits."))
    return value


def _mix(values: Array) -> Array:
    """SplitMix64's output function of each value."""
    z = values * np.uint64(_GOLDEN) + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: Array = z ^ (z >> np.uint64(31))
    return mixed


class Group(NamedTuple):
    """Blocks that are in memory together: their rows ``starts[i]`` up to ``stops[i]``, and the order of them all."""

    starts: Array
    stops: Array
    order: Array  # of the rows of all blocks behind each other


def share(n: int, part: int, parts: int) -> tuple[int, int]:
    """Return the bounds of one of ``parts`` shares of 0..n-1: of nearly equal sizes, together all."""
    return n * part // parts, n * (part + 1) // parts


class Blocks(NamedTuple):
    """Rows of a dataset cut into blocks of up to ``rows`` of them, none across two units."""

    starts: Array  # int64 [blocks]
    stops: Array

    @classmethod
    def cut(cls, unit_starts: Array, unit_stops: Array, rows: int) -> Blocks:
        """Cut units, given by where their rows start and stop."""
        per_unit = -(-(unit_stops - unit_starts) // rows)
        unit = np.repeat(np.arange(len(per_unit)), per_unit)
        number = np.arange(len(unit)) - np.repeat(np.cumsum(per_unit) - per_unit, per_unit)
        starts = unit_starts[unit] + number * rows
        return cls(starts, np.minimum(starts + rows, unit_stops[unit]))

    def groups(self, start: int, stop: int, mixed: int, key: tuple[int, ...] | None) -> Iterator[Group]:
        """Yield the groups that make up positions ``start`` to ``stop`` of all rows in their order; None: as they lie.

        The order of the rows depends on where shares begin, and a block that lies across a border is cut.
        """
        order = np.arange(len(self.starts)) if key is None else permutation(len(self.starts), *key)
        starts, stops = self.starts[order], self.stops[order]
        ends = np.cumsum(stops - starts)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right") if start < stop else (0, -1)
        for begin in range(int(first), int(last) + 1, mixed):
            some = slice(begin, min(begin + mixed, int(last) + 1))
            low = starts[some] + np.maximum(0, start - (ends[some] - (stops - starts)[some]))
            high = stops[some] - np.maximum(0, ends[some] - stop)
            n = int((high - low).sum())
            yield Group(low, high, np.arange(n) if key is None else permutation(n, *key, begin, start))
