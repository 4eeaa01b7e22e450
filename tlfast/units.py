"""One unit of work: its examples through the model into the ring, and from the ring into a block in example order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from .batches import Batch, Batching
from .dataset.layout import Column
from .dataset.plan import FLAG_MISSING, FLAG_NON_FINITE, FLAG_SATURATED, Example
from .errors import broken_rule
from .hooks import Capture

Loss = Callable[[nn.Module, Batch], torch.Tensor]

_PROBE_TOKENS = 8


class Runner:
    """Takes examples through the model inside one capture."""

    def __init__(self, model: nn.Module, cap: Capture, batching: Batching, loss: Loss, grad_scale: float):
        self.model, self.cap, self.batching, self.loss, self.grad_scale = model, cap, batching, loss, grad_scale
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def step(self, batch: Batch) -> None:
        """One forward and one backward: a row for each example of the batch."""
        batch = batch.to(self.device)
        with self.cap.batch(batch.mask, range(len(batch.input_ids)), self.grad_scale):
            loss = self.loss(self.model, batch)
            (loss if self.grad_scale == 1.0 else loss * self.grad_scale).backward()

    def fill_ring(self, examples: Sequence[Example], step_done: Callable[[int, int], None]) -> torch.Tensor:
        """Fill the ring; return where the row of each example lies in it, int64 [examples].

        ``step_done`` hears of each batch: its examples and its tokens.
        """
        self.cap.clear()
        order = self.batching.order(examples)
        for rows, batch in self.batching.batches(examples, order):
            self.step(batch)
            step_done(len(rows), sum(examples[i].length for i in rows))
        return torch.tensor(order).argsort()


class Blocks:
    """Two sets of host tensors in turn: one is being written while the other is filled."""

    def __init__(self, columns: Mapping[str, Column], n_rows: int, pinned: bool):
        self.columns, self.n_rows, self.pinned = columns, n_rows, pinned
        self.sets: list[dict[str, torch.Tensor]] = []
        self.n_filled = 0

    def fill(self, cap: Capture, places: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of the ring at ``places``, on the host."""
        if len(self.sets) < 2:
            empty = {
                name: torch.empty((self.n_rows, *column.row_shape), dtype=column.dtype, pin_memory=self.pinned)
                for name, column in self.columns.items()
            }
            self.sets.append(empty)
        block = {name: tensor[: len(places)] for name, tensor in self.sets[self.n_filled % 2].items()}
        self.n_filled += 1
        for name, rows in block.items():
            ring = cap[name]
            if ring.device.type == "cpu":
                torch.index_select(ring, 0, places, out=rows)
            else:
                rows.copy_(ring.index_select(0, places.to(ring.device)))
        return block


class Oddities:
    """What is wrong with the rows of a unit, looked at closely only where the capture counted something."""

    def __init__(self, cap: Capture):
        self.cap = cap
        self.n_nonfinite_rows = 0
        self.n_saturated = 0
        self._counted = dict.fromkeys(cap.names, (0, 0))

    def flags(self, block: Mapping[str, torch.Tensor], places: torch.Tensor, with_missing: bool) -> list[int] | None:
        """FLAG_... bits of each row of the unit just captured, or None where there is nothing to say."""
        counted = {name: (c["nonfinite"], c["saturated"]) for name, c in self.cap.counts.items()}
        saturated = {name: n_saturated - self._counted[name][1] for name, (_, n_saturated) in counted.items()}
        any_nonfinite = any(n > self._counted[name][0] for name, (n, _) in counted.items())
        self._counted = counted
        missing = torch.stack(list(self.cap.missing.values())).any(0)[places] if with_missing else torch.zeros(1).bool()
        if not any_nonfinite and not missing.any():
            return None
        flags = missing.expand(len(places)) * FLAG_MISSING
        for name, rows in block.items():
            flat = rows.flatten(1)
            flags = flags | (~flat.isfinite()).any(1) * FLAG_NON_FINITE
            if saturated[name]:  # counted for the column, so a gradient that was infinite itself is flagged beside it
                flags = flags | flat.isinf().any(1) * FLAG_SATURATED
        self.n_nonfinite_rows += int((flags & FLAG_NON_FINITE).count_nonzero())
        self.n_saturated += sum(saturated.values())
        return [int(bits) for bits in flags.tolist()]


def probe_columns(
    model: nn.Module, enter: Callable[[int], Capture], batching: Batching, loss: Loss, example: Example
) -> dict[str, Column]:
    """Take the beginning of one example through, twice in a batch: the columns that come out.

    Raises:
        ValueError: if the model or a point gives no gradient, or not a row for each example.
    """
    tokens = example.input_ids[:_PROBE_TOKENS]
    two = [Example(i, tokens, "", 0, len(tokens)) for i in range(2)]
    try:
        with enter(2) as cap:
            Runner(model, cap, batching, loss, 1.0).step(batching.batch(two, batching.width or len(tokens)))
            return {name: Column(cap[name].dtype, tuple(cap[name].shape[1:])) for name in cap.names}
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())
        rule = "give a gradient at every point, one row for each example"
        remedy = "Check that the model can run backward, and the points."
        raise ValueError(broken_rule("collect", "model", rule, f"<{reason}>", remedy)) from error
