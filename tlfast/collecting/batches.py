"""The batches of one unit: its examples sorted by length, filled to a token budget or a number, and padded."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np
import torch

from ..dataset.format.layout import Column
from ..dataset.format.plan import Example
from ..errors import broken_rule
from .examples import FieldSource
from .examples import as_examples as as_examples  # users import it from here
from .fields import DECODED, Fields, FieldsOfBatch, FieldUse
from .spool import lengths_of

PaddingSide = Literal["right", "left"]
Collate = Callable[[list[Fields]], Mapping[str, Any]]


@dataclass(frozen=True)
class Batch:
    """The tokens of B examples, padded to P positions, and their other fields.

    ``mask`` is True at real tokens, or None where all of them are real. Examples without tokens have ``input_ids``
    [B, 0]. ``fields`` are the others by name, ``batch["labels"]`` is one of them: numbers are a tensor [B, ...], texts
    a list, a mapping is a mapping of these. A field as long as the tokens is padded as they are, others on the right.
    """

    input_ids: torch.Tensor  # int64 [B, P]
    mask: torch.Tensor | None  # bool [B, P]
    padding_side: PaddingSide = "right"
    fields: FieldsOfBatch = field(default_factory=FieldsOfBatch)
    decoder_mask: torch.Tensor | None = None  # bool [B, L]: what a decoder really reads; None: all of it
    packed: bool = False  # some example is of several texts: their position_ids begin anew, also at each padded token
    joined: bool = False  # the first token of a text is the next one of the text before, as it once was

    def started(self) -> Batch:
        """The same with fields that require grad where they are floats: the graph starts there."""

        def start(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            begun: torch.Tensor = torch.ops.aten._unsafe_view(tensor.detach().requires_grad_(), tensor.shape)
            return begun  # no leaf, as in `freeze`

        return replace(self, fields=self.fields.moved(start))

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self.fields

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_decoded(self) -> int | None:
        """The positions that a decoder beside an encoder has; None where the examples say nothing of one."""
        fields = self.fields.peek()
        given = next((fields[name] for name in DECODED if isinstance(fields.get(name), torch.Tensor)), None)
        return None if given is None or given.dim() < 2 else given.shape[1]

    @property
    def next_tokens(self) -> torch.Tensor:
        """The token after each position, -100 where there is none: int64 [B, P].

        They are shifted already. A loss that shifts, as that of a Hugging Face model with ``labels=`` does, would ask
        for the token after the next one. Where an example is of several texts, none is the next of another's.
        """
        next_tokens = torch.full_like(self.input_ids, -100)
        next_tokens[:, :-1] = self.input_ids[:, 1:]
        asked = next_tokens[:, :-1]
        real = torch.ones_like(asked, dtype=torch.bool) if self.mask is None else self.mask[:, :-1] & self.mask[:, 1:]
        if self.packed and not self.joined:
            positions = self.fields.peek()["position_ids"]
            here, after = positions[:, :-1], positions[:, 1:]
            several = (real & (after < here)).any(1, keepdim=True)  # of each example alone, whatever it is beside
            real = real & ~(several & (after <= here))
        asked.masked_fill_(~real, -100)
        return next_tokens

    @property
    def labels(self) -> torch.Tensor:
        """The field of this name, as it was given; where there is none an AttributeError.

        So were `next_tokens` called before, and the error says so.
        """
        if "labels" in self.fields:
            labels: torch.Tensor = self.fields["labels"]
            return labels
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

        mask, decoded = (None if part is None else move(part) for part in (self.mask, self.decoder_mask))
        fields = self.fields.moved(move)
        return replace(self, input_ids=move(self.input_ids), mask=mask, fields=fields, decoder_mask=decoded)


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
        one_width: all batches of a unit have the positions of its longest example, since their rows lie in one ring.
        batch_examples: at most so many examples in a batch; None: as many as ``batch_tokens`` allows.
        sizes: of all examples by number, in place of their tokens, which they don't have; None: their tokens.
        source: has the fields of the examples; None: they have none.
        collate: (the examples of a batch) -> its fields, in place of the rules of `FieldRules`.
        use: what fields the batches have, and which of them somebody reads.
        at_inputs: the graph starts at the fields that are floats.
        next_in_text: whether the next token of a text's last is none, where an example may be of several, and somebody
            may ask for it; None: nobody does.
    """

    batch_tokens: int
    width: int | None = None
    padding_side: PaddingSide = "right"
    pad_id: int = 0
    buckets: tuple[int, ...] | None = None
    batch_examples: int | None = None
    sizes: Sequence[int] | None = None
    source: FieldSource | None = None
    collate: Collate | None = None
    use: FieldUse = field(default_factory=FieldUse)
    one_width: bool = False
    at_inputs: bool = False
    next_in_text: bool | None = None

    def size(self, example: Example) -> int:
        """The tokens of an example, or what stands for them."""
        return example.length if self.sizes is None else self.sizes[example.id]

    def order(self, examples: Sequence[Example]) -> list[int]:
        """The longest first, so that neighbours need little padding and the most memory is asked for at once."""
        return sorted(range(len(examples)), key=lambda i: -self.size(examples[i]))  # a stable sort

    def n_positions(self, longest: int) -> int:
        """The positions of a batch whose longest example has ``longest`` tokens."""
        if self.buckets is not None:
            return self.buckets[bisect_left(self.buckets, longest)]
        return self.width or longest

    def n_examples(self, n_positions: int) -> int:
        """The examples of a full batch of so many positions."""
        most = max(1, self.batch_tokens // max(1, n_positions))
        return most if self.batch_examples is None else min(most, self.batch_examples)

    def parts(self, examples: Sequence[Example], order: Sequence[int]) -> list[tuple[list[int], int]]:
        """(which examples, positions) of each batch, in the given order; depends on these examples alone."""
        parts, start = [], 0
        while start < len(order):
            n_positions = self.n_positions(self.size(examples[order[0 if self.one_width else start]]))
            parts.append((list(order[start : start + self.n_examples(n_positions)]), n_positions))
            start += len(parts[-1][0])
        return parts

    def batches(self, examples: Sequence[Example], order: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """Yield (which examples, batch) in the given order."""
        for rows, n_positions in self.parts(examples, order):
            yield rows, self.batch([examples[i] for i in rows], n_positions)

    def batch(self, examples: Sequence[Example], n_positions: int) -> Batch:
        """One padded batch."""
        if self.collate is not None:
            return self._collated(examples, self.collate)
        if self.source is not None and not self.source.rules.has_tokens:
            ids, mask, n_positions = torch.zeros(len(examples), 0, dtype=torch.int64), None, 0
        else:
            ids, mask = self._padded(examples, n_positions)
        if self.source is None:
            return Batch(ids, mask, self.padding_side)
        values = self.source.fetch([example.id for example in examples])
        together = self.source.rules.collated(values, n_positions, self.padding_side)
        decoded = self.source.rules.decoder_mask(values)
        packed = any(_restarts(part.get("position_ids")) for part in values)
        joined = self.next_in_text is False
        return Batch(ids, mask, self.padding_side, FieldsOfBatch(together, self.use), decoded, packed, joined)

    def _padded(self, examples: Sequence[Example], n_positions: int) -> tuple[torch.Tensor, torch.Tensor | None]:
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
        whole = self.buckets is None and lengths.min() == n_positions
        return torch.from_numpy(ids), None if whole else torch.from_numpy(mask)

    def _collated(self, examples: Sequence[Example], collate: Collate) -> Batch:
        """One batch as the user puts it together; what isn't ``input_ids`` or ``attention_mask`` is a field."""
        parts: list[Fields] = [{} for _ in examples]
        if self.source is not None:
            parts = self.source.fetch([example.id for example in examples])
        if self.source is None or self.source.rules.has_tokens:
            parts = [
                {"input_ids": list(example.input_ids), **part} for example, part in zip(examples, parts, strict=True)
            ]
        given: Any = collate(parts)
        if not isinstance(given, Mapping):
            remedy = "Return a dict of tensors."
            raise TypeError(broken_rule("collect", "collate", "return a mapping", type(given).__name__, remedy))
        fields = {str(name): value for name, value in given.items() if value is not None}
        ids = fields.pop("input_ids", torch.zeros(len(examples), 0, dtype=torch.int64))
        mask = fields.pop("attention_mask", None) if "input_ids" in given else None  # else it is one more field
        _check_collated(ids, mask, fields, len(examples))
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        decoded = fields.get("decoder_attention_mask")
        decoded = decoded.bool() if isinstance(decoded, torch.Tensor) and not bool(decoded.all()) else None
        return Batch(ids.long(), mask, self.padding_side, FieldsOfBatch(fields, self.use), decoded)


def _restarts(positions: Any) -> bool:
    """Whether the position_ids of an example begin anew in it."""
    return isinstance(positions, torch.Tensor) and positions.dim() == 1 and bool((positions.diff() < 0).any())


def _check_collated(ids: Any, mask: Any, fields: Mapping[str, Any], n: int) -> None:
    """ValueError for what a ``collate=`` returned that is no batch of ``n`` examples."""
    sizes = {name: len(value) for name, value in fields.items() if isinstance(value, (torch.Tensor, list))}
    odd = next((f"{size} in {name!r}" for name, size in sizes.items() if size != n), None)
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or len(ids) != n:
        odd = f"{list(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else f"a {type(ids).__name__}"
        odd += " as input_ids"
    elif mask is not None and (
        not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all())
    ):
        odd = "an attention_mask that isn't 0 or 1 at each token"
    if odd is not None:
        rule, remedy = f"return a batch of {n} examples: tensors [B, ...], tokens [B, P]", "Return a dict of tensors."
        raise ValueError(broken_rule("collect", "collate", rule, odd, remedy))


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


def unit_rows_of(columns: Iterable[Column], examples: Sequence[Example]) -> int:
    """How many of these examples a unit has where nobody says, by the rows in memory, padded and not encoded."""
    longest = max(lengths_of(examples))
    sizes = (
        column.dtype.itemsize * prod(column.row_shape) * (longest if column.per == "token" else 1) for column in columns
    )
    return unit_rows(sum(sizes))


def unit_rows(row_bytes: int, ring_bytes: int = 256 << 20, most: int = 2048) -> int:
    """How many rows a unit has where nobody says: as many as fit ``ring_bytes``, and at most ``most``."""
    return max(1, min(most, math.floor(ring_bytes / max(1, row_bytes))))
