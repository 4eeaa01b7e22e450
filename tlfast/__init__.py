"""tlfast: capture gradients inside the backward pass, reduce and store them, at the speed of the backward pass."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .backends.choice import backend, reduce_into
from .collecting.run import collect  # not on demand: the function must win over the module of the same name
from .dataset import open_dataset
from .hooks.capture import attach, capture
from .hooks.captured import Capture
from .hooks.freeze import freeze
from .hooks.graph_step import graph_step
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
