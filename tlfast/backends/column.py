"""A column, in plain Python: what one spec keeps at one point. A recipe, its rows, what to do about several calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .recipe import Given, Read, Recipe, Seen
from .reference import accumulator, capture
from .rows import Rows
from .streams import current_stream
from .weight import Weight


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
        # Of this step, or of all:
        self.own_mask: torch.Tensor | None = None  # in place of the step's mask
        self.ref: torch.Tensor | None = None  # what the gradient is multiplied with
        self.at: torch.Tensor | None = None  # positions of each example: see `Given`
        at = tuple(at) if isinstance(at, Sequence) else at
        self.recipe = Recipe(f"capture at {name}", reduce, dims, dtype, of, heads, at, weight)
        self.memory = Rows(self.recipe.who, capacity)

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

    def check(self, seen: Seen) -> torch.Tensor:
        """Return the rows, allocated at the first call; ValueError when what a later one shows doesn't fit them."""
        return self._fitting(self.recipe.read(seen, self._given(None, 1.0)))

    def _fitting(self, read: Read) -> torch.Tensor:
        return self.memory.fitting(self.recipe.row_shape(read), self.recipe.row_dtype(read.tensor), read.tensor)

    def write(self, base: int, seen: Seen, mask: torch.Tensor | None, scale: float) -> None:
        """Reduce, cast and copy what was seen into the rows from ``base`` on."""
        read = self.recipe.read(seen, self._given(mask, scale))
        rows, tensor = self._fitting(read), read.tensor
        self.memory.used_on(current_stream(rows.device))
        out = rows[base : base + tensor.shape[0]] if self.recipe.keeps_batch(tensor.dim()) else rows[base]
        self.memory.count(self.recipe.write(out, read, scale))

    def _given(self, mask: torch.Tensor | None, scale: float) -> Given:
        """What holds for this column: the mask of a step where it is about its gradients, or one of its own."""
        own = self.own_mask if self.own_mask is not None else mask if self.masked else None
        return Given(own, self.ref, self.at, self.own_mask is not None, scale)

    def part(self, seen: Seen, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """The same into rows of its own, for one call. Those that are to be added up aren't rounded, nor counted."""
        read, added = self.recipe.read(seen, self._given(mask, scale)), self.calls == "sum" or self.total is not None
        dtype = accumulator(read.tensor.dtype) if added else self.recipe.row_dtype(read.tensor)
        out = self.recipe.empty_for(read, dtype)
        counts = self.recipe.write(out, read, scale)
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
