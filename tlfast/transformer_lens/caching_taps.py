"""The taps of a cached run, with what they keep; the next run of the same points takes them again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backends.interface import Backend, Change
from ..hooks.attachment import CachingHooks, caching_hook, caching_id
from .handles import CheckedCacheHook, ListedTap
from .names import conversion_of

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
        self._made: dict[int, tuple[Any, ListedTap]] = {}
        self._converted: list[Any] = []

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
        """It ends: nothing is kept of it, nor of what the points are."""
        self.backwards.close()
        self.cache.clear()
        for tap in self._converted:
            tap.set_convert(None, None)
        self._converted.clear()

    def tap(self, place: int) -> Any:
        """Another tap for one point, for hooks that are not those of `hook`."""
        return self._engine.Tap(self.backwards, self._names[place], self._keepers[place], None)

    def hook(self, place: int, point: Any) -> ListedTap:
        """Put a tap on its point."""
        if place not in self._made:
            tap = self.tap(place)
            hooks = CachingHooks(point, caching_hook(tap, self._engine), self._id)
            self._made[place] = tap, ListedTap(point, hooks, self._lists, permanent=False)
        tap, listed = self._made[place]
        self.convert(tap, point)
        return _hooked(listed)

    def hook_behind_others(self, place: int, point: Any) -> ListedTap:
        """Put another tap on a point, behind the hooks that are there, for this run alone."""
        tap = self.tap(place)
        self.convert(tap, point)
        listed = ListedTap(point, CachingHooks(point, CheckedCacheHook(tap), self._id), self._lists, permanent=False)
        return _hooked(listed)

    def convert(self, tap: Any, point: Any) -> None:
        """Let a tap see what a hook of TransformerLens would see at this point."""
        convert = conversion_of(point)
        if convert is not None:
            tap.set_convert(convert, None)
            self._converted.append(tap)


_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, CachingTaps]] = weakref.WeakKeyDictionary()


def _hooked(listed: ListedTap) -> ListedTap:
    listed.handle.hook.register()
    listed.list()
    return listed


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
