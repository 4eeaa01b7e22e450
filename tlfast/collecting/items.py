"""What users give as data, one item at a time: the examples in it, each with its tokens and its other fields."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..dataset.format.plan import Example
from ..errors import broken_rule
from .fields import SOUND, pad_value

_OURS = ("input_ids", "attention_mask", "source", "start")  # of a mapping: these are no fields
_TOLD = {"id", "length", "flags", "norms"}  # what a dataset of ours tells of an example beside these


class Item(NamedTuple):
    """One example as it was given; without ``input_ids`` its tokens are None."""

    input_ids: Sequence[Any] | None
    source: str
    start: int
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Texts:
    """Examples of tokens that a reader of ours made one after the other, of one source: together they take less time.

    Args:
        source: of all of them.
        starts: of each.
        tokens: of each, int32.
        labels: of each, int64, and no other field; None: they have none.
    """

    source: str
    starts: list[int]
    tokens: list[array[int]]
    labels: list[array[int]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def singles(self, first: int = 0) -> Iterator[Any]:
        """Yield each by itself, the first with this number: `Example`s, or mappings where they have labels."""
        for k, (ids, start) in enumerate(zip(self.tokens, self.starts, strict=True)):
            if self.labels is None:
                yield Example(first + k, ids, self.source, start, len(ids))
            else:
                labels = np.array(self.labels[k], np.int64)
                yield {"input_ids": ids, "source": self.source, "start": start, "labels": labels}


def singles(examples: Iterable[Any]) -> Iterator[Any]:
    """Yield examples each by itself, also those that came as `Texts`."""
    n = 0
    for given in examples:
        if isinstance(given, Texts):
            yield from given.singles(n)
            n += len(given)
        else:
            yield given
            n += 1


@dataclass(frozen=True)
class Reading:
    """How items are read.

    Args:
        fields: the fields to take, each with the key or the index at which an item has it; None: all.
        apart: fields that have nothing to do with the positions of ``input_ids``.
        batched: an item is a batch also where it has no ``input_ids``, as a DataLoader's.
    """

    fields: Mapping[str, Any] | None = None
    apart: frozenset[str] = frozenset()
    batched: bool = False

    def items(self, given: Any, place: str) -> Iterator[Item]:
        """Yield the examples in what was given; ``place`` is where it stands."""
        if isinstance(given, Texts):
            for single in given.singles():
                yield from self.items(single, place)
            return
        item = given if self.fields is None else _picked(given, self.fields, place)
        if type(item) is dict and _is_read(item):
            fields = {key: value for key, value in item.items() if value is not None and key not in _OURS}
            yield Item(item["input_ids"], item["source"], item["start"], fields)
        elif isinstance(item, Example):
            if item.length != len(item.input_ids):
                got, remedy = (
                    f"{item.length} for {len(item.input_ids)} tokens",
                    "An example holds its real tokens alone.",
                )
                raise ValueError(broken_rule("collect", f"length of {place}", "count its tokens", got, remedy))
            yield Item(item.input_ids, item.source, item.start, {})
        elif isinstance(item, Mapping) and "input_ids" in item:
            yield from self._with_tokens(item, place)
        elif isinstance(item, Mapping):
            yield from self._without_tokens(item, place)
        elif isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim in (1, 2):
            ids = _as_list(item)
            for row in ids if item.ndim == 2 else [ids]:
                yield Item(row, "", 0, {})
        elif (
            isinstance(item, array)
            or (isinstance(item, (list, tuple)) and not item)  # an example without tokens
            or (isinstance(item, Sequence) and item and isinstance(item[0], int))
        ):
            yield Item(item, "", 0, {})
        elif isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
            _check_parts(item, place)
            for k, part in enumerate(item):
                yield from self.items(part, f"{place}[{k}]")
        else:
            rule = "hold token sequences, tensors [P] or [B, P], or mappings of fields"
            got, remedy = f"{type(item).__name__} in {place}", "Tokenize the text first; fields= names the parts."
            raise TypeError(broken_rule("collect", "batches", rule, got, remedy))

    def _without_tokens(self, item: Mapping[str, Any], place: str) -> Iterator[Item]:
        fields = {str(key): value for key, value in item.items() if value is not None}
        if not self.batched:
            yield _named_item(None, fields, place)
            return
        sizes = {name: len(value) for name, value in fields.items() if hasattr(value, "__len__")}
        n = next(iter(sizes.values()), 0)
        for k in range(n):
            row = {name: _of_row(value, k, n, f"{name} of {place}") for name, value in fields.items()}
            yield _named_item(None, row, place)

    def _with_tokens(self, item: Mapping[str, Any], place: str) -> Iterator[Item]:
        told = _TOLD if set(item) == {*_TOLD, "input_ids", "source", "start"} else ()  # an example of our dataset
        fields = {str(key): value for key, value in item.items() if key not in (*_OURS, *told) and value is not None}
        given = item["input_ids"]
        if isinstance(given, array) and item.get("attention_mask") is None:
            yield _named_item(
                given, {n: item[n] for n in ("source", "start") if item.get(n) is not None} | fields, place
            )
            return
        _check_examples_first(given, f"input_ids of {place}")
        ids = _as_list(given)
        if not isinstance(ids, Sequence) or (isinstance(given, (torch.Tensor, np.ndarray)) and given.ndim > 2):
            got = f"a tensor {list(given.shape)}" if isinstance(given, (torch.Tensor, np.ndarray)) else repr(ids)
            remedy = "Give mappings of one batch each."
            raise ValueError(broken_rule("collect", f"input_ids of {place}", "be tokens, [P] or [B, P]", got, remedy))
        nested = bool(ids) and (isinstance(ids[0], Sequence) or hasattr(ids[0], "ndim"))
        rows = [_as_list(row) for row in ids] if nested else [ids]
        mask, source, start = item.get("attention_mask"), item.get("source"), _as_list(item.get("start"))
        masks = [None] * len(rows) if mask is None else _for_each(mask, nested, len(rows), f"attention_mask of {place}")
        sources = _for_each(source, not isinstance(source, str), len(rows), f"source of {place}", "")
        starts = _for_each(start, not isinstance(start, int), len(rows), f"start of {place}", 0)
        for k, (row, mask, source, start) in enumerate(zip(rows, masks, sources, starts, strict=True)):
            _check_place(source, start, place)
            of_row = (
                {name: _of_row(value, k, len(rows), f"{name} of {place}") for name, value in fields.items()}
                if nested
                else fields
            )
            if mask is None:
                yield Item(row, source, int(start), of_row)
            else:
                real = _real(row, _as_list(mask), place)
                yield Item(row[real], source, int(start), self._cut(of_row, len(row), real))

    def _cut(self, fields: Mapping[str, Any], n: int, real: slice) -> Mapping[str, Any]:
        """The fields of an example that was padded to ``n`` tokens: those that are padded with it lose that as well."""
        if real == slice(0, n):
            return fields
        return {
            name: value[real]
            if name not in self.apart and name not in SOUND and not name.startswith("decoder_")
            and pad_value(name, 0) is not None and hasattr(value, "__len__")
            and not isinstance(value, (str, Mapping)) and len(value) == n
            else value
            for name, value in fields.items()
        }  # fmt: skip


def _is_read(item: dict[Any, Any]) -> bool:
    """Whether it is one example as our own readers make it: most of a large data set are, so it is asked first."""
    return (
        type(item.get("input_ids")) is array and type(item.get("source")) is str and type(item.get("start")) is int
        and item.get("attention_mask") is None and "length" not in item and set(map(type, item)) == {str}
    )  # fmt: skip


def _named_item(ids: Sequence[Any] | None, fields: dict[str, Any], place: str) -> Item:
    source, start = fields.pop("source", ""), fields.pop("start", 0)
    start = _as_list(start)
    _check_place(source, start, place)
    return Item(ids, source, int(start), fields)


def _check_place(source: Any, start: Any, place: str) -> None:
    if not isinstance(source, str) or not isinstance(start, (int, np.integer)):
        rule, got = "be a text and a whole number", f"{source!r} and {start!r}"
        raise ValueError(broken_rule("collect", f"source and start of {place}", rule, got, "Or leave them out."))


def _picked(item: Any, wanted: Mapping[str, Any], place: str) -> Any:
    """The named fields of an item; a list of mappings or tuples, as ``collate_fn=list`` makes, is left as it is."""
    if isinstance(item, list) and item and all(isinstance(part, (Mapping, tuple)) for part in item):
        return item
    if isinstance(item, Mapping):
        told = {name: item[name] for name in ("source", "start", "attention_mask") if name in item}
        return told | {name: item.get(key) for name, key in wanted.items()}
    if isinstance(item, (list, tuple)):
        try:
            if all(isinstance(key, str) for key in wanted.values()):
                return dict(zip(wanted, item, strict=True))
            return {name: item[key] for name, key in wanted.items()}
        except (IndexError, TypeError, ValueError):
            got, remedy = f"{len(item)} parts for {', '.join(wanted)}", "Name each part of a tuple, in their order."
            raise ValueError(broken_rule("collect", place, "have the parts that fields= names", got, remedy)) from None
    if len(wanted) == 1:
        return dict.fromkeys(wanted, item)
    got, remedy = f"a {type(item).__name__}", "Give tuples or mappings, or one name."
    raise ValueError(broken_rule("collect", place, f"have the fields {', '.join(wanted)}", got, remedy))


def _of_row(value: Any, k: int, n: int, name: str) -> Any:
    """What a field of a batch of ``n`` examples has for number ``k``."""
    if isinstance(value, Mapping):
        return {key: _of_row(part, k, n, f"{key} in {name}") for key, part in value.items()}
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != n:
        got = f"{len(value)} values" if hasattr(value, "__len__") else repr(value)
        raise ValueError(broken_rule("collect", name, f"have one for each of {n} examples", got, "See input_ids."))
    return value[k]


def _check_parts(parts: Sequence[Any], place: str) -> None:
    """ValueError where the parts of a list may be fields of a batch, or its positions, and not its examples."""
    fields = getattr(parts, "_fields", None)
    sizes = [list(part.shape) for part in parts if isinstance(part, (torch.Tensor, np.ndarray))]
    if fields is not None:
        got = f"{type(parts).__name__}({', '.join(fields)})"
    elif len(parts) > 1 and any(len(size) > 1 for size in sizes):  # a DataLoader of a TensorDataset
        got = f"{len(parts)} parts with sizes {', '.join(map(str, sizes[:3]))}"
    elif len(parts) == 2 and _is_mask(parts[1], parts[0]):
        got = "tokens, and as many 0s and 1s"
    else:
        _check_examples_first(parts, place)
        return
    rule = "name the fields of a batch"
    remedy = "Give mappings with input_ids and attention_mask; or name the parts of tuples by fields=."
    raise ValueError(broken_rule("collect", place, rule, got, remedy))


def _is_mask(part: Any, tokens: Any) -> bool:
    part, tokens = _as_list(part), _as_list(tokens)
    return (
        isinstance(part, Sequence) and isinstance(tokens, Sequence) and not isinstance(part, (str, bytes))
        and len(part) == len(tokens) > 0
        and all(isinstance(value, int) for value in (*part, *tokens))
        and set(part) <= {0, 1} and not set(tokens) <= {0, 1}
    )  # fmt: skip


def _check_examples_first(rows: Any, place: str) -> None:
    """ValueError for a list of equally long tensors: a DataLoader makes lists of ints so, the positions first."""
    several = isinstance(rows, (list, tuple)) and len(rows) > 1
    sizes = {tuple(row.shape) if isinstance(row, torch.Tensor) else () for row in rows} if several else ()
    if len(sizes) == 1 and all(map(len, sizes)):
        rule, got = "hold one example after the other", f"a list of {len(rows)} tensors {list(*sizes)}"
        remedy = "Stack them, [B, P]; a DataLoader that makes such lists, positions first, needs collate_fn=list."
        raise ValueError(broken_rule("collect", place, rule, got, remedy))


def _for_each(value: Any, nested: bool, n: int, name: str, default: Any = None) -> Sequence[Any]:
    """The values of ``n`` examples, of which one that isn't nested is for all of them."""
    values = _as_list(value)
    if values is None or not nested:
        return [default if values is None else values] * n
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != n:
        got = f"{len(values)} values" if isinstance(values, Sequence) else repr(values)
        raise ValueError(broken_rule("collect", name, f"have one for each of {n} examples", got, "See input_ids."))
    return values


def _real(tokens: Sequence[Any], mask: Any, place: str) -> slice:
    """Which tokens of an example its mask keeps: one run of them, since padding lies at the ends."""
    rule, remedy = f"be 0 or 1 at each of the {len(tokens)} tokens", "Leave it out where nothing is padded."
    name = f"attention_mask of {place}"
    if not isinstance(mask, Sequence) or len(mask) != len(tokens) or any(value not in (0, 1) for value in mask):
        got = repr(mask)
        raise ValueError(broken_rule("collect", name, rule, got if len(got) < 60 else f"{got[:57]}...", remedy))
    n = sum(map(bool, mask))
    first = next((k for k, keep in enumerate(mask) if keep), 0)
    if not all(mask[first : first + n]):
        rule, got = "keep one run of tokens", "a gap among them"
        raise ValueError(broken_rule("collect", name, rule, got, "Give packed sequences one by one."))
    return slice(first, first + n)


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def as_tokens(ids: Sequence[Any]) -> array[int]:
    """Tokens as int32; ValueError for what is none."""
    try:
        # What an array makes of bytes are the numbers that lie in them.
        given = list(ids) if isinstance(ids, (bytes, bytearray)) else ids
        tokens = ids if isinstance(ids, array) and ids.typecode == "i" else array("i", given)
        if not tokens or (min(tokens) >= 0 and not isinstance(ids[0], bool)):
            return tokens
    except (TypeError, OverflowError):
        pass
    odd = next(
        (token for token in ids if type(token) is bool or not isinstance(token, int) or not 0 <= token < 2**31), ids
    )
    raise ValueError(broken_rule("collect", "tokens", "be ints from 0 on", repr(odd), "Check the input_ids."))
