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

from .bad_examples import BadExamples
from .dataset.plan import Example
from .errors import broken_rule

PaddingSide = Literal["right", "left"]


@dataclass(frozen=True)
class Batch:
    """The tokens of B examples, padded to P positions.

    ``mask`` is True at real tokens, or None where all of them are real.
    """

    input_ids: torch.Tensor  # int64 [B, P]
    mask: torch.Tensor | None  # bool [B, P]
    padding_side: PaddingSide = "right"

    @property
    def labels(self) -> torch.Tensor:
        """The next token of each position, -100 where there is none: int64 [B, P]."""
        labels = torch.full_like(self.input_ids, -100)
        labels[:, :-1] = self.input_ids[:, 1:]
        if self.mask is not None:
            labels[:, :-1].masked_fill_(~(self.mask[:, :-1] & self.mask[:, 1:]), -100)
        return labels

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
        >>> from tlfast.batches import bucket_lengths
        >>> bucket_lengths(200, most=5)
        (64, 96, 128, 192, 200)
    """
    steps = {factor << k for k in range(longest.bit_length()) for factor in (1, 3)}
    below = sorted(step for step in steps if 2 <= step < longest)
    return tuple([*below, longest][-most:])


def as_examples(batches: Iterable[Any], bad: BadExamples | None = None, longest: int | None = None) -> list[Example]:
    """Turn token sequences, examples, or batches of them into a list of examples, numbered from 0.

    An item is one sequence of tokens, a tensor or array [P] or [B, P], an `Example`, a mapping with ``input_ids`` (and
    ``attention_mask``, ``source``, ``start`` if there are any), or a list of such items.

    Args:
        batches: the items.
        bad: takes the examples of less than 2 tokens and of more than ``longest``; None: they are an error. One that
            has no source is remembered by its number among all that were given: "#17".
        longest: the most tokens of an example; None: any number.

    Raises:
        ValueError, TypeError: for an item that is none of these, or tokens that are none.

    Example:
        >>> from tlfast.batches import as_examples
        >>> [e.length for e in as_examples([[5, 6, 7], {"input_ids": [[1, 2], [3, 4]]}])]
        [3, 2, 2]
    """
    bad = BadExamples("stop") if bad is None else bad
    examples: list[Example] = []
    for number, (ids, source, start) in enumerate(given for item in batches for given in _sequences(item)):
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


def _sequences(item: Any) -> Iterator[tuple[Sequence[int], str, int]]:
    if isinstance(item, Example):
        yield item.input_ids, item.source, item.start
    elif isinstance(item, Mapping) and "input_ids" in item:
        yield from _of_mapping(item)
    elif isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim in (1, 2):
        for ids in item.tolist() if item.ndim == 2 else [item.tolist()]:
            yield ids, "", 0
    elif (
        isinstance(item, array)
        or (isinstance(item, (list, tuple)) and not item)  # an example without tokens
        or (isinstance(item, Sequence) and item and isinstance(item[0], int))
    ):
        yield item, "", 0
    elif isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
        for part in item:
            yield from _sequences(part)
    else:
        rule = "hold token sequences, tensors [P] or [B, P], or mappings with input_ids"
        got = type(item).__name__
        raise TypeError(broken_rule("collect", "batches", rule, got, "Tokenize the text first."))


def _of_mapping(item: Mapping[str, Any]) -> Iterator[tuple[Sequence[int], str, int]]:
    ids, mask = _as_list(item["input_ids"]), _as_list(item.get("attention_mask"))
    nested = bool(ids) and not isinstance(ids[0], int)
    rows, masks = (ids, mask) if nested else ([ids], None if mask is None else [mask])
    sources, starts = item.get("source", ""), _as_list(item.get("start", 0))
    for i, row in enumerate(rows):
        real = _as_list(row)
        if masks is not None:
            real = [token for token, keep in zip(real, masks[i], strict=True) if keep]
        source = sources if isinstance(sources, str) else sources[i]
        yield real, source, int(starts if isinstance(starts, int) else starts[i])


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def _checked(ids: Sequence[Any]) -> array[int]:
    try:
        tokens = ids if isinstance(ids, array) else array("i", ids)
        if not tokens or min(tokens) >= 0:
            return tokens
    except (TypeError, OverflowError):
        pass
    odd = next((token for token in ids if not isinstance(token, int) or not 0 <= token < 2**31), ids)
    raise ValueError(broken_rule("collect", "tokens", "be ints from 0 on", repr(odd), "Check the input_ids."))


def unit_rows(row_bytes: int, ring_bytes: int = 256 << 20, most: int = 2048) -> int:
    """How many rows a unit has where nobody says: as many as fit ``ring_bytes``, and at most ``most``."""
    return max(1, min(most, math.floor(ring_bytes / max(1, row_bytes))))
