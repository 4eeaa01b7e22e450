"""The command line: `tlfast collect | info | verify | doctor`, the same as `python -m tlfast`."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .collect_text import collect_text
from .dataset import open_dataset, verify_dataset
from .dataset.errors import extra
from .doctor import diagnose
from .errors import broken_rule
from .ops import backend
from .ray_engine import collect_with_ray
from .settings import CollectSettings, load_settings
from .shares import share_of
from .stopping import LeaveAtOnce, Terminated

USAGE = """usage: tlfast COMMAND ...

  collect --model M --text T ... --points GLOB ... --out DIR   gradients of a model on text, into a dataset
  collect DIR/config.yaml [...]                                complete a dataset, or replay it with --out
  info DIR                                                     what is inside a dataset
  verify DIR                                                   re-read every byte against its checksum
  doctor                                                       what runs here, and what is missing

`tlfast collect --help` lists all settings."""

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # 130 = 128 + SIGINT, as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 well, 1 failed, 2 bad input, 130 interrupted, 143 terminated."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"collect": _collect, "info": _info, "verify": _verify, "doctor": _doctor}
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return OK if args else BAD_INPUT
    if args[0] == "--version":
        print(f"tlfast {__version__}")
        return OK
    if args[0] not in commands:
        rule = f"be one of {', '.join(commands)}"
        return _complain(broken_rule("tlfast", "command", rule, repr(args[0]), "See tlfast --help."), BAD_INPUT)
    try:
        return commands[args[0]](args[1:])
    except (ValueError, TypeError, ImportError) as error:
        return _complain(str(error), BAD_INPUT)
    except (OSError, FloatingPointError) as error:
        return _complain(f"tlfast {args[0]}: {error}", FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)


def _complain(text: str, code: int) -> int:
    print(_rank() + " ".join(text.split()), file=sys.stderr)
    return code


def _rank() -> str:
    """What a line begins with where several processes print theirs into one output."""
    try:
        return str(share_of())
    except ValueError:  # `collect` complains of it
        return ""


def _collect(args: list[str]) -> int:
    print(f"{_rank()}{backend()}", flush=True)
    warnings.filterwarnings("ignore", message="tlfast runs in pure Python")  # the line above has said it
    tyro = extra("tyro", "tlfast collect")
    settings: dict[str, Any] = {}
    if args and args[0].endswith((".yaml", ".yml")):
        settings["default"] = load_settings(Path(args.pop(0)))
    wanted = tyro.cli(tyro.conf.FlagCreatePairsOff[CollectSettings], args=args, prog="tlfast collect", **settings)
    config = Path(wanted.out) / "config.yaml"
    resume = f"To continue: tlfast collect {shlex.quote(str(config))}"
    try:
        run = collect_with_ray if wanted.engine == "ray" else collect_text
        report = run(wanted, f"tlfast {__version__}, {backend()}")
    except (OSError, FloatingPointError) as error:
        if not config.exists():
            raise
        return _complain(f"tlfast collect: {error}. {resume}", FAILED)
    except Terminated as stop:
        return _complain(f"terminated: {stop}. {resume}", Terminated.CODE)
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):  # before the first unit
            raise
        _complain(f"interrupted: {interrupt}. {resume}", INTERRUPTED)
        if isinstance(interrupt, LeaveAtOnce):
            os._exit(INTERRUPTED)  # no end of the interpreter under a thread that writes
        return INTERRUPTED
    print(f"{_rank()}{report}: {report.out}", flush=True)
    return OK


def _folder(command: str, args: list[str]) -> str:
    if len(args) != 1 or args[0].startswith("-"):
        got = " ".join(args) or "nothing"
        raise ValueError(broken_rule(f"tlfast {command}", "the argument", "be one dataset folder", got, "Give DIR."))
    return args[0]


def _info(args: list[str]) -> int:
    ds = open_dataset(_folder("info", args), partial=True)
    info = ds.info()
    header = dict(info["header"])
    absent = info["planned_units"] - info["units"]
    print(f"{info['path']}: {info['rows']} of {info['planned_rows']} rows in {info['units']} units")
    print(f"size          {info['bytes'] / 1e6:.1f} MB, {info['non_finite_rows']} rows with non-finite values")
    if absent:
        print(f"incomplete    {absent} units are missing; `tlfast collect {info['path']}/config.yaml` makes them")
    if isinstance(header.get("examples"), dict) and "skipped" in header["examples"]:
        header["examples"] = header["examples"] | {"skipped": len(ds.skipped)}
    for part in ("model", "tokenizer", "specs", "loss", "batching", "text", "examples", "grad_scale"):
        if part in header:
            print(f"{part:<13} {_line(header[part])}")
    print(f"made          {_line(info['about'])}")
    shapes = [(name, f"{c['dtype']} {[info['rows'], *c['shape']]}") for name, c in info["points"].items()]
    for name, shape in shapes:
        print(f"  {name:<{max(len(name) for name, _ in shapes)}}  {shape}")
    return OK


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list):
        return " ".join(_line(part) for part in value)
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a fingerprint


def _verify(args: list[str]) -> int:
    report = verify_dataset(_folder("verify", args))
    print(report)
    return OK if report.ok else FAILED


def _doctor(args: list[str]) -> int:
    for line in diagnose():
        print(line)
    return OK
