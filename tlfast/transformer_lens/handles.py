"""Put a tap on a hook point so that TransformerLens sees it: a LensHandle among the point's backward hooks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..attachment import hook_module
from .library import lens_handle
from .names import conversion_of


class TapHandle:
    """Takes a tap's hooks off; what TransformerLens calls where it resets hooks.

    A backward whose forward ran before still reaches the tap, as it does a full backward hook that is removed.
    """

    def __init__(self, module: Any, tap: Any, attach: str, native: ModuleType | None):
        self._handles = hook_module(module, tap, attach, native)
        self.id = self._handles[-1].id  # as a RemovableHandle has it

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def convert_at(point: Any, tap: Any) -> None:
    """Let a tap see what a hook of TransformerLens would see at this point."""
    convert = conversion_of(point)
    if convert is not None:
        tap.set_convert(convert)


class ListedTap:
    """A tap's handle in `bwd_hooks` of its point, where TransformerLens' components look to choose their path."""

    __slots__ = ("handle", "point")

    def __init__(self, point: Any, handle: Any, permanent: bool):
        self.point, self.handle = point, lens_handle(handle, permanent, None)
        point.bwd_hooks.append(self.handle)

    def remove(self) -> None:
        """Take exactly this one away: by identity, since handles compare by value."""
        self.handle.hook.remove()
        listed = self.point.bwd_hooks  # TransformerLens replaces the list when it removes hooks
        if listed and listed[-1] is self.handle:
            listed.pop()
        else:
            listed[:] = [handle for handle in listed if handle is not self.handle]
