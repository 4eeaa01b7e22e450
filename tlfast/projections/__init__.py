"""Random projections of gradients, written down for ever in docs/projections.md: the same bits on every machine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .applying import apply, projector
    from .projection import Projection

# A module never has the name of a function here: importing it would put it in the function's place.
_HOMES = {"Projection": "projection", "apply": "applying", "projector": "applying"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["Projection", "apply", "projector"]
