"""Examples from whatever holds tokens, and the batches of one unit: sorted by length, filled to a token budget."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..dataset.format.plan import Example
from ..errors import broken_rule
from .skipped import BadExamples

PaddingSide = Literal["right", "left"]
_KEYS = ("input_ids", "attention_mask", "source", "start")  # of a mapping
_TOLD = {"id", "length", "flags", "norms"}  # what a dataset of ours tells of an example beside these


@dataclass(frozen=True)
class Batch:
    """The tokens of B examples, padded to P positions.

    ``mask`` is True at real tokens, or None where all of them are real.
    """

    input_ids: torch.Tensor  # int64 [B, P]
    mask: torch.Tensor | None  # bool [B, P]
    padding_side: PaddingSide = "right"

    @property
    def next_tokens(self) -> torch.Tensor:
        """The token after each position, -100 where there is none: int64 [B, P].

        They are shifted already. A loss that shifts, as that of a Hugging Face model with ``labels=`` does, would ask
        for the token after the next one.
        """
        next_tokens = torch.full_like(self.input_ids, -100)
        next_tokens[:, :-1] = self.input_ids[:, 1:]
        if self.mask is not None:
            next_tokens[:, :-1].masked_fill_(~(self.mask[:, :-1] & self.mask[:, 1:]), -100)
        return next_tokens

    @property
    def labels(self) -> torch.Tensor:
        """What `next_tokens` was called before: an AttributeError that says so."""
        remedy = "They are shifted already, so a loss that shifts its labels must not get them."
        raise AttributeError(broken_rule("Batch", "labels", "be asked for as next_tokens", "labels", remedy))

    @property
    def position_ids(self) -> torch.Tensor | None:
        """The position of each real token in its example, int64 [B, P]; None where it is the column's number."""
        if self.mask is None or self.padding_side == "right":
            return None
        return (self.mask.cumsum(1) - 1).clamp_(min=0)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; a copy to a GPU is queued, and isn't waited for."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            # A copy from memory that isn't pinned waits for the GPU. torch keeps pinned memory for reuse, and gives it
            # out again only after the copies from it.
            pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
            return pinned.to(device, non_blocking=True)

        return Batch(move(self.input_ids), None if self.mask is None else move(self.mask), self.padding_side)


@dataclass(frozen=True)
class Batching:
    """How the examples of one unit become batches, whatever else is collected.

    Args:
        batch_tokens: at most so many positions B x P in a batch (but at least one example).
        width: positions of every batch; None: those of its longest example.
        padding_side: where the padding goes.
        pad_id: the token at padded positions; any valid one, since it is masked.
        buckets: the only numbers of positions that a batch may have, rising; every batch has a mask then, so that all
            batches of one shape are alike. None: any number.
    """

    batch_tokens: int
    width: int | None = None
    padding_side: PaddingSide = "right"
    pad_id: int = 0
    buckets: tuple[int, ...] | None = None

    def order(self, examples: Sequence[Example]) -> list[int]:
        """The longest first, so that neighbours need little padding and the most memory is asked for at once."""
        return sorted(range(len(examples)), key=lambda i: -examples[i].length)  # a stable sort

    def n_positions(self, longest: int) -> int:
        """The positions of a batch whose longest example has ``longest`` tokens."""
        if self.buckets is not None:
            return self.buckets[bisect_left(self.buckets, longest)]
        return self.width or longest

    def n_examples(self, n_positions: int) -> int:
        """The examples of a full batch of so many positions."""
        return max(1, self.batch_tokens // n_positions)

    def parts(self, examples: Sequence[Example], order: Sequence[int]) -> list[tuple[list[int], int]]:
        """(which examples, positions) of each batch, in the given order; depends on these examples alone."""
        parts, start = [], 0
        while start < len(order):
            n_positions = self.n_positions(examples[order[start]].length)
            parts.append((list(order[start : start + self.n_examples(n_positions)]), n_positions))
            start += len(parts[-1][0])
        return parts

    def batches(self, examples: Sequence[Example], order: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """Yield (which examples, batch) in the given order."""
        for rows, n_positions in self.parts(examples, order):
            yield rows, self.batch([examples[i] for i in rows], n_positions)

    def batch(self, examples: Sequence[Example], n_positions: int) -> Batch:
        """One padded batch."""
        ids = np.full((len(examples), n_positions), self.pad_id, dtype=np.int64)
        lengths = np.array([example.length for example in examples])
        for row, example in zip(ids, examples, strict=True):
            real = slice(example.length) if self.padding_side == "right" else slice(n_positions - example.length, None)
            row[real] = example.input_ids
        columns = np.arange(n_positions)
        if self.padding_side == "right":
            mask = columns < lengths[:, None]
        else:
            mask = columns >= n_positions - lengths[:, None]
        return Batch(
            torch.from_numpy(ids),
            None if self.buckets is None and lengths.min() == n_positions else torch.from_numpy(mask),
            self.padding_side,
        )


def bucket_lengths(longest: int, most: int = 8) -> tuple[int, ...]:
    """The lengths to which examples of up to ``longest`` tokens are padded: 2^k and 3*2^k below it, and itself.

    Padding makes a batch at most 1.5 times as long, above the smallest of the ``most`` lengths.

    Example:
        >>> from tlfast.collecting.batches import bucket_lengths
        >>> bucket_lengths(200, most=5)
        (64, 96, 128, 192, 200)
    """
    steps = {factor << k for k in range(longest.bit_length()) for factor in (1, 3)}
    below = sorted(step for step in steps if 2 <= step < longest)
    return tuple([*below, longest][-most:])


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
            keys, which nobody would use; for a list whose parts may be the fields of a batch and not its examples.

    Example:
        >>> from tlfast.collecting.batches import as_examples
        >>> [e.length for e in as_examples([[5, 6, 7], {"input_ids": [[1, 2], [3, 4]]}])]
        [3, 2, 2]
    """
    bad = BadExamples("stop") if bad is None else bad
    if isinstance(batches, Mapping):
        got = f"a mapping with {_named(batches)}"
        raise TypeError(broken_rule("collect", "batches", "be an iterable of batches", got, "Put it into a list."))
    examples: list[Example] = []
    items = (given for k, item in enumerate(batches) for given in _sequences(item, f"batches[{k}]"))
    for number, (ids, source, start) in enumerate(items):
        tokens = _checked(ids)
        n, got = len(tokens), f"{len(tokens)} in example {number}"
        if n < 2:
            remedy = "A single token has no next one; leave it out."
            error = broken_rule("collect", "examples", "have 2 tokens or more", got, remedy)
            bad.leave_out(source or f"#{number}", start, f"{n} token{'s' * (n != 1)}, less than 2", error)
        elif longest is not None and n > longest:
            remedy = "Cut the examples, or give a larger seq_len."
            error = broken_rule("collect", "examples", f"have {longest} tokens at most", got, remedy)
            bad.leave_out(source or f"#{number}", start, f"{n} tokens, more than {longest}", error)
        else:
            examples.append(Example(len(examples), tokens, source, start, n))
    if not examples:
        got = str(bad) if len(bad) else "none"
        remedy = "Look at these." if len(bad) else "Is the iterable used up?"
        raise ValueError(broken_rule("collect", "batches", "hold examples", got, remedy))
    return examples


def _sequences(item: Any, place: str) -> Iterator[tuple[Sequence[int], str, int]]:
    """Yield tokens, source and start of each example in an item; ``place`` is where it stands."""
    if isinstance(item, Example):
        if item.length != len(item.input_ids):
            got, remedy = f"{item.length} for {len(item.input_ids)} tokens", "An example holds its real tokens alone."
            raise ValueError(broken_rule("collect", f"length of {place}", "count its tokens", got, remedy))
        yield item.input_ids, item.source, item.start
    elif isinstance(item, Mapping) and "input_ids" in item:
        yield from _of_mapping(item, place)
    elif isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim in (1, 2):
        ids = _as_list(item)
        for row in ids if item.ndim == 2 else [ids]:
            yield row, "", 0
    elif (
        isinstance(item, array)
        or (isinstance(item, (list, tuple)) and not item)  # an example without tokens
        or (isinstance(item, Sequence) and item and isinstance(item[0], int))
    ):
        yield item, "", 0
    elif isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
        _check_parts(item, place)
        for k, part in enumerate(item):
            yield from _sequences(part, f"{place}[{k}]")
    else:
        rule = "hold token sequences, tensors [P] or [B, P], or mappings with input_ids"
        got = f"{type(item).__name__}{f' with {_named(item)}' if isinstance(item, Mapping) else ''} in {place}"
        remedy = "Tokenize the text first; for other inputs use tlfast.capture."
        raise TypeError(broken_rule("collect", "batches", rule, got, remedy))


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
    rule, remedy = "name the fields of a batch", "Give mappings with input_ids and attention_mask."
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


def _of_mapping(item: Mapping[str, Any], place: str) -> Iterator[tuple[Sequence[int], str, int]]:
    told = _TOLD if set(item) == {*_TOLD, "input_ids", "source", "start"} else ()  # an example of a dataset of ours
    unused = [str(key) for key, value in item.items() if key not in (*_KEYS, *told) and value is not None]
    if unused:
        raise ValueError(
            broken_rule(
                "collect", f"keys of {place}", f"be among {', '.join(_KEYS)}", ", ".join(unused),
                "Drop what is too much: neither model nor loss would see it. Labels that are the input_ids are what "
                "the default loss predicts; others aren't supported yet.",
            )
        )  # fmt: skip
    given = item["input_ids"]
    _check_examples_first(given, f"input_ids of {place}")
    ids = _as_list(given)
    if not isinstance(ids, Sequence) or (isinstance(given, (torch.Tensor, np.ndarray)) and given.ndim > 2):
        got = f"a tensor {list(given.shape)}" if isinstance(given, (torch.Tensor, np.ndarray)) else repr(ids)
        rule = "be tokens, [P] or [B, P]"
        raise ValueError(broken_rule("collect", f"input_ids of {place}", rule, got, "Give mappings of one batch each."))
    nested = bool(ids) and (isinstance(ids[0], Sequence) or hasattr(ids[0], "ndim"))
    rows = [_as_list(row) for row in ids] if nested else [ids]
    mask, source, start = item.get("attention_mask"), item.get("source"), _as_list(item.get("start"))
    masks = [None] * len(rows) if mask is None else _for_each(mask, nested, len(rows), f"attention_mask of {place}")
    sources = _for_each(source, not isinstance(source, str), len(rows), f"source of {place}", "")
    starts = _for_each(start, not isinstance(start, int), len(rows), f"start of {place}", 0)
    for row, mask, source, start in zip(rows, masks, sources, starts, strict=True):
        if not isinstance(source, str) or not isinstance(start, (int, np.integer)):
            rule, got = "be a text and a whole number", f"{source!r} and {start!r}"
            raise ValueError(broken_rule("collect", f"source and start of {place}", rule, got, "Or leave them out."))
        yield row if mask is None else _real(row, _as_list(mask), place), source, int(start)


def _for_each(value: Any, nested: bool, n: int, name: str, default: Any = None) -> Sequence[Any]:
    """The values of ``n`` examples, of which one that isn't nested is for all of them."""
    values = _as_list(value)
    if values is None or not nested:
        return [default if values is None else values] * n
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != n:
        got = f"{len(values)} values" if isinstance(values, Sequence) else repr(values)
        raise ValueError(broken_rule("collect", name, f"have one for each of {n} examples", got, "See input_ids."))
    return values


def _real(tokens: Sequence[Any], mask: Any, place: str) -> Sequence[Any]:
    """The tokens of an example that its mask keeps: one run of them, since padding lies at the ends."""
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
    return tokens[first : first + n]


def _named(item: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, item)) or "no keys"


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def _checked(ids: Sequence[Any]) -> array[int]:
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


def unit_rows(row_bytes: int, ring_bytes: int = 256 << 20, most: int = 2048) -> int:
    """How many rows a unit has where nobody says: as many as fit ``ring_bytes``, and at most ``most``."""
    return max(1, min(most, math.floor(ring_bytes / max(1, row_bytes))))
