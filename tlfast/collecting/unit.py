"""One unit of work: its examples through the model into the ring, and what is odd about the rows that come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..dataset.format.encodings import Encoded
from ..dataset.format.plan import FLAG_MISSING, FLAG_NON_FINITE, FLAG_SATURATED, Example, Unit
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..hooks.tokens import Tokens, tokens_of
from .batches import Batch, Batching
from .graph_cache import Replays
from .loss import Loss, checked_loss
from .progress import NonFinite

# Who keeps rows that are not finite how.
_KEPT_BY = {
    "collect": 'non_finite="flag" (--non-finite flag) keeps and flags such rows.',
    "stream": 'non_finite="keep" gives them out, too.',
    "gradient_sae_pairs": "Leave this example out.",
}
_MOST_NAMED = 5  # rows that are not finite
_REPLAYED_FROM = 2  # batches of one shape in a unit: a graph of the first pays with the second


class Filled(NamedTuple):
    """Where the row of each example lies in the ring, int64 [examples] on the host; and which of its positions are
    tokens, where columns have a row for each."""

    places: torch.Tensor
    tokens: Tokens | None


class Runner:
    """Takes examples through the model inside one capture, as CUDA graphs where ``replays`` is given.

    ``decoding`` are the columns whose positions are those of the decoder, with a mask of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        cap: Capture,
        batching: Batching,
        loss: Loss,
        grad_scale: float,
        replays: Replays | None = None,
        decoding: Iterable[str] = (),
    ):
        self.model, self.cap, self.batching, self.loss, self.grad_scale = model, cap, batching, loss, grad_scale
        self.replays, self.decoding = replays, tuple(decoding)
        self.device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def step(self, batch: Batch) -> None:
        """One forward and one backward: a row for each example of the batch, on the device."""
        decoded = batch.decoder_mask
        masks = None if decoded is None else dict.fromkeys(self.decoding, decoded)
        asked: dict[str, Any] = {"batch": batch} if self.cap.asks_for_batch else {}
        asked |= {"at": {name: batch[name] for name in self.cap.positions_asked}}
        if self.batching.at_inputs:
            batch = batch.started()
        with self.cap.batch(batch.mask, range(len(batch)), self.grad_scale, masks, **asked):
            loss = checked_loss(self.loss(self.model, batch), len(batch))
            (loss if self.grad_scale == 1.0 else loss * self.grad_scale).backward()

    def n_steps(self, examples: Sequence[Example]) -> int:
        """How many batches `fill_ring` makes of these examples."""
        return len(self.batching.parts(examples, self.batching.order(examples)))

    def idle(self, n_steps: int, example: Example) -> None:
        """Take an example through so many times and forget the rows: for ranks that wait for this one in each step."""
        for _ in range(n_steps):
            self.cap.clear()
            n_positions = self.batching.n_positions(self.batching.size(example))
            self.step(self.batching.batch([example], n_positions).to(self.device))

    def fill_ring(self, examples: Sequence[Example], step_done: Callable[[int, int], None]) -> Filled:
        """Fill the ring with the rows of these examples.

        ``step_done`` hears of each batch: its examples and its tokens. Which batches are replayed depends on these
        examples alone, since a replay may round in another way.
        """
        self.cap.clear()
        order = self.batching.order(examples)
        firsts = [0] * len(examples)
        shapes = Counter((len(rows), n_positions) for rows, n_positions in self.batching.parts(examples, order))
        for rows, batch in self.batching.batches(examples, order):
            shape = (len(rows), batch.input_ids.shape[1])
            for k, first in zip(rows, self._firsts([examples[i] for i in rows], batch), strict=True):
                firsts[k] = first
            batch = batch.to(self.device)
            full = shape[0] == self.batching.n_examples(shape[1])
            if self.replays is None or not full or shapes[shape] < _REPLAYED_FROM:
                self.step(batch)
            else:
                self.replays.step(self.step, batch)
            step_done(len(rows), sum(examples[i].length for i in rows))
        tokens = Tokens([example.length for example in examples], firsts) if self.batching.one_width else None
        return Filled(torch.tensor(order).argsort(), tokens)

    def _firsts(self, examples: Sequence[Example], batch: Batch) -> Sequence[int]:
        """Where the tokens of each example of a batch on the host begin; ValueError where the batch has others."""
        if batch.mask is None or not self.batching.one_width:
            tokens = Tokens([batch.input_ids.shape[1]] * len(batch))
        else:
            tokens = tokens_of("collect", batch.mask)
        for example, length in zip(examples, tokens.lengths, strict=True) if self.batching.one_width else ():
            if example.length != length:
                rule, got = f"have the {example.length} tokens of example {example.id}", f"{length} in its mask"
                remedy = 'Let collate= keep all tokens, or leave per="token" out.'
                raise ValueError(broken_rule("collect", "a batch", rule, got, remedy))
        return tokens.firsts or [0] * len(batch)


class _Odd(NamedTuple):
    """Which examples have a value that is not finite, and which an infinite one: bool [examples] each."""

    bad: torch.Tensor
    infinite: torch.Tensor


def _odd(rows: torch.Tensor | Encoded, lengths: Sequence[int] | None) -> _Odd:
    """What is odd about the rows of a column; of codes, which can't tell NaN from infinity, both are the same."""
    if isinstance(rows, Encoded):
        bad = infinite = rows.scales.isnan().view(len(rows.scales), -1).any(1)
    else:
        flat = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
        bad, infinite = (~flat.isfinite()).any(1), flat.isinf().any(1)
    if lengths is None:
        return _Odd(bad, infinite)
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    of_examples = torch.zeros(2, len(lengths), dtype=torch.bool)
    of_examples[0, owners[bad]] = True
    of_examples[1, owners[infinite]] = True
    return _Odd(of_examples[0], of_examples[1])


class Oddities:
    """What is wrong with the rows of a unit, looked at closely only where the capture counted something.

    Belongs to the thread that writes; the totals may be read from any.

    Args:
        stop: a row that is not finite is an error, unless a point of it did not fire.
        who: whose rows they are, for errors.
    """

    def __init__(self, stop: bool = False, who: str = "collect") -> None:
        self.n_nonfinite_rows = 0
        self.n_saturated = 0
        self.first: list[NonFinite] = []  # of the rows that are not finite
        self._stop, self._who = stop, who
        self._before: torch.Tensor | int = 0

    def leave_out(self, counters: Sequence[torch.Tensor]) -> None:
        """What was counted until now is of no unit; only where no thread is at `flags`."""
        self._before = torch.stack([counted.cpu() for counted in counters])

    def flags(
        self,
        block: Mapping[str, torch.Tensor | Encoded],
        counters: torch.Tensor,
        missing: torch.Tensor | None = None,
        n_writes: Sequence[int] | None = None,
        unit: Unit | None = None,
        lengths: Mapping[str, Sequence[int]] | None = None,
    ) -> list[int] | None:
        """FLAG_... bits of each row of the unit captured last, or None where there is nothing to say.

        Args:
            block: the rows of each column, or their codes and scales.
            counters: int64 [columns, 3]: the values of each column that were non-finite, and saturated, until now, and
                how often its rows were written.
            missing: bool [examples]: a point did not fire.
            n_writes: how often the rows of each column should have been written.
            unit: whose rows they are, to name them.
            lengths: how many rows each example has, for the columns that have one for each token.

        Raises:
            RuntimeError: if they were not: a GPU has lost work, and these rows can't be trusted.
            FloatingPointError: for a row that is not finite, if that is to stop the run.
        """
        for name, n_done, n_wanted in zip(block, counters[:, 2].tolist(), n_writes or (), strict=n_writes is not None):
            if n_done != n_wanted:
                who, rule = f"{self._who} at {name}", f"have been written {n_wanted} times"
                raise RuntimeError(broken_rule(who, "rows", rule, n_done, "Run again: the device has lost work."))
        n_nonfinite, n_saturated, _ = (counters - self._before).unbind(1)
        self._before = counters.clone()
        if not n_nonfinite.any() and (missing is None or not missing.any()):
            return None
        found = {name: _odd(rows, (lengths or {}).get(name)) for name, rows in block.items()}
        flags = torch.zeros(len(next(iter(found.values())).bad), dtype=torch.int64)
        if missing is not None:
            flags |= missing * FLAG_MISSING
        for (name, (odd, infinite)), saturated in zip(found.items(), n_saturated.tolist(), strict=True):
            if unit is not None:
                self._name(unit, name, odd if missing is None else odd & ~missing, flags)
            flags |= odd * FLAG_NON_FINITE
            if saturated:  # counted for the column, so a gradient that was infinite itself is flagged beside it
                flags |= infinite * FLAG_SATURATED
        self.n_nonfinite_rows += int((flags & FLAG_NON_FINITE).count_nonzero())
        self.n_saturated += int(n_saturated.sum())
        return [int(bits) for bits in flags.tolist()]

    def _name(self, unit: Unit, point: str, odd: torch.Tensor, flags: torch.Tensor) -> None:
        """Remember the first rows that are odd at a point and were not at those before it."""
        new = odd & (flags & FLAG_NON_FINITE == 0)
        if self._stop and new.any():
            row = NonFinite(unit.name, unit.start + int(new.nonzero()[0]), point)
            got, remedy = f"NaN or infinity in {row}", _KEPT_BY[self._who]
            raise FloatingPointError(broken_rule(self._who, "rows", "be finite", got, remedy))
        for i in new.nonzero().flatten().tolist()[: _MOST_NAMED - len(self.first)]:
            self.first.append(NonFinite(unit.name, unit.start + i, point))
