"""The faster backend of TransformerLens: its captures and caches of gradients, natively, on its own names."""

from __future__ import annotations

from .acceleration import accelerate, install, installed, uninstall
from .caching import cache_fwd_and_bwd, run_with_cache
from .capturing import LensCapture, capture
from .compatibility import check
from .library import library as _library

_library()  # the error that names the extra comes here, and not in the middle of a run
__all__ = [
    "LensCapture",
    "accelerate",
    "cache_fwd_and_bwd",
    "capture",
    "check",
    "install",
    "installed",
    "run_with_cache",
    "uninstall",
]
