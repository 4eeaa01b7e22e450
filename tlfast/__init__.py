"""tlfast: capture gradients inside the backward pass, reduce and store them, at the speed of the backward pass."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .collect import collect  # not on demand: the function must win over the module of the same name
from .dataset import open_dataset
from .freeze import freeze
from .graphs import graph_step
from .hooks import Capture
from .ops import backend, reduce_into
from .public import attach, capture
from .spec import Spec


def __getattr__(name: str) -> Any:
    """`tlfast.transformer_lens`, imported on request: it needs TransformerLens."""
    if name == "transformer_lens":
        return import_module(f"{__name__}.transformer_lens")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "Capture",
    "Spec",
    "attach",
    "backend",
    "capture",
    "collect",
    "freeze",
    "graph_step",
    "open_dataset",
    "reduce_into",
]
