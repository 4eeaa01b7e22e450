"""Exit codes, complaints and the arguments of the commands, for all of them alike."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from ..errors import broken_rule

# 128 + the number of the signal, as shells say it: SIGINT, SIGPIPE.
OK, FAILED, BAD_INPUT, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141


def complain(text: str, code: int) -> int:
    """Say what is wrong in one line on stderr; return the exit code."""
    from ..collecting.progress import whole_line  # not above: `tlfast --help` needs no torch

    whole_line(rank() + " ".join(text.split()), sys.stderr)
    return code


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a word that is none of those known: the nearest one, or else ``otherwise``."""
    # Without the dashes, which all flags have in common.
    plain = {name.strip("-").replace("_", "-"): name for name in known}
    near = difflib.get_close_matches(word.partition("=")[0].strip("-").replace("_", "-"), plain, n=1, cutoff=0.5)
    return f"Nearest: {plain[near[0]]}." if near else otherwise


def rank() -> str:
    """What a line begins with where several processes print theirs into one output."""
    from ..collecting.unit_queue import share_of

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
        self._check_given_once(args)
        return self.parse_args(args)

    def _check_given_once(self, args: Sequence[str]) -> None:
        # argparse keeps the last one and says nothing of those before.
        flags = [word.partition("=")[0] for word in args[: args.index("--") if "--" in args else None]]
        for flag, action in self._option_string_actions.items():
            if flags.count(flag) > 1:
                remedy = "Put all its values behind one." if action.nargs == "+" else "Leave one out."
                raise ValueError(broken_rule(self.prog, flag, "be given once", "it twice", remedy))

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        remedy = f"{message.capitalize()}."
        if message.startswith("unrecognized arguments"):
            flag = next((word for word in message.split(": ", 1)[1].split() if word.startswith("-")), "")
            flags = [name for name in self._option_string_actions if name.startswith("--")]
            remedy = nearest(flag, flags, remedy) if flag else remedy
        raise ValueError(broken_rule(self.prog, "the argument", self._rule, self._got, remedy))
