"""The taps of a cached run, with what they keep; the next run of the same points takes them again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backends.interface import Backend, Change
from ..hooks.attachment import CachingHooks, ModuleCall, caching_hook, caching_id
from .handles import CheckedCacheHook, ListedTap
from .names import conversion_of
from .theirs import OF_POINTS

_SETS_OF_A_MODEL = 4  # of points and settings, those used last


class CachingTaps:
    """One tap for each point, their cache, and their hooks.

    A run of a model with a hundred points makes a thousand small objects, which costs half of what the run costs above
    the plain one. What it left in a graph fires nothing in a later run: `Backwards.open` counts them.

    Args:
        engine: the backend.
        points, names: where they are, and the name of each one.
        selects: what makes of a tensor what is kept of it, for each point; None keeps all of it.
        calls: "sum" or "last".
        lists: of each point, those in which its tap is listed: see `ListedTap`.
    """

    def __init__(
        self, engine: Backend, points: Sequence[Any], names: Sequence[str], selects: Sequence[Change | None],
        calls: str, lists: tuple[str, ...],
    ):  # fmt: skip
        self._engine, self._names, self._lists = engine, names, lists
        self._points = [weakref.ref(point) for point in points]  # a model is not held by what is kept for it
        self.backwards, self.cache = engine.Backwards(engine.Ledger(1), "nan"), engine.TensorCache()
        self._keepers = [
            engine.CacheKeeper(self.cache, name, select, calls) for name, select in zip(names, selects, strict=True)
        ]
        self._id = caching_id(engine)
        self._taps: dict[tuple[int, bool], Any] = {}
        self._hooks: dict[Any, ListedTap] = {}  # by the taps
        self._at_once = self._all_at_once(points) if engine.NAME == "native" else None

    def are_at(self, points: Sequence[Any]) -> bool:
        """Whether they are at these points."""
        return len(points) == len(self._points) and all(
            own() is point for own, point in zip(self._points, points, strict=True)
        )

    def open(self, anchor: torch.Tensor | None) -> None:
        """A run begins."""
        self.cache.clear()
        self.backwards.open(anchor)

    def close(self) -> None:
        """It ends, and nothing is kept of it."""
        self.backwards.close()
        self.cache.clear()

    def tap(self, place: int, convert: _Conversion | None = None) -> Any:
        """The tap of one point, which sees what is made of a tensor there."""
        key = place, convert is not None
        if key not in self._taps:
            self._taps[key] = self._engine.Tap(self.backwards, self._names[place], self._keepers[place], None)
            if convert is not None:
                self._taps[key].set_convert(convert, None)
        return self._taps[key]

    def _all_at_once(self, points: Sequence[Any]) -> Any:
        engine: Any = self._engine
        given = []
        for place, point in enumerate(points):
            handle, converts = self._listed(place, point).handle, conversion_of(point) is not None
            hook = handle.hook.hook
            call = ModuleCall(point, hook, None, engine, holders=1)  # the list that is made here
            given.append((point, handle.hook, hook, call, handle, converts))
        return engine.PointHooks(given, self._id, self._lists, OF_POINTS)

    def _tap_at(self, place: int, point: Any) -> Any:
        return self.tap(place, _Conversion(point) if conversion_of(point) is not None else None)

    def _listed(self, place: int, point: Any) -> ListedTap:
        tap = self._tap_at(place, point)
        if tap not in self._hooks:
            hooks = CachingHooks(caching_hook(tap, self._engine), self._id)
            self._hooks[tap] = ListedTap(hooks, self._lists, permanent=False)
        return self._hooks[tap]

    def put(self) -> Sequence[int]:
        """Put the taps on all points that nobody has hooked, at once; the places of the others."""
        left: Sequence[int] = range(len(self._names)) if self._at_once is None else self._at_once.put()
        return left

    def take_off(self) -> None:
        """Take off what was put."""
        if self._at_once is not None:
            self._at_once.take_off()

    def hook(self, place: int, point: Any) -> ListedTap:
        """Put a tap on its point, behind the hooks that are there."""
        if point._forward_hooks:  # which may put another tensor in the place of the point's
            hooks = CachingHooks(CheckedCacheHook(self._tap_at(place, point)), self._id)
            return ListedTap(hooks, self._lists, permanent=False).hook(point)
        return self._listed(place, point).hook(point)


class _Conversion:
    """What a hook of TransformerLens would see at a point; its taps outlive a run, and don't hold the point."""

    __slots__ = ("_point",)

    def __init__(self, point: Any):
        self._point = weakref.ref(point)

    def __call__(self, tensor: torch.Tensor) -> Any:
        convert = conversion_of(self._point())
        return tensor if convert is None else convert(tensor)


_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, CachingTaps]] = weakref.WeakKeyDictionary()


def take(model: nn.Module, key: Any, points: Sequence[Any]) -> CachingTaps | None:
    """Those that a run of this model has left; nobody else's until they are left again."""
    found = _kept.get(model, {}).pop(key, None)
    return found if found is not None and found.are_at(points) else None


def leave(model: nn.Module, key: Any, taps: CachingTaps) -> None:
    """Leave them for the next run."""
    kept = _kept.setdefault(model, {})
    kept[key] = taps
    if len(kept) > _SETS_OF_A_MODEL:
        del kept[next(iter(kept))]
