"""The command line: `tlfast COMMAND ...`, the same as `python -m tlfast`; a table of the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from . import __version__
from .commands.arguments import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    NO_READER,
    OK,
    complain,
    nearest,
)
from .errors import broken_rule

USAGE = """usage: tlfast COMMAND ...

  collect --model M --text T ... --points GLOB ... --out DIR   gradients of a model on text, into a dataset
  collect --model M --dataset D --column C ... [--dry-run]     the same of the records of a data set
  collect DIR/config.yaml [...]                                complete a dataset, or replay it with --out
  points MODEL [GLOB ...]                                      the points of a model: names, classes, shapes
  info DIR [--json]                                            what is inside a dataset
  verify DIR [--repair]                                        re-read every byte against its checksum
  export DIR --to FORMAT [--out PATH] [--points GLOB ...]      parquet, arrow, npy, hf, lance or bergson
  import-bergson INDEX DIR                                     an index that bergson built, as a dataset
  report DIR [--out PAGE] [--found FILE]                       a page of figures and charts, for a browser
  score DIR --queries DIR [--method NAME] [--out FILE]         the rows nearest to those of another dataset
  score MODEL --text T ... --queries T --points GLOB ...       the same of texts through a model, with no row stored
  factors MODEL --text T ... --out FILE [--kinds KIND ...]     factors of the curvature, of which no row is kept
  search DIR TEXT [--method NAME] [--top K]                    the examples nearest to a text
  push DIR USER/NAME [--private]                               to the Hugging Face hub
  pull USER/NAME DIR                                           from the Hugging Face hub
  doctor                                                       what runs here, and what is missing

`tlfast COMMAND --help` says more of a command."""

# Each command's module, imported when it is called: the others need other libraries, and --help none.
COMMANDS = {
    "collect": "collecting",
    "points": "listing",
    "info": "inspecting",
    "verify": "inspecting",
    "export": "sharing",
    "import-bergson": "sharing",
    "report": "sharing",
    "score": "scoring",
    "search": "scoring",
    "factors": "factoring",
    "push": "sharing",
    "pull": "sharing",
    "doctor": "inspecting",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 well, 1 failed, 2 bad input, 130 interrupted, 141 nobody reads, 143 terminated.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(args)
        finally:
            sys.stdout.flush()  # here, where a reader that is gone can still be met in silence
    except BrokenPipeError:  # `tlfast doctor | head -1`
        # What Python flushes at its end must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if args else sys.stderr)
        return OK if args else BAD_INPUT
    if args[0] == "--version":
        print(f"tlfast {__version__}")
        return OK
    if args[0] not in COMMANDS:
        rule = f"be one of {', '.join(COMMANDS)}"
        remedy = nearest(args[0], [*COMMANDS, "--help", "--version"], "See tlfast --help.")
        return complain(broken_rule("tlfast", "command", rule, repr(args[0]), remedy), BAD_INPUT)
    try:
        command: Callable[[list[str]], int] = getattr(
            import_module(f"tlfast.commands.{COMMANDS[args[0]]}"), args[0].replace("-", "_")
        )
        return command(args[1:])
    except (ValueError, TypeError, ImportError) as error:
        return complain(str(error), BAD_INPUT)
    except BrokenPipeError:
        raise
    except OSError as error:
        return complain(f"tlfast {args[0]}: {error}", FAILED)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
