"""Patterns of dotted names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TOKENS = re.compile(r"\*\*|\*|\?|\[[^\]]+\]|[^*?\[]+|\[")


def glob_to_regex(glob: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within one part of a dotted name, ``**`` crosses dots, ``[...]`` is a character class."""
    out = ""
    for token in _TOKENS.findall(glob):
        if token == "**":
            out += ".*"
        elif token == "*":
            out += r"[^.]*"
        elif token == "?":
            out += r"[^.]"
        elif _is_class(token):
            out += token.replace("[!", "[^")
        else:
            out += re.escape(token)
    return re.compile(out)


def is_glob(name: str) -> bool:
    """Whether a name holds wildcards."""
    return any(c in name for c in "*?[")


class ForeignGlob:
    """A glob that a file says, matched in time that grows with the lengths of both alone, whatever they are.

    Raises:
        ValueError: for a character class that is none.

    Example:
        >>> from tlfast.globs import ForeignGlob
        >>> [ForeignGlob("h.*.mlp").matches(name) for name in ("h.3.mlp", "h.3.attn.mlp")]
        [True, False]
    """

    def __init__(self, glob: str) -> None:
        self._steps = list[str | re.Pattern[str]]()  # a star, "?", a class, or one character in brackets
        for token in _TOKENS.findall(glob):
            if token in ("*", "**", "?"):
                self._steps.append(token)
            elif _is_class(token):
                try:
                    self._steps.append(re.compile(token.replace("[!", "[^")))
                except re.error as error:
                    raise ValueError(str(error)) from error
            else:
                self._steps += [f"[{c}]" for c in token]

    def matches(self, name: str) -> bool:
        """Whether it means a name."""
        places = self._skipping({0})
        for c in name:
            places = self._skipping(after for place in places for after in self._taking(place, c))
        return len(self._steps) in places

    def _taking(self, place: int, c: str) -> list[int]:
        """Where one is behind a character."""
        if place == len(self._steps):
            return []
        step = self._steps[place]
        if isinstance(step, re.Pattern):
            return [place + 1] if step.fullmatch(c) else []
        if step in ("*", "**"):
            return [place] if step == "**" or c != "." else []
        return [place + 1] if (c != "." if step == "?" else step == f"[{c}]") else []

    def _skipping(self, places: Iterable[int]) -> set[int]:
        """These places, and those behind stars, which may stand for nothing."""
        found = set(places)
        for place in sorted(found):
            while place < len(self._steps) and self._steps[place] in ("*", "**"):
                place += 1
                found.add(place)
        return found


def _is_class(token: str) -> bool:
    return token.startswith("[") and token.endswith("]") and len(token) > 2
