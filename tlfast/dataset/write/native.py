"""The one door to the native writer of units, tlfast._disk: there is no torch that it must fit."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

from ...backends import choice
from ...errors import broken_rule


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """Import the native module; (None, why) when it is missing."""
    try:
        from ... import _disk
    except ImportError as error:
        # A module that is there and can't be loaded has a reason of its own.
        missing = importlib.util.find_spec("tlfast._disk") is None
        return None, choice.build_reason() if missing else f"{type(error).__name__}: {error}"
    return _disk, ""


def loaded() -> ModuleType | None:
    """The native module or None, without a word."""
    return _load()[0]


def writer() -> str:
    """What writes the rows of a unit, and why: ``native (crc32c by sse4.2)``, ``python: <reason>``."""
    module, reason = _load()
    return f"python: {reason}" if module is None else f"native (crc32c by {module.crc32c_name()})"


def pick_writer(who: str, wanted: str) -> ModuleType | None:
    """The native module if ``wanted`` ("auto", "native", "python") allows it, else None after one warning.

    Raises:
        RuntimeError: if it can't be used, and must be: by ``wanted``, or by TLFAST_REQUIRE_NATIVE=1.
    """
    if wanted == "python":
        return None
    module, reason = _load()
    if module is None and wanted == "native":
        raise RuntimeError(broken_rule(who, "backend", "be usable", f"native: {reason}", 'Pass backend="auto".'))
    if module is None:
        choice.tell(reason, "runs" if choice.loaded() is None else "writes")
    return module
