"""What a column computes of a gradient: immutable, and knows no memory. Does what csrc/autograd/recipe.cpp does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import broken_rule
from ..spec import SOURCES, one_of
from .reference import capture, check_mask, check_of_products, normal_dims, reduce_gradient, reduced_shape
from .weight import Weight


@dataclass(frozen=True)
class Seen:
    """What a tap saw of a call, in its backward. The activation is None where no recipe reads it."""

    grad: torch.Tensor
    act: torch.Tensor | None = None
    kept: Sequence[torch.Tensor] = ()  # of its input, for each column of weight gradients


@dataclass(frozen=True)
class Given:
    """What a step gives a column beside that."""

    mask: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    at: torch.Tensor | None = None  # int64 on the host: a position of each example [B], or several [B, k]
    own_mask: bool = False  # the mask is the column's own, and may choose positions in place of ``at``
    scale: float = 1.0  # the factor on gradients


@dataclass(frozen=True)
class Read:
    """What is reduced: what was seen, or a view of it, or the few positions of it that are chosen."""

    tensor: torch.Tensor
    ref: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    one: bool = False  # dimension 1 is a single position, and isn't kept


@dataclass(frozen=True)
class Recipe:
    """A reduction over dimensions, and the dtype in which its result is stored (None: that of what is read).

    ``of``: what is read of a call, "grad", "act", or a product element by element, "grad*act" or "grad*ref".
    ``heads``: (n, d), as which the last dimension is read. ``at``: positions of dimension 1, one of which isn't a
    dimension of a row; () where each step gives them, None for all.
    """

    who: str
    reduce: str
    dims: Sequence[int]
    dtype: torch.dtype | None
    of: str = "grad"
    heads: tuple[int, int] | None = None
    at: int | Sequence[int] | None = None
    weight: Weight | None = None  # of "weight"

    def __post_init__(self) -> None:
        one_of("capture", "of", self.of, SOURCES)
        if self.of in ("grad*act", "grad*ref"):
            check_of_products(self.who, self.reduce)
        alone = self.weight is None or (self.reduce == "none" and self.heads is None and self.at is None)
        if (self.of == "weight") != (self.weight is not None) or not alone:
            rule, got = 'be "weight" with a weight, alone', "none" if self.weight is None else "one"
            raise ValueError(broken_rule(self.who, "of", rule, got, "Make the column of one of both."))

    @property
    def reads_act(self) -> bool:
        """Whether a call must keep its output, or input, for its backward."""
        return self.of in ("act", "grad*act")

    @property
    def adds_rows(self) -> bool:
        """Whether the rows of several calls are what adds up, and not what they are made of."""
        return self.of in ("grad*act", "weight")

    @property
    def adds_gradients(self) -> bool:
        """Whether the gradients of several calls are."""
        return self.of in ("grad", "grad*ref")

    def read(self, seen: Seen, given: Given) -> Read:
        """What is reduced, and what it is multiplied with."""
        if self.weight is not None:
            assert seen.act is not None
            return Read(self.weight.rows(self.who, seen.act, seen.grad, given.mask, given.scale))
        tensor, ref = seen.grad, None
        if self.reads_act:
            assert seen.act is not None
            tensor, ref = (seen.act, None) if self.of == "act" else (seen.grad, seen.act)
        if self.of == "grad*ref":
            ref = spread(self.who, given.ref, seen.grad)
        read = Read(tensor, ref, given.mask)
        by_mask = self.at == () and given.at is None and given.own_mask
        if self.at is not None and not by_mask:
            read = self._choose(read, given)
        if self.heads is None:
            return read
        ref = None if read.ref is None else self._in_heads(read.ref)
        return replace(read, tensor=self._in_heads(read.tensor), ref=ref)

    def _choose(self, read: Read, given: Given) -> Read:
        """Read the chosen positions alone: a view where all examples have the same one, else a copy of them."""
        whole = read.tensor
        if whole.dim() < 2:
            rule, got = "have positions as dimension 1", list(whole.shape)
            raise ValueError(broken_rule(self.who, "a gradient", rule, got, "Leave at= out."))
        if read.mask is not None:
            check_mask(self.who, read.mask, whole)
        if given.at is None:
            wanted = [self.at] if isinstance(self.at, int) else list(self.at or ())
            if not wanted:
                remedy = "Say cap.batch(at={...}) around forward and backward."
                raise ValueError(broken_rule(self.who, "at", "be given for each step", "none", remedy))
            places = [self._position(number, whole) for number in wanted]

            def chosen(of: torch.Tensor) -> torch.Tensor:
                parts = [of.narrow(1, place, 1) for place in places]
                return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

            one = isinstance(self.at, int)
            return Read(chosen(whole), None if read.ref is None else chosen(read.ref), one=one)
        n = whole.shape[0]
        if given.at.shape[0] != n:
            rule, remedy = f"have positions for {n} examples", "Give those of this very batch."
            raise ValueError(broken_rule(self.who, "at", rule, given.at.shape[0], remedy))
        one = given.at.dim() == 1
        k = 1 if one else given.at.shape[1]
        per_example = given.at.reshape(n, k).tolist()
        index = torch.tensor(
            [[self._position(number, whole, example) for number in row] for example, row in enumerate(per_example)],
            dtype=torch.int64, device=whole.device,
        ).reshape(n, k)  # fmt: skip
        rows = torch.arange(n, device=whole.device).unsqueeze(1)
        return Read(whole[rows, index], None if read.ref is None else read.ref[rows, index], one=one)

    def _position(self, wanted: int, tensor: torch.Tensor, example: int | None = None) -> int:
        """A position as a number from 0 on; ValueError where there is none."""
        n = tensor.shape[1]
        if not -n <= wanted < n:
            rule = f"be positions of dimension 1 of a gradient of shape {list(tensor.shape)}"
            got = wanted if example is None else f"{wanted} for example {example}"
            raise ValueError(broken_rule(self.who, "at", rule, got, "Check them: the last one is -1."))
        return wanted % n

    def _in_heads(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.heads is not None
        n, d = self.heads
        size = tensor.shape[-1] if tensor.dim() else 0
        if size != n * d:
            rule = f"be (n, d) with n * d the last dimension, {size}"
            remedy = "Check the point, and the model's number of heads."
            raise ValueError(broken_rule(self.who, "heads", rule, (n, d), remedy))
        return tensor.view(*tensor.shape[:-1], n, d)

    def n_rows(self, shape: torch.Size) -> int:
        """How many rows a gradient of ``shape`` makes: one an example, or one where the batch is reduced."""
        return shape[0] if self.keeps_batch(len(shape) + (self.heads is not None)) else 1

    def keeps_batch(self, n_dims: int) -> bool:
        """Whether the first of the dimensions of what is read is left."""
        return n_dims > 0 and 0 not in normal_dims(self.who, tuple(self.dims), n_dims)

    def row_shape(self, read: Read) -> torch.Size:
        """The shape of one of these rows."""
        left = reduced_shape(read.tensor.shape, self._dims_of(read))
        return left[1:] if self.keeps_batch(read.tensor.dim()) else left

    def row_dtype(self, read: torch.Tensor) -> torch.dtype:
        """The dtype of the rows of ``read``."""
        return self.dtype or read.dtype

    def empty_for(self, read: Read, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the rows of one call alone, in the shape that it is reduced to."""
        return read.tensor.new_empty(reduced_shape(read.tensor.shape, self._dims_of(read)), dtype=dtype)

    def write(self, out: torch.Tensor, read: Read, scale: float) -> torch.Tensor:
        """Reduce, cast and copy into ``out``; how many values are non-finite and saturated, on its device.

        ``scale``, the factor on what depends on the loss, is in no activation.
        """
        scale = 1.0 if self.of == "act" else scale if self.weight is None else self.weight.scale(scale)
        reduce = "last" if read.one and self.reduce == "none" else self.reduce  # the one position is the last one
        return capture(out, read.tensor, reduce, self._dims_of(read), read.mask, scale, self.who, read.ref)

    def size(self, seen: Seen, given: Given) -> torch.Tensor:
        """What is made of the magnitudes of what is read, without a mask, in the accumulator's dtype."""
        if self.weight is not None:
            assert seen.act is not None
            return self.weight.size(self.who, seen.act, seen.grad) * self.weight.scale(1.0)
        read = self.read(seen, given)
        ref = None if read.ref is None else read.ref.abs()
        return reduce_gradient(read.tensor.abs(), self.reduce, self._dims_of(read), None, ref=ref)

    def _dims_of(self, read: Read) -> tuple[int, ...]:
        dims = normal_dims(self.who, tuple(self.dims), read.tensor.dim())
        return tuple(sorted({*dims, 1})) if read.one else dims


def spread(who: str, ref: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
    """What a step gives to multiply with, in the sizes of the gradient; ValueError where it doesn't fit these."""
    if ref is None:
        remedy = "Say cap.batch(refs={...}) around forward and backward, or Spec(ref=...)."
        raise ValueError(broken_rule(who, "ref", "be given for each step", "none", remedy))
    there = grad.shape[grad.dim() - ref.dim() :] if ref.dim() <= grad.dim() else None
    if there is None or any(size not in (1, wanted) for size, wanted in zip(ref.shape, there, strict=True)):
        rule = f"broadcast to a gradient of shape {list(grad.shape)}"
        remedy = "Give it the gradient's sizes, 1 for those it doesn't have."
        raise ValueError(broken_rule(who, "ref", rule, list(ref.shape), remedy))
    if ref.device != grad.device:
        raise ValueError(broken_rule(who, "ref", f"be on {grad.device}, as grad is", ref.device, "Move one of them."))
    return ref.expand(grad.shape)
