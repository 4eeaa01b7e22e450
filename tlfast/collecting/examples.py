"""All examples of a collection, read once: tokens and what is kept are spooled, other fields may be fetched again."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..dataset.format.plan import Example
from ..errors import broken_rule
from .fields import (
    BadField,
    FieldRules,
    Fields,
    as_kept,
    as_value,
    digest_of,
    each_told_and_packed,
    is_unicode,
    told_and_packed,
    unpacked,
)
from .items import Item, Reading, Texts, as_tokens
from .skipped import BadExamples, RefusedExamples
from .spool import DIGEST_BYTES, Examples, Spool

_AT_ONCE = 256  # items asked of a data set together


class AskedAgain(ABC):
    """Examples that are made while they are gone through, and of which any may be asked for again, by its number."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    @abstractmethod
    def __getitem__(self, number: int) -> Any: ...

    @abstractmethod
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Spool]]:
        """What is known of all that were made, to be kept: what JSON says of it, and bytes of each by a name."""

    @abstractmethod
    def recall(self, said: Mapping[str, Any], spools: Mapping[str, Spool]) -> bool:
        """Know what `to_parts` has said, without making one; whether what they are made of is still the same."""


class FieldSource:
    """The fields of examples that aren't held in memory, by the number of the example."""

    def __init__(self, rules: FieldRules) -> None:
        self.rules = rules

    def add(self, item: int, part: int, fields: Fields) -> bytes:
        """Know the fields of the next example, which is this part of this item; returns their `digest_of`."""
        raise NotImplementedError

    def fetch(self, numbers: Sequence[int]) -> list[Fields]:
        """The fields of these examples."""
        raise NotImplementedError


class Refetched(FieldSource):
    """Fields that the data give again whenever they are asked, and that must then be the same."""

    NUMBERS = ("items", "parts", "checks")  # what `to_parts` calls them

    def __init__(self, rules: FieldRules, data: Any, reading: Reading) -> None:
        super().__init__(rules)
        self._data, self._reading = data, reading
        self._where = array("q"), array("q")  # item, which example in it
        self._digests = bytearray()
        self._last: tuple[int, list[Item]] = (-1, [])
        self._remedy = "Let nothing random be done to it; or give an iterator, which is read once."

    def add(self, item: int, part: int, fields: Fields) -> bytes:
        digest = digest_of(fields)
        self._where[0].append(item)
        self._where[1].append(part)
        self._digests += digest
        return digest

    def to_parts(self) -> dict[str, array[int] | bytearray]:
        """Where each example is found, and what its fields must be, to be kept."""
        return dict(zip(self.NUMBERS, (*self._where, self._digests), strict=True))

    def recall(self, numbers: Mapping[str, Any]) -> None:
        """Know what `to_parts` has given."""
        items, parts, self._digests = (numbers[name] for name in self.NUMBERS)
        self._where = items, parts
        self._remedy += " Or remove .examples from the folder of the dataset: what a run before has read."

    def gives_again(self, n: int) -> bool:
        """Whether the first and the last of ``n`` examples have the fields that they had."""
        try:
            self.fetch([0, n - 1])
        except Exception:  # whoever reads all of them says what is wrong
            return False
        return True

    def fetch(self, numbers: Sequence[int]) -> list[Fields]:
        places = [(self._where[0][number], self._where[1][number]) for number in numbers]
        wanted = dict.fromkeys(item for item, _ in places if item != self._last[0])
        found = {self._last[0]: self._last[1]}
        for number, given in zip(wanted, _items_of(self._data, list(wanted)), strict=True):
            found[number] = list(self._reading.items(given, f"batches[{number}]"))
            self._last = (number, found[number])
        fetched = []
        for number, (item, part) in zip(numbers, places, strict=True):
            fields = _values(found[item][part].fields) if part < len(found[item]) else {}
            if digest_of(fields) != self._digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]:
                rule, got = "give an example the same fields each time", f"others for example {number}"
                raise ValueError(broken_rule("collect", "batches", rule, got, self._remedy))
            fetched.append(fields)
        return fetched


class Spooled(FieldSource):
    """Fields that were given but once: in a file without a name, which goes with this process, where they are many."""

    def __init__(self, rules: FieldRules, spool: Spool) -> None:
        super().__init__(rules)
        self.spool = spool

    def add(self, item: int, part: int, fields: Fields) -> bytes:
        digest, data = told_and_packed(fields)
        self.spool.add(data)
        return digest

    def add_all(self, name: str, values: Sequence[array[int]]) -> list[bytes]:
        """Know the field of each of the next examples, which have this one, int64 [n]; returns their `digest_of`."""
        digests, data = each_told_and_packed(name, values)
        self.spool.add_all(data)
        return digests

    def fetch(self, numbers: Sequence[int]) -> list[Fields]:
        return [unpacked(self.spool[number]) for number in numbers]


def _values(fields: Mapping[str, Any]) -> Fields:
    return {name: as_value(value, name) for name, value in fields.items()}


@dataclass
class ExampleReader:
    """Reads data: an iterable, a sequence or another data set with a length, or a DataLoader.

    Args:
        bad: takes the examples that can't be used. One that has no source is remembered by its number among all that
            were given: "#17".
        least, longest: tokens of an example; None: any number.
        fields: as `collect` takes them.
        keep: names of the fields that each example keeps for its row table.
        pad_id: the token at padded positions.
        apart: fields that have nothing to do with the positions of ``input_ids``.
        size: of an example without ``input_ids``, in place of its tokens; None: none has one.
        padded: values of several lengths are padded by their names, not by the user's collate=.
        spool_in: where tokens are spooled, and fields that are given once; None: where temporary files lie.
    """

    bad: BadExamples
    least: int = 2
    longest: int | None = None
    fields: Mapping[str, Any] | None = None
    keep: Sequence[str] = ()
    pad_id: int = 0
    apart: frozenset[str] = frozenset()
    size: Callable[[Mapping[str, Any]], int] | None = None
    padded: bool = True
    spool_in: str | os.PathLike[str] | None = None
    sizes: array[int] = field(default_factory=lambda: array("q"))
    source: FieldSource | None = None

    def __post_init__(self) -> None:
        self.examples = Examples(self.spool_in)
        self.rules = FieldRules(self.pad_id, self.apart)

    def read(self, data: Any) -> Examples:
        """List the examples, numbered from 0; their fields are in ``source`` then, where there are any.

        Raises:
            ValueError, TypeError: for data that hold no examples, or an item that is none.
        """
        check_data(data)
        reading = self.reading(data)
        map_style = is_map_style(data)
        again = data if map_style or isinstance(data, AskedAgain) else None
        number = 0
        for k, given in enumerate(_all_items(data) if map_style else data):
            if type(given) is Texts and again is None and self._take_together(given):
                number += len(given)
                continue
            for part, item in enumerate(reading.items(given, f"batches[{k}]")):
                self._take(number, item, (k, part), again, reading)
                number += 1
        if not self.examples:
            got = str(self.bad) if len(self.bad) else "none"
            remedy = "Look at these; fields= says what to take." if len(self.bad) else "Is the iterable used up?"
            raise RefusedExamples(broken_rule("collect", "batches", "hold examples", got, remedy))
        if self.padded:
            self.rules.check(self.keep)
        return self.examples

    def reading(self, data: Any) -> Reading:
        """How the items of these data are read."""
        return Reading(self.fields, self.apart, isinstance(data, DataLoader))

    def _take_together(self, texts: Texts) -> bool:
        """Take examples at once; False, and none of them is taken, where each must be looked at by itself."""
        if self.fields is not None or self.keep or self.size is not None or not len(texts):
            return False
        lengths, tokens = list(map(len, texts.tokens)), [ids.tobytes() for ids in texts.tokens]
        if not (self._fits(min(lengths)) and self._fits(max(lengths))):
            return False
        if np.frombuffer(b"".join(tokens), np.int32).min() < 0:
            return False
        digests: list[bytes] = []
        if texts.labels is None:
            if self.rules.refusal({}, lengths[0]) is not None:
                return False
        else:
            for n, n_tokens in dict.fromkeys(zip(map(len, texts.labels), lengths, strict=True)):
                if self.rules.refusal({"labels": torch.zeros(n, dtype=torch.int64)}, n_tokens) is not None:
                    return False
            self.source = self.source or Spooled(self.rules, Spool(self.spool_in))
            assert isinstance(self.source, Spooled)  # others are of data that give their items again
            digests = self.source.add_all("labels", texts.labels)
        self.examples.add_all(tokens, texts.source, texts.starts, digests)
        return True

    def _take(self, number: int, item: Item, place: tuple[int, int], data: Any, reading: Reading) -> None:
        tokens = None if item.input_ids is None else as_tokens(item.input_ids)
        n = None if tokens is None else len(tokens)
        wrong = None if n is None or self._fits(n) else self._length_refused(n, _named(item, number))
        fields: Fields = {}
        if wrong is None:
            try:
                fields = _values(item.fields)
                if self.keep:
                    self._check_kept_texts(fields)
                reason = self.rules.refusal(fields, n)
            except BadField as error:
                reason = str(error)
            if reason is not None:
                got, remedy = f"{reason}, in {_named(item, number)}", "Correct it, or leave it out."
                wrong = reason, broken_rule("collect", "examples", "have fields that fit each other", got, remedy)
        if wrong is not None:
            self.bad.leave_out(item.source or f"#{number}", item.start, *wrong)
            return
        if fields and self.source is None:
            if data is not None:
                self.source = Refetched(self.rules, data, reading)
            else:
                self.source = Spooled(self.rules, Spool(self.spool_in))
        digest = b"" if self.source is None else self.source.add(*place, fields)
        self._remember(item, tokens, fields, digest, number)

    def _remember(self, item: Item, tokens: Any, fields: Fields, digest: bytes, number: int) -> None:
        for name in self.keep:
            if name not in fields:
                rule, got = f"name fields of the examples ({', '.join(fields) or 'none'})", repr(name)
                raise ValueError(broken_rule("collect", "keep_fields", rule, got, "Leave it out, or give the field."))
        place = _named(item, number) if self.keep else ""
        kept = {name: as_kept(name, fields[name], place) for name in self.keep}
        if self.size is not None:
            self.sizes.append(_size_of(self.size, fields, tokens))
        ids = as_tokens(()) if tokens is None else tokens
        self.examples.add(ids, item.source, item.start, kept, digest)

    def _check_kept_texts(self, fields: Fields) -> None:
        for name in self.keep:
            text = fields.get(name)
            if isinstance(text, str) and not is_unicode(text):
                raise BadField(f"{name} has half of a surrogate pair, which is no text")

    def _fits(self, n: int) -> bool:
        return self.least <= n and (self.longest is None or n <= self.longest)

    def _length_refused(self, n: int, place: str) -> tuple[str, str]:
        """The reason why an example of ``n`` tokens is left out, and the error that this may be."""
        got = f"{n} in {place}"
        if n < self.least:
            remedy = "A single token has no next one; leave it out." if self.least > 1 else "Leave it out."
            s = "s" * (self.least != 1)
            error = broken_rule("collect", "examples", f"have {self.least} token{s} or more", got, remedy)
            return f"{n} token{'s' * (n != 1)}, less than {self.least}", error
        remedy = "Cut the examples, or give a larger seq_len."
        error = broken_rule("collect", "examples", f"have {self.longest} tokens at most", got, remedy)
        return f"{n} tokens, more than {self.longest}", error


def _named(item: Item, number: int) -> str:
    """An example for a message: its number, and where it is from."""
    return f"example {number}" + (f" ({item.source} at {item.start})" if item.source else "")


def _size_of(size: Callable[[Mapping[str, Any]], int], fields: Fields, tokens: Any) -> int:
    if tokens is not None:
        rule, remedy = "be left out where examples have input_ids", "Their size is the number of tokens."
        raise ValueError(broken_rule("collect", "size", rule, "input_ids", remedy))
    n = size(fields)
    if type(n) is not int or n < 1:
        raise ValueError(broken_rule("collect", "size", "return a positive int", repr(n), "Count what takes memory."))
    return n


def check_data(data: Any) -> None:
    """TypeError for one mapping in place of many."""
    if not isinstance(data, Mapping):
        return
    splits = bool(data) and all(hasattr(part, "column_names") for part in data.values())  # a DatasetDict
    got = f"a mapping with {', '.join(map(str, data)) or 'no keys'}"
    remedy = f"Give one of its splits: data[{next(iter(data))!r}]." if splits else "Put it into a list."
    raise TypeError(broken_rule("collect", "batches", "be an iterable of batches", got, remedy))


def is_map_style(data: Any) -> bool:
    """Whether data give any of their items at any time, by its number: a sequence, or a data set with a length."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes))


def _all_items(data: Any) -> Iterator[Any]:
    n = len(data)
    starts = range(0, n, _AT_ONCE)
    return chain.from_iterable(_items_of(data, list(range(start, min(start + _AT_ONCE, n)))) for start in starts)


def _items_of(data: Any, numbers: list[int]) -> Iterable[Any]:
    """These items; of a data set that can, together: a Hugging Face one reads its table once then."""
    together = getattr(data, "__getitems__", None)
    items: Iterable[Any] = together(numbers) if callable(together) and numbers else map(data.__getitem__, numbers)
    return items


def as_examples(batches: Iterable[Any], bad: BadExamples | None = None, longest: int | None = None) -> list[Example]:
    """Turn token sequences, examples, or batches of them into a list of examples, numbered from 0.

    An item is one sequence of tokens, a tensor or array [P] or [B, P], an `Example`, a mapping with ``input_ids`` (and
    ``attention_mask``, ``source``, ``start`` if there are any, and nothing else), or a list of such items.

    Args:
        batches: the items.
        bad: takes the examples of less than 2 tokens and of more than ``longest``; None: they are an error. One that
            has no source is remembered by its number among all that were given: "#17".
        longest: the most tokens of an example; None: any number.

    Raises:
        ValueError, TypeError: for an item that is none of these, or tokens that are none; for a mapping with other
            keys, of which this knows nothing; for a list whose parts may be the fields of a batch and not its examples.

    Example:
        >>> from tlfast.collecting.batches import as_examples
        >>> [e.length for e in as_examples([[5, 6, 7], {"input_ids": [[1, 2], [3, 4]]}])]
        [3, 2, 2]
    """
    reader = ExampleReader(BadExamples("stop") if bad is None else bad, longest=longest)
    examples = reader.read(batches)
    if reader.source is not None:
        got = ", ".join(reader.source.rules.names)
        rule = "be among input_ids, attention_mask, source, start"
        raise ValueError(broken_rule("collect", "keys of batches", rule, got, "Only `collect` takes other fields."))
    return list(examples)
