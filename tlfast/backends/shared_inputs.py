"""Projections of one input for several modules that read it, made by one product.

Does what csrc/autograd/shared_inputs.cpp does, in plain Python.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .streams import current_stream
from .weight import Weight

_READERS = 16  # of one product: a model whose experts all read one tensor has more
_THREADS = 16  # whose last input is known


class _Seen:
    """One tensor as it was at one moment: not another one at its address, by a weak reference, and unchanged, by its
    version.
    """

    def __init__(self, given: torch.Tensor, n_ended: int):
        self._tensor = weakref.ref(given)
        self._state = self._state_of(given, n_ended)

    def is_(self, given: torch.Tensor, n_ended: int) -> bool:
        return self._tensor() is given and self._state == self._state_of(given, n_ended)

    @staticmethod
    def _state_of(given: torch.Tensor, n_ended: int) -> tuple[object, ...]:
        where = given.data_ptr(), given.shape, given.stride()
        return given._version, *where, current_stream(given.device), n_ended


@dataclass
class _Part:
    reader: Weight
    made: torch.Tensor
    taken: bool


@dataclass
class _Last:
    """What a thread saw last; no other one touches it."""

    seen: _Seen
    parts: list[_Part] = field(default_factory=list)


class SharedInputs:
    """Which weights read one tensor is seen as their modules run. From then on the first of them that runs makes the
    product for all. Where it is seen first, the product is made anew, also what was made of it before: so no number
    depends on what ran earlier.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: list[list[Weight]] = []
        self._last: dict[int, _Last] = {}

    def keep(self, who: str, weight: Weight, given: torch.Tensor, n_ended: int) -> torch.Tensor:
        """What ``weight.keep(who, given)`` gives. ``n_ended``: of the steps; what an earlier one left isn't taken."""
        # What has no version can be changed unseen; what doesn't fit is refused by the weight alone.
        if not weight.shares(given) or given.is_inference():
            return weight.keep(who, given)
        here = threading.get_ident()
        with self._lock:
            last = self._last.pop(here, None)
            if last is None or not last.seen.is_(given, n_ended):
                last = _Last(_Seen(given, n_ended))
            if len(self._last) == _THREADS:
                del self._last[next(iter(self._last))]
            self._last[here] = last
        part = _part_of(last, weight)
        # A module that is called with it once more begins again: it may have been changed behind torch's back.
        if (part is not None and part.taken) or (part is None and len(last.parts) >= _READERS):
            last.parts, part = [], None
        if part is None:
            self._make(weight, given, last)
            part = _part_of(last, weight)
            assert part is not None
        part.taken = True
        return part.made

    def forget(self) -> None:
        """A step of this thread is over, or has failed: let go what was kept to be taken."""
        with self._lock:
            self._last.pop(threading.get_ident(), None)

    def _make(self, weight: Weight, given: torch.Tensor, last: _Last) -> None:
        """Make the parts of all readers of the weight's group, to which those belong for which something was made."""
        with self._lock:
            readers = self._group_with([part.reader for part in last.parts], weight)
        before, last.parts = {id(part.reader): part for part in last.parts}, []
        for reader, made in zip(readers, Weight.keep_for(readers, given), strict=True):
            known = before.get(id(reader))
            if known is not None:
                known.made.data.copy_(made)  # which a call holds: its version is that of what it keeps, and stays
            last.parts.append(known or _Part(reader, made, False))

    def _group_with(self, before: Sequence[Weight], weight: Weight) -> list[Weight]:
        own = next((group for group in self._groups if weight in group), None)
        if own is not None and not before:
            return own
        wanted = list(dict.fromkeys([*before, *(own or [weight])]))
        self._groups = [group for group in self._groups if not any(one in group for one in wanted)]
        self._groups.append(wanted)
        return wanted


def _part_of(last: _Last, weight: Weight) -> _Part | None:
    return next((part for part in last.parts if part.reader is weight), None)
