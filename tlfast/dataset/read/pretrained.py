"""What transformers loads from a folder or the hub, with errors of one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...errors import broken_rule
from ..errors import extra


def from_pretrained(kind: str, name: str, who: str, argument: str, **settings: Any) -> Any:
    """Return ``transformers.<kind>.from_pretrained(name, **settings)``; ValueError where there is no such thing."""
    transformers = extra("transformers", who)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    folder = Path(name).expanduser()
    try:
        return getattr(transformers, kind).from_pretrained(str(folder) if folder.is_dir() else name, **settings)
    except (OSError, ValueError, KeyError, AssertionError) as error:  # what from_pretrained raises, several lines long
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        got = f"{name!r}: {' '.join(lines)[:300]}"
        remedy = "Check the folder, or the name and the connection to the hub."
        raise ValueError(broken_rule(who, argument, f"be loadable as {kind}", got, remedy)) from error
