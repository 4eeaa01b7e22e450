"""tlfast: capture gradients inside the backward pass, reduce and store them, at the speed of the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .freeze import freeze
from .hooks import Capture, capture
from .ops import backend, reduce_into
from .spec import Spec

if TYPE_CHECKING:
    from .collect import collect
    from .dataset import open_dataset

__version__ = "0.1.0"
__all__ = ["Capture", "Spec", "backend", "capture", "collect", "freeze", "open_dataset", "reduce_into"]


def __getattr__(name: str) -> Any:
    # What needs an extra is imported when it is used.
    if name == "collect":
        from .collect import collect

        return collect
    if name == "open_dataset":
        from .dataset import open_dataset

        return open_dataset
    raise AttributeError(f"module 'tlfast' has no attribute {name!r}")
