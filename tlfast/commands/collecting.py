"""`tlfast collect`: settings from flags or a file, then the run."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import Any

from .. import __version__
from ..collect_text import collect_text
from ..dataset.errors import extra
from ..ops import backend
from ..settings import CollectSettings, load_settings
from .arguments import INTERRUPTED, OK, complain


def collect(args: list[str]) -> int:
    """Make, or complete, a dataset of a model's gradients on text."""
    print(backend(), flush=True)
    warnings.filterwarnings("ignore", message="tlfast runs in pure Python")  # the line above has said it
    tyro = extra("tyro", "tlfast collect")
    settings: dict[str, Any] = {}
    if args and args[0].endswith((".yaml", ".yml")):
        settings["default"] = load_settings(Path(args.pop(0)))
    wanted = tyro.cli(tyro.conf.FlagCreatePairsOff[CollectSettings], args=args, prog="tlfast collect", **settings)
    try:
        report = collect_text(wanted, f"tlfast {__version__}, {backend()}")
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):  # before the first unit
            raise
        resume = f"tlfast collect {shlex.quote(str(Path(wanted.out) / 'config.yaml'))}"
        return complain(f"interrupted: {interrupt}. To continue: {resume}", INTERRUPTED)
    print(f"{report}: {report.out}")
    return OK
