"""`tlfast collect`: settings from flags or a file, then the run."""

from __future__ import annotations

import os
import shlex
import warnings
from pathlib import Path
from typing import Any

from .. import __version__
from ..collect_text import collect_text
from ..dataset.errors import extra
from ..ops import backend
from ..settings import CollectSettings, load_settings
from ..stopping import LeaveAtOnce, Terminated
from .arguments import FAILED, INTERRUPTED, OK, complain


def collect(args: list[str]) -> int:
    """Make, or complete, a dataset of a model's gradients on text."""
    print(backend(), flush=True)
    warnings.filterwarnings("ignore", message="tlfast runs in pure Python")  # the line above has said it
    tyro = extra("tyro", "tlfast collect")
    settings: dict[str, Any] = {}
    if args and args[0].endswith((".yaml", ".yml")):
        settings["default"] = load_settings(Path(args.pop(0)))
    wanted = tyro.cli(tyro.conf.FlagCreatePairsOff[CollectSettings], args=args, prog="tlfast collect", **settings)
    config = Path(wanted.out) / "config.yaml"
    resume = f"To continue: tlfast collect {shlex.quote(str(config))}"
    try:
        report = collect_text(wanted, f"tlfast {__version__}, {backend()}")
    except (OSError, FloatingPointError) as error:
        if not config.exists():
            raise
        return complain(f"tlfast collect: {error}. {resume}", FAILED)
    except Terminated as stop:
        return complain(f"terminated: {stop}. {resume}", Terminated.CODE)
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):  # before the first unit
            raise
        complain(f"interrupted: {interrupt}. {resume}", INTERRUPTED)
        if isinstance(interrupt, LeaveAtOnce):
            os._exit(INTERRUPTED)  # no end of the interpreter under a thread that writes
        return INTERRUPTED
    print(f"{report}: {report.out}")
    return OK
