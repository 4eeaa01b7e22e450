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

    def __init__(self, handles: list[Any]):
        self.handles = handles
        self.id = handles[-1].id  # as a RemovableHandle has it

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class PointHandle:
    """A tap on a hook point, in the eyes of TransformerLens a backward hook: components look there for their path."""

    def __init__(
        self, point: Any, tap: Any, attach: str, native: ModuleType | None, *, permanent: bool, level: int | None = None
    ):
        convert = conversion_of(point)
        if convert is not None:
            tap.set_convert(convert)
        self.point = point
        self.listed = lens_handle(TapHandle(hook_module(point, tap, attach, native)), permanent, level)
        point.bwd_hooks.append(self.listed)

    def remove(self) -> None:
        """Take exactly this one away; by identity, since handles compare by value."""
        self.listed.hook.remove()
        listed = self.point.bwd_hooks  # TransformerLens replaces the list when it removes hooks
        for index, handle in enumerate(listed):
            if handle is self.listed:
                del listed[index]
                break
