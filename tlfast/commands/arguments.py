"""Exit codes, complaints and the arguments of the commands, for all of them alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import broken_rule
from ..progress import whole_line
from ..shares import share_of

# 128 + the number of the signal, as shells say it: SIGINT, SIGPIPE.
OK, FAILED, BAD_INPUT, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141


def complain(text: str, code: int) -> int:
    """Say what is wrong in one line on stderr; return the exit code."""
    whole_line(rank() + " ".join(text.split()), sys.stderr)
    return code


def rank() -> str:
    """What a line begins with where several processes print theirs into one output."""
    try:
        return str(share_of())
    except ValueError:  # `collect` complains of it
        return ""


class Arguments(argparse.ArgumentParser):
    """The arguments of one command on a dataset folder; a wrong one is a ValueError in the words of the house."""

    def __init__(self, command: str, description: str, argument: str = "one dataset folder") -> None:
        super().__init__(f"tlfast {command}", description=description, allow_abbrev=False)
        self._rule = f"be {argument}"

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse the words behind the command."""
        self._got = " ".join(args) or "nothing"
        return self.parse_args(args)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ValueError(broken_rule(self.prog, "the argument", self._rule, self._got, f"{message.capitalize()}."))


def one_folder(command: str, description: str, args: Sequence[str]) -> str:
    """Return the only argument of a command that takes a dataset's folder and nothing else."""
    arguments = Arguments(command, description)
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder")
    return str(arguments.read(args).dir)
