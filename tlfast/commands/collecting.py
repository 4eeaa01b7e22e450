"""`tlfast collect`: settings from flags or a file, then the run."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import Field, fields
from typing import Any

from .. import __version__
from ..backends.choice import backend
from ..collecting.from_text import Collection, collect_text
from ..collecting.progress import whole_line
from ..collecting.ray_cluster import collect_with_ray
from ..collecting.rehearsal import rehearse
from ..collecting.settings import REQUIRED, CollectSettings, load_settings
from ..collecting.signals import LeaveAtOnce, Terminated
from ..dataset.errors import extra
from ..dataset.write.upload import UploadError
from ..errors import broken_rule
from ..hooks.options import words_of
from ..spec import one_of
from .arguments import (
    FAILED,
    INTERRUPTED,
    OK,
    complain,
    nearest,
    rank,
)


def collect(args: list[str]) -> int:
    """Make, or complete, a dataset of a model's gradients on text."""
    wanted = _settings(args)
    whole_line(f"{rank()}{backend()}", sys.stderr)
    warnings.filterwarnings("ignore", message="tlfast runs in pure Python")  # the line above has said it
    if wanted.dry_run:
        return _rehearse(wanted)
    config = os.path.join(wanted.out, "config.yaml")
    resume = f"To continue: tlfast collect {shlex.quote(config)}"
    try:
        run = collect_with_ray if wanted.engine == "ray" else collect_text
        with redirect_stdout(sys.stderr):  # what a model prints is not the answer
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


def _rehearse(wanted: CollectSettings) -> int:
    """Show what would be done."""
    if wanted.engine == "ray":
        remedy = "Without it the same is shown, for one process."
        raise _wrong("--dry-run", "stand without --engine ray", "both", remedy)
    with redirect_stdout(sys.stderr):
        collection = Collection(wanted)
        run = collection.run(wanted, f"tlfast {__version__}", progress=False)
        found = rehearse(run, collection.unused)
    print(found)
    return OK


def _settings(args: list[str]) -> CollectSettings:
    """What the flags say, on top of a config.yaml where the first word names one.

    Raises:
        ValueError: for a flag that there isn't, or a wrong number of values, in one line; tyro would draw a box.
    """
    tyro = extra("tyro", "tlfast collect")
    defaults: dict[str, Any] = {}
    if args and args[0].endswith((".yaml", ".yml")):
        defaults["default"] = load_settings(args[0])
        args = args[1:]
    if not {"-h", "--help"} & set(args):
        _check_flags(args, complete=bool(defaults))
    settings: CollectSettings = tyro.cli(
        tyro.conf.FlagCreatePairsOff[CollectSettings], args=args, prog="tlfast collect", **defaults
    )
    return settings


def _check_flags(args: list[str], complete: bool) -> None:
    known = {"--" + field.name.replace("_", "-"): field for field in fields(CollectSettings)}
    given: dict[str, list[str]] = {}
    flag = ""
    for word in args:
        name, equals, value = word.partition("=")
        if word.startswith("-") and not word[1:2].isdigit():
            flag = name.replace("_", "-")
            if flag not in known:
                remedy = nearest(flag, known, "See tlfast collect --help.")
                raise _wrong("the flag", "be one of tlfast collect", name, remedy)
            if flag in given:
                raise _wrong(flag, "be given once", "it twice", "Put all its values behind one.")
            given[flag] = [value] if equals else []
        elif not flag:
            remedy = "Begin with a flag, or with DIR/config.yaml."
            raise _wrong("the first word", "be a flag", repr(word), remedy)
        else:
            given[flag].append(word)
    for flag, words in given.items():
        _check_values(flag, known[flag], words)
    absent = [f"--{name}" for name in REQUIRED if f"--{name}" not in given]
    if "--dataset" in given and "--text" in absent:
        absent.remove("--text")
    if absent and not complete:
        raise _wrong(
            "the flags", f"hold {', '.join(absent)}", "others" if given else "none", "See tlfast collect --help."
        )


def _check_values(flag: str, field: Field[Any], words: list[str]) -> None:
    words_known = words_of(CollectSettings).get(field.name)
    kind = "str" if words_known else str(field.type)
    got = " ".join(words) or "nothing"
    if kind == "bool" and words:
        raise _wrong(flag, "stand alone", got, "Leave the value out; without the flag it is off.")
    if kind.startswith("tuple") and not words:
        raise _wrong(flag, "have values", got, "Put them behind it.")
    if kind in ("str", "int", "float") and len(words) != 1:
        raise _wrong(flag, "have one value", got, "Quote one that has spaces." if words else "Put it behind the flag.")
    if words_known:
        one_of("collect", field.name, words[0], words_known)
    if kind in ("int", "float"):
        try:
            (int if kind == "int" else float)(words[0])
        except ValueError:
            rule = "be a whole number" if kind == "int" else "be a number"
            raise _wrong(flag, rule, repr(words[0]), "Correct it.") from None


def _wrong(argument: str, rule: str, got: str, remedy: str) -> ValueError:
    return ValueError(broken_rule("tlfast collect", argument, rule, got, remedy))
