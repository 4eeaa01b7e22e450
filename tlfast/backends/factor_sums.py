"""Sums over all examples of what Kronecker factors and second moments are made of: no row of a module is kept.

Does what csrc/autograd/factor_sums.cpp does, in plain Python.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..spec import one_of

KINDS = ("products", "squares")
_BLOCK = 4096  # rows that are added up in float32
_AT_ONCE = 2**25  # numbers of the gradients of several examples


def _panels(size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows of a sum of products that are made at once.

    As many as keep a product of matrices fast, and no more, since half of what is made on the diagonal is of no use.
    """
    height = 256 if size > 1024 else 128
    return ((first, min(first + height, size)) for first in range(0, size, height))


class Carried:
    """float64, of what is added up in float32 within a block: ``block``, to be added to in place."""

    def __init__(self, zeros: torch.Tensor):
        self.block, self._carried = zeros, zeros.to(torch.float64, copy=True)

    def carry(self) -> None:
        self._carried += self.block
        self.block.zero_()

    @property
    def total(self) -> torch.Tensor:
        return self._carried + self.block


class ProductSum:
    """The sum over rows x [D] of x x^T. What lies below its diagonal isn't computed."""

    def __init__(self) -> None:
        self._panels: list[Carried] = []  # of rows of the sum, each from its first one's place on the diagonal on
        self._n_rows = 0

    def add(self, rows: torch.Tensor) -> None:
        n, size = rows.shape
        if not self._panels:
            self._panels = [Carried(rows.new_zeros(stop - first, size - first)) for first, stop in _panels(size)]
        done = 0
        while done < n:
            part = rows[done : done + _BLOCK - self._n_rows]
            for (first, stop), panel in zip(_panels(size), self._panels, strict=True):
                panel.block.addmm_(part[:, first:stop].T, part[:, first:])
            done += len(part)
            self._n_rows = (self._n_rows + len(part)) % _BLOCK
            for panel in self._panels if self._n_rows == 0 else ():
                panel.carry()

    def totals(self) -> list[torch.Tensor]:
        """[D, D], or nothing without a row."""
        if not self._panels:
            return []
        size = self._panels[0].block.shape[1]
        made = self._panels[0].block.new_empty(size, size, dtype=torch.float64)
        for (first, stop), panel in zip(_panels(size), self._panels, strict=True):
            rows = panel.total
            square = rows[:, : stop - first].triu()
            rows[:, : stop - first] = square + square.triu(1).T
            made[first:stop, first:] = rows
            made[first:, first:stop] = rows.T
        return [made]


class SquareSum:
    """The sum over examples of the square, at each place, of sum_t g_t a_t^T [O, I]."""

    def __init__(self) -> None:
        self._sum: Carried | None = None
        self._n_rows = 0

    def add(self, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add those of [B, T, O] and [B, T, I]."""
        size = outputs.shape[2] * inputs.shape[2]
        if self._sum is None:
            self._sum = Carried(outputs.new_zeros(outputs.shape[2], inputs.shape[2]))
        together = max(1, _AT_ONCE // size)
        for g, a in zip(outputs.split(together), inputs.split(together), strict=True):
            self._sum.block += torch.bmm(g.transpose(1, 2), a).square_().sum(0)
        self._n_rows += len(outputs)
        if self._n_rows >= _BLOCK:
            self._sum.carry()
            self._n_rows = 0

    def totals(self) -> list[torch.Tensor]:
        """[O, I], or nothing without an example."""
        return [] if self._sum is None else [self._sum.total]


class FactorSums:
    """What a module's sums are of: the "products" of its inputs, and of its gradients, or the "squares" of weight
    gradients.
    """

    def __init__(self, kind: str):
        self._squares = one_of("capture", "kind", kind, KINDS) == "squares"
        self._inputs, self._outputs, self._square = ProductSum(), ProductSum(), SquareSum()

    def add(
        self, outputs: torch.Tensor, inputs: torch.Tensor, one: bool, left_out: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Add what one call has at each position, [B, T, O] and [B, T, I], where padding is zero already.

        With ``one``, a 1 stands behind the inputs of each position that isn't left out. Returns how many of these each
        example has, [B].
        """
        real = outputs.new_ones(*outputs.shape[:2], 1)
        if left_out is not None:
            real = real.masked_fill(left_out, 0)
        a = torch.cat([inputs, real.to(inputs.dtype)], 2) if one else inputs
        g = outputs if scale == 1 else outputs * scale
        if self._squares:
            dtype = torch.promote_types(g.dtype, a.dtype)
            self._square.add(g.to(dtype), a.to(dtype))
        else:
            self._inputs.add(a.flatten(0, 1))
            self._outputs.add(g.flatten(0, 1))
        return real.float().sum((1, 2))

    def totals(self) -> list[torch.Tensor]:
        """The sums by now, float64: of products those of inputs and of outputs, of squares one; none before a call."""
        return self._square.totals() if self._squares else self._inputs.totals() + self._outputs.totals()
