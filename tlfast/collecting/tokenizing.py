"""Records become examples: their columns become tokens and labels, as what the model is for has it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np

from ..dataset.format.plan import Example
from ..dataset.read.conditions import Condition
from ..errors import broken_rule
from .chat import chat_tokens
from .fields import NOT_ASKED_FOR, is_unicode
from .items import Texts, singles
from .records import Record
from .skipped import BadExamples, RefusedExamples
from .tasks import CAUSAL, SEQ2SEQ, has_own_ends

_AT_ONCE = 512  # texts given to a tokenizer together, which works on them in parallel
_WHO = "collect"
_NOT_ASKED = array("q", [NOT_ASKED_FOR])
# What a tokenizer's class may do to texts before its backend gets them.
_CALLS = ("__call__", "_call_one", "_encode_plus", "_batch_encode_plus", "prepare_for_tokenization")


@dataclass(frozen=True)
class Columns:
    """Which columns of a record an example is made of.

    ``column``, or ``prompt`` and ``response``, or ``messages``; ``image``; ``audio``, perhaps with ``response``.
    """

    column: str = ""
    prompt: str = ""
    response: str = ""
    messages: str = ""
    label: str = ""
    keep: tuple[str, ...] = ()
    image: str = ""
    audio: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """Those whose values are texts, or tokens."""
        return tuple(name for name in (self.column, self.prompt, self.response) if name)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        others = (self.messages, self.label, self.image, self.audio)
        return (*self.texts, *(name for name in others if name), *self.keep)

    @property
    def of_media(self) -> str:
        """The column of images or sounds; "" where examples are of text."""
        return self.image or self.audio

    @property
    def kind(self) -> str:
        """What the examples are of: "text", "image" or "audio"."""
        return "image" if self.image else "audio" if self.audio else "text"

    @property
    def makes_labels(self) -> bool:
        """Whether examples have labels."""
        return bool(self.response or self.messages or self.label)


class Unusable(Exception):
    """A record that is no example; the text says why."""


class _Chunk(NamedTuple):
    """Records that are read together, what was bad there, and what ended the reading."""

    records: list[Record]
    bad: list[list[str | int]]
    error: Exception | None
    tokens: Future[dict[str, list[Any]]]


class Tokenizing:
    """Makes examples of records.

    Args:
        columns: what they are made of.
        tokenizer: of Hugging Face.
        task: what the model is for (`tlfast.collecting.tasks`); None: a causal language model.
        first, last: tokens put before each example of a causal model, and behind it.
        longest: the most tokens of an example; None: any number.
        truncate: cut longer ones at their end, in place of leaving them out.
        condition: a text that a record must fulfil to be taken, on its values and ``length``, its tokens.
        label_ids: numbers of labels that are texts, by name.
        bad: takes what can't be used.
        place: where the records are from, for messages.
    """

    def __init__(
        self, columns: Columns, tokenizer: Any, task: str | None, bad: BadExamples, *,
        first: Sequence[int] = (), last: Sequence[int] = (), longest: int | None = None, truncate: bool = False,
        condition: str = "", label_ids: dict[str, int] | None = None, place: str = "",
    ) -> None:  # fmt: skip
        self.columns, self.tokenizer, self.task, self.bad = columns, tokenizer, task, bad
        self.first, self.last, self.longest, self.truncate = list(first), list(last), longest, truncate
        self.condition = Condition(condition, _WHO) if condition else None
        self.label_ids, self.place = label_ids or {}, place
        self.of_whole = False  # whether a list of labels is one for each class, and not one for each token
        self._quick: dict[str, bool] = {}  # columns whose texts the tokenizer's own backend encodes as it does itself
        self._kept = False  # whether a record has come that has all columns that are to be kept
        self.unused: list[str] = []  # columns that records have and nobody asks for; known once the first is read

    @property
    def wanted(self) -> set[str]:
        """The columns that are asked for."""
        return {*self.columns.names, *(self.condition.names if self.condition is not None else ())}

    def examples(self, records: Iterable[Record], most: int | None = None) -> Iterator[Any]:
        """Yield the examples, ``most`` at most: `Example`s where they are tokens alone, else mappings of fields.

        Raises:
            ValueError: for a column that the first record lacks, or a wrong condition.
            RefusedExamples: for no examples at all.
        """
        return singles(self.together(records, most))

    def together(self, records: Iterable[Record], most: int | None = None) -> Iterator[Any]:
        """Yield the same, those that have tokens and labels alone many at once: as `Texts`."""
        waiting, self._kept = iter(records), False
        n_records = n_found = 0
        with ThreadPoolExecutor(1) as pool:
            chunk = self._next(waiting, pool, first=True)
            while chunk is not None:
                # The next one's texts are encoded while examples are made of this one; no more is read than is needed.
                ahead = most is None and chunk.error is None
                following = self._next(waiting, pool) if ahead else None
                self.bad.add(chunk.bad)
                if chunk.error is not None:
                    raise chunk.error
                n_records += len(chunk.records)
                # All of the chunk: so what is bad among them is told, too.
                found = self._of(chunk)[: None if most is None else most - n_found]
                yield from self._as_examples(found, n_found)
                n_found += len(found)
                if n_found == most:
                    break
                chunk = following if ahead else self._next(waiting, pool)
        if not n_found:
            got = f"{n_records} records without" if n_records else f"no records in {self.place!r}"
            got += f"; {self.bad}" if len(self.bad) else ""
            remedy = "Look at the columns, and the filter."
            raise RefusedExamples(broken_rule(_WHO, "dataset", "hold examples", got, remedy))

    def _next(self, waiting: Iterator[Record], pool: ThreadPoolExecutor, first: bool = False) -> _Chunk | None:
        """Some records, whose texts are being encoded; None behind the last, but for what was bad there."""
        n_before, records, error = len(self.bad), list[Record](), None
        try:
            records = list(islice(waiting, _AT_ONCE))
            if records and first:
                self._check_first(records[0])
        except Exception as found:  # it is told when all before it is done
            error = found
        bad = self.bad.take_back(n_before)
        if not records and not bad and error is None:
            return None
        return _Chunk(records, bad, error, pool.submit(self._encoded, [] if error else records))

    def _encoded(self, records: Sequence[Record]) -> dict[str, list[Any]]:
        return {name: self._tokens(records, name) for name in self.columns.texts}

    def _check_first(self, record: Record) -> None:
        check_first(record, self.columns, self.condition, ("length",))
        self.unused[:] = [name for name in record.values if name not in self.wanted]

    def _of(self, chunk: _Chunk) -> list[tuple[Record, array[int], Any]]:
        """The records of a chunk that are examples, each with its tokens and its labels."""
        tokens, found = chunk.tokens.result(), []
        for k, record in enumerate(chunk.records):
            try:
                ids, labels = self._fitting(*self._together(tokens, k, record))
                if not self._kept:
                    self._check_kept(record)
                if self.condition is not None and not self._wanted(record, len(ids), self.condition):
                    continue
            except Unusable as reason:
                got, remedy = f"{reason}, in record {record.start} of {record.source}", "Correct it, or leave it out."
                error = broken_rule(_WHO, "a record", "be an example", got, remedy)
                self.bad.leave_out(record.source, record.start, str(reason), error)
                continue
            found.append((record, ids, labels))
        return found

    def _as_examples(self, found: Sequence[tuple[Record, array[int], Any]], n_before: int) -> Iterator[Any]:
        if not self.columns.keep and not self.columns.label:
            for source, some in groupby(found, key=lambda one: one[0].source):
                records, tokens, labels = zip(*some, strict=True)
                starts = [record.start for record in records]
                yield Texts(source, starts, list(tokens), list(labels) if self.columns.makes_labels else None)
            return
        for n, (record, ids, labels) in enumerate(found, n_before):
            kept = {name: record.values.get(name) for name in self.columns.keep}
            if labels is None and not kept:
                yield Example(n, ids, record.source, record.start, len(ids))
                continue
            label: Any = np.array(labels, np.int64) if isinstance(labels, array) else labels
            fields = kept if label is None else {"labels": label, **kept}
            yield {"input_ids": ids, "source": record.source, "start": record.start, **fields}

    def _check_kept(self, record: Record) -> None:
        """Refuse a record without what is to be kept, up to the first that has it; others are compared with that."""
        lacks = next((name for name in self.columns.keep if record.values.get(name) is None), None)
        if lacks is not None:
            raise Unusable(f"no {lacks}, which is to be kept")
        self._kept = True

    # Tokens.

    def _tokens(self, records: Sequence[Record], name: str) -> list[Any]:
        """Of each record the tokens of a column, or the reason why there are none."""
        values: list[Any] = [record.values.get(name) for record in records]
        is_text = [isinstance(value, str) for value in values]
        try:
            encoded = iter(self._encode([value for value in values if isinstance(value, str)], name))
        except (TypeError, UnicodeError):  # what tokenizers have to say of half a surrogate pair
            is_text = [isinstance(value, str) and is_unicode(value) for value in values]
            encoded = iter(self._encode([v for v, text in zip(values, is_text, strict=True) if text], name))
        return [next(encoded) if text else _given(value, name) for text, value in zip(is_text, values, strict=True)]

    def _encode(self, texts: list[str], name: str) -> Sequence[Sequence[int]]:
        if not texts:
            return []
        special = has_own_ends(self.task)
        if self._quick.get(name):
            return self._by_backend(texts, special)
        more: dict[str, Any] = {"truncation": True, "max_length": self.longest} if self._cuts and special else {}
        given = {"text_target": texts} if self.task == SEQ2SEQ and name == self.columns.response else {"text": texts}
        found: Sequence[Sequence[int]] = self.tokenizer(
            **given, add_special_tokens=special, return_attention_mask=False, verbose=False, **more
        )["input_ids"]
        if name not in self._quick:
            plain = not more and is_plain(self.tokenizer)
            self._quick[name] = plain and self._by_backend(texts, special) == list(found)
        return found

    def _by_backend(self, texts: list[str], special: bool) -> list[list[int]]:
        """The same in half the time, without what else transformers makes of each text."""
        found = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [encoding.ids for encoding in found]

    @property
    def _cuts(self) -> bool:
        return self.truncate and self.longest is not None

    def _together(self, tokens: Mapping[str, list[Any]], k: int, record: Record) -> tuple[array[int], Any]:
        """Tokens and labels of a record, the ``k``-th, however many; labels are None where there are none."""
        columns = self.columns
        if columns.messages:
            try:
                return chat_tokens(self.tokenizer, record.values.get(columns.messages))
            except ValueError as reason:
                raise Unusable(str(reason)) from None
        for found in tokens.values():
            if isinstance(found[k], Unusable):
                raise found[k]
        if not columns.prompt:
            ids = self._with_ends(tokens[columns.column][k], record, columns.column, self.first, self.last)
            label = label_of(record.values.get(columns.label), self.label_ids, columns.label) if columns.label else None
            return array("i", ids), label
        prompt, response = tokens[columns.prompt][k], tokens[columns.response][k]
        if self.task == SEQ2SEQ:
            return array("i", prompt), array("q", response)
        prompt = self._with_ends(prompt, record, columns.prompt, self.first, ())
        response = self._with_ends(response, record, columns.response, (), self.last)
        return array("i", prompt + response), _NOT_ASKED * len(prompt) + array("q", response)

    @staticmethod
    def _with_ends(ids: list[int], record: Record, name: str, first: Sequence[int], last: Sequence[int]) -> list[int]:
        """The tokens of a text with what is put to it; nothing is put to what is given as tokens."""
        put = (first or last) and isinstance(record.values.get(name), str)
        return [*first, *ids, *last] if put else ids

    def _fitting(self, ids: array[int], labels: Any) -> tuple[array[int], Any]:
        """The same, cut where it is too long."""
        apart = self.task == SEQ2SEQ
        for what in (ids, labels) if apart and isinstance(labels, array) else (ids,):
            if self.longest is not None and len(what) > self.longest and not self.truncate:
                raise Unusable(f"{len(what)} tokens, more than {self.longest}")
        along = isinstance(labels, array) and not apart and not self.of_whole
        if along and len(labels) != len(ids):
            raise Unusable(f"{len(labels)} labels for {len(ids)} tokens")
        ids = ids[: self.longest] if self._cuts else ids
        if isinstance(labels, array):
            labels = labels[: self.longest] if self._cuts and not self.of_whole else labels
            n_asked = len(labels) - labels.count(NOT_ASKED_FOR)
            if along and n_asked and labels[0] != NOT_ASKED_FOR and self.task in (None, CAUSAL):
                n_asked -= 1  # the first token is nobody's next
            if not n_asked:
                raise Unusable(f"no label among its {len(labels)} tokens")
        return ids, labels

    @staticmethod
    def _wanted(record: Record, n: int, condition: Condition) -> bool:
        try:
            return bool(condition({**record.values, "length": n}))
        except (ValueError, KeyError) as error:
            raise Unusable(f"the filter fails: {' '.join(str(error).split())[:120]}") from None


def check_first(record: Record, columns: Columns, condition: Condition | None, known: Sequence[str]) -> None:
    """ValueError for a column that the first record lacks, or a condition on what isn't there.

    ``known`` are the names that a condition may have beside those of the columns, which then mean no column.
    """
    for name in columns.names:
        if name not in record.values:
            rule = f"name columns of the data ({', '.join(record.values)})"
            raise ValueError(broken_rule(_WHO, "the columns", rule, repr(name), "Correct the name."))
    if condition is not None:
        if any(name in condition.names and name in record.values for name in known):
            got, remedy = "a column of that name", "Rename it in the data."
            raise ValueError(broken_rule(_WHO, "filter", "mean the tokens by length", got, remedy))
        condition.check_names([*record.values, *known])


def label_of(value: Any, label_ids: Mapping[str, int], name: str) -> Any:
    """The label in the column ``name``: a number, numbers as an array or floats as a list; Unusable for what is none.

    ``label_ids`` are the numbers of labels that are texts.
    """
    if isinstance(value, str):
        if value not in label_ids:
            known = ", ".join(list(label_ids)[:5]) or "none"
            raise Unusable(f"label {value[:40]!r} is none of the model's ({known})")
        return label_ids[value]
    if isinstance(value, list) and value and all(type(part) in (int, float) for part in value):
        if any(type(part) is int and not -(2**31) <= part < 2**31 for part in value):
            raise Unusable(f"a number of more than 32 bits in {name}")
        return array("i", value) if all(type(part) is int for part in value) else value
    if isinstance(value, (bool, int, float)):
        return value
    raise Unusable(f"no label in {name}")


def is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers hands texts to its backend as they are: nothing of its class comes between.

    Example:
        >>> from tlfast.collecting.tokenizing import is_plain
        >>> is_plain(str.split)
        False
    """
    classes = type(tokenizer).__mro__
    base = next((k for k, kind in enumerate(classes) if "backend_tokenizer" in vars(kind)), None)
    if base is None or not hasattr(tokenizer.backend_tokenizer, "encode_batch_fast"):
        return False
    return not any(name in vars(kind) for kind in classes[:base] for name in _CALLS)


def _given(value: Any, name: str) -> Any:
    """Tokens that a record has already; for whatever else the reason why it can't be used."""
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < 2**31 for token in value):
        return value
    if isinstance(value, str):
        return Unusable(f"{name} has half of a surrogate pair, which is no text")
    return Unusable(f"{name} is {'empty' if value is None or value == [] else f'a {type(value).__name__}'}, no text")
