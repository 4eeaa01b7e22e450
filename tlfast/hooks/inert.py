"""A hook of ours, and what its copy becomes."""

from __future__ import annotations

from typing import Any


def _inert(*_: object) -> None:
    """What a copied or unpickled hook becomes: a copy of a model carries no capture."""


def _copied() -> Any:
    return _inert


class Hook:
    """A hook of ours: the copy of a hooked model holds `_inert` in its place."""

    def __init__(self, tap: Any):
        self.tap = tap

    def __deepcopy__(self, memo: object) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _copied, ()
