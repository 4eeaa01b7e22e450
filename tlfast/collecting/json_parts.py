"""JSON objects, one at a time, out of a line or a long file; a key that comes twice with two values is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

TWO_VALUES = " twice, with two values"  # how the reason ends for which such an object is left out
_CHARACTERS = 1 << 20  # of a file that are read together


class _Text:
    """The values in a file of JSON, one behind the other, of which no more than one is held."""

    def __init__(self, file: TextIO, decoder: json.JSONDecoder) -> None:
        self._file, self._decoder = file, decoder
        self._text, self._at = file.read(_CHARACTERS), 0

    def _more(self) -> bool:
        found = self._file.read(max(_CHARACTERS, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + found, 0
        return bool(found)

    def next(self) -> str:
        """The next character that is no space, which stays; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, signs: str) -> str:
        """Take one of these characters, and return it; ValueError for another."""
        found = self.next()
        if not found or found not in signs:
            raise json.JSONDecodeError(f"Expecting {' or '.join(map(repr, signs))}", self._text, self._at)
        self._at += 1
        return found

    def value(self) -> Any:
        """Take a value."""
        self.next()
        while True:
            start = self._at
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # A number may go on.
            whole = self._text[end - 1] in '"]}' or self._text[end : end + 1] in tuple(" \t\r\n,]}")
            if whole or not self._more():
                break
        self._at = end if whole else self._at + end - start
        return found

    def items(self) -> Iterator[Any]:
        """Take a list, and yield its items; whoever asks for the next one has had this one."""
        self.take("[")
        if self.next() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """Take an object, and yield its keys; whoever gets one must take its value."""
        self.take("{")
        if self.next() == "}":
            self.take("}")
            return
        while True:
            if self.next() != '"':
                raise json.JSONDecodeError("Expecting a key", self._text, self._at)
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        """ValueError where there is more."""
        if self.next():
            raise json.JSONDecodeError("Extra data", self._text, self._at)


class Decoder:
    """Decodes JSON; ``twice`` is a key that the last object had with two values, "" for none.

    Args:
        strict: notice such keys; else the last value counts in silence.
    """

    def __init__(self, strict: bool = True) -> None:
        self.twice, self._strict = "", strict
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and self._strict:
            self.twice = next((key for key, value in pairs if made[key] != value), self.twice)
        return made

    def one(self, text: str) -> Any:
        """The value that a text is."""
        self.twice = ""
        return self._decoder.decode(text)

    def records(self, file: TextIO) -> Iterator[Any]:
        """The objects of a file that is a list of them, or an object of whose values one is such a list.

        What is neither gives None, a list behind the objects that it has before something else. The file is read twice
        where it is an object, since another list may follow.

        Raises:
            ValueError: for what is no JSON; behind what was yielded before.
        """
        text = _Text(file, self._decoder)
        if text.next() == "[":
            yield from self._items(text)
            text.end()
            return
        number = _list_of_objects(file)
        if number is None:
            yield None
            return
        file.seek(0)
        text = _Text(file, self._decoder)
        for k, _ in enumerate(text.members()):
            if k == number:
                yield from self._items(text)
                return
            text.value()

    def _items(self, text: _Text) -> Iterator[Any]:
        self.twice = ""
        for value in text.items():
            yield value if isinstance(value, dict) else None
            self.twice = ""


def _list_of_objects(file: TextIO) -> int | None:
    """Which value of the object in a file is a list of objects; None where none is, or several, or it is no object.

    Of several values for one key the last counts.
    """
    file.seek(0)
    text = _Text(file, json.JSONDecoder())
    if text.next() != "{":
        text.value()
        text.end()
        return None
    found: dict[str, int | None] = {}
    for k, key in enumerate(text.members()):
        if text.next() == "[":
            kinds = {isinstance(value, dict) for value in text.items()}
            found[key] = k if kinds == {True} else None
        else:
            text.value()
            found[key] = None
    text.end()
    lists = [k for k in found.values() if k is not None]
    return lists[0] if len(lists) == 1 else None
