"""The faster backend of TransformerLens: its captures and caches of gradients, natively, on its own names."""

from __future__ import annotations

from .caching import cache_fwd_and_bwd, run_with_cache
from .library import library

library()  # the error that names the extra comes here, and not in the middle of a run
__all__ = ["cache_fwd_and_bwd", "run_with_cache"]
