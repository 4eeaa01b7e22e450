"""Keepers, in plain Python: what a tap gives the outputs and gradients of its point to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import broken_rule
from .backwards import Backwards, Pending, Point
from .calls import Call
from .column import Column
from .recipe import Seen
from .reference import accumulator, capture
from .streams import current_stream, read_on
from .tensor_cache import Change, TensorCache


class Keeper(ABC):
    """What all keepers are asked for."""

    reads_outputs = False  # whether each call is to keep its output for its backward
    reads_inputs = False  # whether each call is to keep something of its input
    keeps_outputs = False  # whether outputs are kept, and a call without a gradient passes zeros on
    columns: Sequence[Column] = ()  # that make rows of a gradient; without one no backward is a step

    @abstractmethod
    def gradient(self, call: Call, seen: Seen) -> None:
        """What was seen of one call: plain memory, without a history."""

    def keep_of_input(self, who: str, given: torch.Tensor, sharing: Backwards | None) -> list[torch.Tensor]:
        """What each call is to keep of its input. ``sharing``: the capture's backwards where what several modules read
        may be projected for all of them at once.
        """
        return []

    def output(self, kept: torch.Tensor | None) -> None:  # noqa: B027 (most keep none)
        """What a call put out, as an alias without a history; None stands for what is no tensor."""


class ColumnsKeeper(Keeper):
    """Columns of rows."""

    def __init__(self, columns: list[Column]):
        self.columns = columns
        self.reads_outputs = any(column.recipe.reads_act for column in columns)
        self.reads_inputs = any(column.recipe.weight is not None for column in columns)

    def keep_of_input(self, who: str, given: torch.Tensor, sharing: Backwards | None) -> list[torch.Tensor]:
        weights = [column.recipe.weight for column in self.columns if column.recipe.weight is not None]
        if sharing is None:
            return [weight.keep(who, given) for weight in weights]
        n_ended = sharing.ledger.n_ended
        return [sharing.shared_inputs.keep(who, weight, given, n_ended) for weight in weights]

    def gradient(self, call: Call, seen: Seen) -> None:
        everything, grad = seen, seen.grad
        point: Point = call.tap.point
        of_weights = iter(seen.kept)
        run, block = call.tap.backwards.begin(point, grad.shape, grad.device)
        held = run.pending.setdefault(point.index, Pending())
        mask, summed = run.mask_on(grad.device), False
        # Both are of the moment before the first column: what is held changes below, and other threads make calls.
        alone = call.alone and not held.adds
        written = run.fired[point.index] > 1 and not held.adds  # by a call that was taken for the only one
        for number, column in enumerate(self.columns):
            step = run.step_at(column, mask)
            seen = everything if column.recipe.weight is None else Seen(grad, next(of_weights))
            if column.total is not None:
                part = column.part(seen, step)
                before = held.totals.get(number) if column.calls == "sum" else None
                held.totals[number] = _added(before, point.who, part)
            elif column.calls == "stack":
                held.parts.setdefault(number, []).append(column.part(seen, step))
            elif column.calls == "sum" and column.recipe.of == "act":
                if run.fired[point.index] > 1:
                    rule, remedy = (
                        "be called once where activations are to be summed",
                        'Choose calls="last" or "stack".',
                    )
                    raise ValueError(broken_rule(column.recipe.who, "a point", rule, "another call", remedy))
                column.write(block.base, seen, step)
            elif column.calls == "sum" and written:
                raise RuntimeError(
                    broken_rule(
                        point.who, "a point", "fire as often as it was called since the last step", "once more",
                        "Run one backward for each forward.",
                    )
                )  # fmt: skip
            elif column.calls == "sum" and not alone:
                if column.recipe.weight is None:
                    column.check(seen, step)
                if column.recipe.adds_rows:  # of sums it would be another one
                    part = column.part(seen, step)
                    held.sums[number] = _added(held.sums.get(number), point.who, part)
                elif not summed:
                    held.sum, summed = _added(held.sum, point.who, grad), True
            else:
                column.write(block.base, seen, step)


def _added(total: torch.Tensor | None, who: str, more: torch.Tensor) -> torch.Tensor:
    """The sum of what was seen of a call and of that of earlier calls."""
    if total is None:
        return more.to(accumulator(more.dtype), copy=True)
    if total.shape != more.shape:  # which += would broadcast
        raise ValueError(
            broken_rule(
                who, "a point", f"have one shape in all calls to be summed ({list(total.shape)})",
                list(more.shape), 'Choose calls="last" or "stack".',
            )
        )  # fmt: skip
    if (stream := current_stream(more.device)) is not None:
        read_on(stream, total)  # memory of the first call's stream
    total += more
    return total


class CacheKeeper(Keeper):
    """A cache of whole tensors; several calls are summed, or the last to fire is kept."""

    keeps_outputs = True

    def __init__(self, cache: TensorCache, name: str, select: Change | None, calls: str):
        self._cache, self._calls = cache, calls
        self._place = cache.add(name, select)

    def gradient(self, call: Call, seen: Seen) -> None:
        self._cache.gradient(self._place, seen.grad, self._calls == "sum", call.alone)

    def output(self, kept: torch.Tensor | None) -> None:
        self._cache.output(self._place, kept)


class SinkKeeper(Keeper):
    """A tensor into which each gradient is reduced, or a callable that takes it."""

    def __init__(self, sink: torch.Tensor | Callable[[torch.Tensor], Any], reduce: str, dims: Sequence[int]):
        if isinstance(sink, torch.Tensor):
            out, over = sink, tuple(dims)
            self._takes: Callable[[torch.Tensor], Any] = lambda grad: capture(out, grad, reduce, over, who="attach")
        else:
            self._takes = sink

    def gradient(self, call: Call, seen: Seen) -> None:
        self._takes(seen.grad)
