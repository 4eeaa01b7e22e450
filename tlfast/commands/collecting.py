"""`tlfast collect`: settings from flags or a file, then the run."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from typing import Any

from .. import __version__
from ..collect_text import collect_text
from ..dataset.errors import extra
from ..dataset.upload import UploadError
from ..ops import backend
from ..progress import whole_line
from ..ray_engine import collect_with_ray
from ..settings import CollectSettings, load_settings
from ..stopping import LeaveAtOnce, Terminated
from .arguments import FAILED, INTERRUPTED, OK, complain, rank


def collect(args: list[str]) -> int:
    """Make, or complete, a dataset of a model's gradients on text."""
    whole_line(f"{rank()}{backend()}", sys.stdout)
    warnings.filterwarnings("ignore", message="tlfast runs in pure Python")  # the line above has said it
    tyro = extra("tyro", "tlfast collect")
    settings: dict[str, Any] = {}
    if args and args[0].endswith((".yaml", ".yml")):
        settings["default"] = load_settings(args.pop(0))
    wanted = tyro.cli(tyro.conf.FlagCreatePairsOff[CollectSettings], args=args, prog="tlfast collect", **settings)
    config = os.path.join(wanted.out, "config.yaml")
    resume = f"To continue: tlfast collect {shlex.quote(config)}"
    try:
        run = collect_with_ray if wanted.engine == "ray" else collect_text
        report = run(wanted, f"tlfast {__version__}, {backend()}")
    except FloatingPointError as error:
        return complain(f"{error} {resume}", FAILED)
    except OSError as error:
        if not (os.path.exists(config) or isinstance(error, UploadError)):  # nothing was begun
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
    whole_line(f"{rank()}{report}: {report.out}", sys.stdout)
    return OK
