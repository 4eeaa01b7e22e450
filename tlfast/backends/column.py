"""A column, in plain Python: what one spec keeps at one point. A recipe, its rows, what to do about several calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .recipe import Given, Read, Recipe, Seen
from .reference import accumulator, capture
from .rows import Rows
from .streams import StepInput, current_stream
from .weight import Weight


@dataclass(frozen=True)
class OwnInputs:
    """What a step gives one column for itself."""

    mask: StepInput | None = None  # in place of the step's
    ref: StepInput | None = None  # what the gradient is multiplied with
    at: torch.Tensor | None = None  # positions of each example: see `Given`


@dataclass(frozen=True)
class Step:
    """What a column is given of a step."""

    mask: torch.Tensor | None  # of the step
    scale: float
    own: OwnInputs = OwnInputs()


class Column:
    """Rows of what ``reduce`` makes of one point's gradients, activations, or products (``of``); does what
    `tlfast._C.Column` does natively.

    A row is one example when the reduction keeps the batch dimension, else one backward. ``calls`` says what is done
    where the point fires several times in a backward.
    """

    def __init__(
        self, name: str, reduce: str, dims: Sequence[int], dtype: torch.dtype | None, capacity: int, calls: str,
        of: str, heads: tuple[int, int] | None, at: int | Sequence[int] | None,
        weight: Weight | None,
    ):  # fmt: skip
        self.name, self.calls = name, calls
        # To which its rows are added, with those of other points: it has none of its own.
        self.total: Column | None = None
        self.masked = True  # False: the gradients have no positions, and a step's mask is not about them
        self._ref: StepInput | None = None
        at = tuple(at) if isinstance(at, Sequence) else at
        self.recipe = Recipe(f"capture at {name}", reduce, dims, dtype, of, heads, at, weight)
        self.memory = Rows(self.recipe.who, capacity)

    @property
    def ref(self) -> torch.Tensor | None:
        """What the gradients of all steps are multiplied with."""
        return None if self._ref is None else self._ref.tensor

    @ref.setter
    def ref(self, given: torch.Tensor | None) -> None:
        self._ref = None if given is None else StepInput(given)

    @property
    def rows(self) -> torch.Tensor | None:
        """The rows, also those that are not committed; None before the first gradient."""
        return self.memory.tensor

    @property
    def n_writes(self) -> int:
        """How many writes were asked for."""
        return self.memory.n_writes

    @property
    def counters(self) -> torch.Tensor:
        """Non-finite values, saturated values, writes: int64 [3] on the rows' device."""
        return self.memory.counters

    @property
    def counted(self) -> tuple[int, int]:
        """How many stored values are NaN or infinite, and how many of them only through the cast; waits for a GPU."""
        n_nonfinite, n_saturated, _ = self.counters.tolist()
        return n_nonfinite, n_saturated

    def check(self, seen: Seen, step: Step) -> torch.Tensor:
        """Return the rows, allocated at the first call; ValueError when what a later one shows doesn't fit them."""
        return self._fitting(self._read(seen, replace(step, mask=None, scale=1.0)))

    def _fitting(self, read: Read) -> torch.Tensor:
        return self.memory.fitting(self.recipe.row_shape(read), self.recipe.row_dtype(read.tensor), read.tensor)

    def write(self, base: int, seen: Seen, step: Step) -> None:
        """Reduce, cast and copy what was seen into the rows from ``base`` on."""
        read = self._read(seen, step)
        rows, tensor = self._fitting(read), read.tensor
        self.memory.used_on(current_stream(rows.device))
        out = rows[base : base + tensor.shape[0]] if self.recipe.keeps_batch(tensor.dim()) else rows[base]
        self.memory.count(self.recipe.write(out, read, step.scale))

    def _read(self, seen: Seen, step: Step) -> Read:
        """What is read: with the mask of the step where that is about the column's gradients, or one of its own."""
        own, ref = step.own.mask, step.own.ref or self._ref
        mask = own.here() if own is not None else step.mask if self.masked else None
        given = Given(mask, None if ref is None else ref.here(), step.own.at, own is not None, step.scale)
        return self.recipe.read(seen, given)

    def part(self, seen: Seen, step: Step) -> torch.Tensor:
        """The same into rows of its own, for one call. Those that are to be added up aren't rounded, nor counted."""
        read, added = self._read(seen, step), self.calls == "sum" or self.total is not None
        dtype = accumulator(read.tensor.dtype) if added else self.recipe.row_dtype(read.tensor)
        out = self.recipe.empty_for(read, dtype)
        counts = self.recipe.write(out, read, step.scale)
        if not added:
            self.memory.count(counts)
        return out if self.recipe.keeps_batch(read.tensor.dim()) else out.unsqueeze(0)

    def put_sum(self, base: int, total: torch.Tensor) -> None:
        """Write the sum of the parts of several calls."""
        rows = self.memory.fitting(total.shape[1:], self.recipe.row_dtype(total), total)
        self.memory.count(capture(rows[base : base + len(total)], total, "none", (), who=self.recipe.who))

    def put_stack(self, base: int, n: int, parts: list[torch.Tensor]) -> None:
        """Write the parts of several calls; they become the first dimension of a row."""
        stacked = torch.stack(parts, dim=1)
        self.memory.fitting(stacked.shape[1:], self.recipe.row_dtype(stacked), stacked)[base : base + n] = stacked
