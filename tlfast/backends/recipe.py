"""What a column computes of a gradient: immutable, and knows no memory. Does what csrc/autograd/recipe.cpp does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..spec import SOURCES, one_of
from .reference import capture, normal_dims, reduced_shape


@dataclass(frozen=True)
class Seen:
    """What a tap saw of a call, in its backward. The activation is None where no recipe reads it."""

    grad: torch.Tensor
    act: torch.Tensor | None = None


@dataclass(frozen=True)
class Recipe:
    """A reduction over dimensions, and the dtype in which its result is stored (None: that of what is read).

    ``of``: what is read of a call, "grad", "act", or "grad*act", their product element by element.
    """

    who: str
    reduce: str
    dims: Sequence[int]
    dtype: torch.dtype | None
    of: str = "grad"

    def __post_init__(self) -> None:
        one_of("capture", "of", self.of, SOURCES)

    def read(self, seen: Seen) -> torch.Tensor:
        """What is reduced."""
        if self.of != "act":
            return seen.grad
        assert seen.act is not None
        return seen.act

    def n_rows(self, shape: torch.Size) -> int:
        """How many rows a gradient of ``shape`` makes: one an example, or one where the batch is reduced."""
        return shape[0] if self.keeps_batch(shape) else 1

    def keeps_batch(self, shape: torch.Size) -> bool:
        """Whether the first dimension is left."""
        return len(shape) > 0 and 0 not in self._dims_of(shape)

    def row_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of one of these rows."""
        left = reduced_shape(shape, self._dims_of(shape))
        return left[1:] if self.keeps_batch(shape) else left

    def row_dtype(self, grad: torch.Tensor) -> torch.dtype:
        """The dtype of the rows of ``grad``."""
        return self.dtype or grad.dtype

    def empty_for(self, grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the rows of one gradient alone, in the shape that it is reduced to."""
        return grad.new_empty(reduced_shape(grad.shape, self._dims_of(grad.shape)), dtype=dtype)

    def write(self, out: torch.Tensor, seen: Seen, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Reduce, cast and copy into ``out``; how many values are non-finite and saturated, on its device.

        ``scale``, the factor on what depends on the loss, is in no activation.
        """
        scale = 1.0 if self.of == "act" else scale
        ref = seen.act if self.of == "grad*act" else None
        return capture(out, self.read(seen), self.reduce, tuple(self.dims), mask, scale, self.who, ref)

    def _dims_of(self, shape: torch.Size) -> tuple[int, ...]:
        return normal_dims(self.who, tuple(self.dims), len(shape))
