"""JSON objects, one at a time, out of a line or a long list; a key that comes twice with two values is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

_CHARACTERS = 1 << 20  # of a list that are read together


class Decoder:
    """Decodes JSON; ``twice`` is a key that the last object had with two values, "" for none."""

    def __init__(self) -> None:
        self.twice = ""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.twice = next((key for key, value in pairs if made[key] != value), self.twice)
        return made

    def one(self, text: str) -> Any:
        """The value that a text is."""
        self.twice = ""
        return self._decoder.decode(text)

    def items(self, file: TextIO) -> Iterator[Any]:
        """The items of a list that a file holds, which lies at its beginning; all of them objects, but maybe the last.

        Raises:
            ValueError: for what is no JSON; behind what was yielded before.
        """
        text, at = file.read(_CHARACTERS), 0

        def more() -> bool:
            nonlocal text, at
            found = file.read(max(_CHARACTERS, len(text) - at))
            text, at = text[at:] + found, 0
            return bool(found)

        def skip_space() -> str:
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n":
                    at += 1
                if at < len(text) or not more():
                    return text[at : at + 1]

        if skip_space() != "[":
            raise ValueError("no list")
        at += 1
        while (first := skip_space()) == "{":
            self.twice = ""
            while True:
                try:
                    value, at = self._decoder.raw_decode(text, at)
                    break
                except json.JSONDecodeError:
                    if not more():
                        raise
            yield value
            if (sign := skip_space()) == "]":
                break
            if sign != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at += 1
        if first != "{":
            yield None  # whatever it is
            return
        at += 1
        if skip_space():
            raise json.JSONDecodeError("Extra data", text, at)
