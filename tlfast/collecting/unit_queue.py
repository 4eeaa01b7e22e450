"""Which units a process does, and in which order: its own share first, then what the others have left."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

from ..dataset.format.plan import Unit
from ..errors import broken_rule

_RANGE = re.compile(r"(-?\d{1,18})?:(-?\d{1,18})?", re.ASCII)
LOOK_EVERY_S = 10.0  # a unit takes a minute; a look takes 10 ms where there are 10,000 commits
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True)
class Share:
    """Process ``index`` of ``count`` that collect the same dataset, each for itself.

    They agree on nothing and hear nothing of each other: a unit that has a commit is left out, and where two do the
    same one, the first commit wins. Which process does a unit changes no byte of it.

    Raises:
        ValueError: unless 0 <= index < count.

    Example:
        >>> from tlfast.dataset import Plan
        >>> from tlfast.collecting.unit_queue import Share
        >>> [unit.name for unit in Share(1, 3).ordered(Plan(9, 1).units)[:3]]
        ['u000001', 'u000004', 'u000007']
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not (type(self.index) is type(self.count) is int and 0 <= self.index < self.count):
            rule = "be (index, count), ints with 0 <= index < count"
            got = f"({self.index!r}, {self.count!r})"
            raise ValueError(broken_rule("collect", "share", rule, got, "Count the processes from 0."))

    def ordered(self, units: Iterable[Unit]) -> list[Unit]:
        """The units in the order in which this process looks at them.

        Its own come first, rising: those whose number leaves its index when divided by the count, which needs no
        agreement on what is left to do. The others come in a random order that is each process's own: so the share of
        one that died is spread over all that live, and two seldom meet.
        """

        def key(unit: Unit) -> tuple[bool, int]:
            number = int(unit.name[1:])
            own = number % self.count == self.index
            return not own, number if own else crc32(b"%d %d" % (number, self.index))

        return sorted(units, key=key)

    def __str__(self) -> str:
        return "" if self.count == 1 else f"rank {self.index} of {self.count}: "


class Todo:
    """The units that one process takes, one after the other, until none of those asked for is left.

    Args:
        units: those that are asked for and had no commit at the start.
        share: this process's.
        committed: looks up the names of the units that are committed by now, by whomever; called before each unit.
        clock: seconds.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        share: Share,
        committed: Callable[[], set[str]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.taken: list[Unit] = []
        self.n_rows_elsewhere = 0  # rows of these units that other processes have committed
        self._units = {unit.name: unit for unit in units}
        self._order = [unit.name for unit in share.ordered(self._units.values())]
        self._committed = committed
        self._done: set[str] = set()  # those that are committed, and those taken
        self._clock, self._looked = clock, clock()

    def __iter__(self) -> Iterator[Unit]:
        for name in self._order:
            if name not in self._done:
                self._look()
            if name not in self._done:
                self._done.add(name)
                self.taken.append(self._units[name])
                yield self._units[name]
        self._look()

    def overtaken(self) -> bool:
        """Whether another process has committed the unit taken last, which is then not this one's any more.

        Looks at most every ten seconds: ask between batches, and drop the unit.
        """
        if self._clock() - self._looked < LOOK_EVERY_S or self.taken[-1].name not in self._look():
            return False
        self.n_rows_elsewhere += len(self.taken.pop())
        return True

    def _look(self) -> set[str]:
        committed = self._committed()
        for name in self._units.keys() & committed - self._done:
            self._done.add(name)
            self.n_rows_elsewhere += len(self._units[name])
        self._looked = self._clock()
        return committed


def share_of(environment: Mapping[str, str] = os.environ) -> Share:
    """The share that RANK and WORLD_SIZE give a process, as torchrun sets them; all where they are not both set.

    Raises:
        ValueError: if they are no numbers, or RANK isn't below WORLD_SIZE.
    """
    rank, size = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    if not rank or not size:
        return Share()
    if not _NUMBER.fullmatch(rank) or not _NUMBER.fullmatch(size) or int(rank) >= int(size):
        rule = "be numbers with 0 <= RANK < WORLD_SIZE"
        remedy = "Start with torchrun, or unset both."
        raise ValueError(broken_rule("collect", "RANK and WORLD_SIZE", rule, f"{rank!r} and {size!r}", remedy))
    return Share(int(rank), int(size))


def units_in(text: str, n_units: int) -> range:
    """The unit numbers that ``A:B`` means out of ``n_units``, as a Python slice would; "" means all.

    Raises:
        ValueError: for other text, and for a range that ends before it begins.

    Example:
        >>> from tlfast.collecting.unit_queue import units_in
        >>> units_in("100:200", 130), units_in("-2:", 5), units_in("", 5)
        (range(100, 130), range(3, 5), range(0, 5))
    """
    match = _RANGE.fullmatch(str(text) or ":")
    if match is None:
        rule = "be A:B, numbers of units as in a Python slice"
        raise ValueError(broken_rule("collect", "units", rule, repr(text), "Say 0:100, 100: or :-1."))
    first, last = (None if part is None else int(part) for part in match.groups())
    if first is not None and last is not None and (first < 0) == (last < 0) and first > last:
        raise ValueError(broken_rule("collect", "units", "end after it begins", repr(text), "B itself is left out."))
    return range(*slice(first, last).indices(n_units))
