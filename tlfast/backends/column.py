"""A column, in plain Python: what one spec keeps at one point. A recipe, its rows, what to do about several calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .recipe import Recipe
from .rows import Rows
from .streams import current_stream


class Column:
    """Rows of what ``reduce`` makes of the gradients of one point; does what `tlfast._C.Column` does natively.

    A row is one example when the reduction keeps the batch dimension, else one backward. ``calls`` says what is done
    where the point fires several times in a backward.
    """

    def __init__(
        self, name: str, reduce: str, dims: Sequence[int], dtype: torch.dtype | None, capacity: int, calls: str
    ):
        self.name, self.calls = name, calls
        self.masked = True  # False: the gradients have no positions, and a step's mask is not about them
        self.own_mask: torch.Tensor | None = None  # of this step, in place of the step's mask
        self.recipe = Recipe(f"capture at {name}", reduce, dims, dtype)
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

    def check(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the rows, allocated at the first gradient; ValueError when a later one doesn't fit them."""
        return self.memory.fitting(self.recipe.row_shape(grad.shape), self.recipe.row_dtype(grad), grad)

    def write(self, base: int, grad: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
        """Reduce, cast and copy ``grad`` into the rows from ``base`` on."""
        rows = self.check(grad)
        self.memory.used_on(current_stream(grad.device))
        out = rows[base : base + grad.shape[0]] if self.recipe.keeps_batch(grad.shape) else rows[base]
        self.memory.count(self.recipe.write(out, grad, self._own(mask), scale))

    def _own(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        if self.own_mask is not None:
            return self.own_mask
        return mask if self.masked else None

    def part(self, grad: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Reduce and cast one call's gradient into rows of its own."""
        out = self.recipe.empty_for(grad)
        self.memory.count(self.recipe.write(out, grad, self._own(mask), scale))
        return out if self.recipe.keeps_batch(grad.shape) else out.unsqueeze(0)

    def put_stack(self, base: int, n: int, parts: list[torch.Tensor]) -> None:
        """Write the parts of several calls; they become the first dimension of a row."""
        stacked = torch.stack(parts, dim=1)
        self.memory.fitting(stacked.shape[1:], self.recipe.row_dtype(stacked), stacked)[base : base + n] = stacked
