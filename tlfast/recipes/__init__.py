"""Studies that are made of gradients, each a function: attribution patching, edges of a circuit, products by pairs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edges import EdgeScores, eap
    from .pairs import Pairs
    from .patching import Attribution, attribution_patching
    from .products import gather_into, outer_into

# A module never has the name of a function here: importing it would put it in the function's place.
_HOMES = {
    "Attribution": "patching",
    "EdgeScores": "edges",
    "Pairs": "pairs",
    "attribution_patching": "patching",
    "eap": "edges",
    "gather_into": "products",
    "outer_into": "products",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Attribution",
    "EdgeScores",
    "Pairs",
    "attribution_patching",
    "eap",
    "gather_into",
    "outer_into",
]
