"""The fused ops in plain PyTorch: the fallback where there is no native code, and the oracle of the tests."""

from __future__ import annotations

import math

import torch

from ..errors import broken_rule
from .plain import destination, plain

HALF_TYPES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF_TYPES, torch.float64)
NOT_OF_PRODUCTS = ("norm", "absmax")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient of ``dtype`` is accumulated: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal_dims(who: str, dims: tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    """Turn dimension numbers into sorted, non-negative ones; ValueError if one is out of range or named twice."""
    out = []
    for d in dims:
        if not -n_dims <= d < n_dims:
            raise ValueError(
                broken_rule(who, "over", f"name dimensions of a {n_dims}-d gradient", d, "Check the gradient's shape.")
            )
        out.append(d % n_dims)
    if len(set(out)) != len(out):
        raise ValueError(broken_rule(who, "over", "name each dimension once", dims, "Remove the repeated one."))
    return tuple(sorted(out))


def reduced_shape(shape: torch.Size, dims: tuple[int, ...]) -> torch.Size:
    """The shape that is left when the (normal) ``dims`` are reduced away."""
    return torch.Size(s for d, s in enumerate(shape) if d not in dims)


def check_mask(who: str, mask: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return ``mask`` expanded to ``grad``; ValueError unless it is boolean, beside it, and has its leading sizes."""
    shape = grad.shape
    if mask.dtype != torch.bool:
        remedy = "Use mask.bool(); True means a real token."
        raise ValueError(broken_rule(who, "mask", "be boolean", mask.dtype, remedy))
    if mask.shape != shape[: mask.dim()] or mask.dim() == 0:
        remedy = "Pass the attention mask of this very batch."
        if mask.dim() == 2 and len(shape) > 1 and shape[0] == mask.shape[0] and shape[1] > mask.shape[1]:
            remedy += f" It covers the positions that a model adds, too: {shape[1] - mask.shape[1]} virtual tokens?"
        rule = f"have the leading sizes of a gradient of shape {list(shape)}"
        raise ValueError(broken_rule(who, "mask", rule, list(mask.shape), remedy))
    if mask.device != grad.device:
        raise ValueError(broken_rule(who, "mask", f"be on {grad.device}, as grad is", mask.device, "Move one of them."))
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)


def reduce_gradient(
    grad: torch.Tensor,
    reduce: str,
    dims: tuple[int, ...],
    mask: torch.Tensor | None,
    scale: float = 1.0,
    who: str = "capture",
    ref: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce ``grad``, or its product with ``ref``, over the (normal) ``dims``; in the accumulator's dtype."""
    real = None if mask is None else check_mask(who, mask, grad)
    wide = grad.to(accumulator(grad.dtype))
    if ref is not None:
        wide = wide * ref.to(wide.dtype)
    if reduce == "none":
        out = wide if real is None else torch.where(real, wide, 0.0)
    elif reduce == "last":
        out = _last(wide, dims, real)
    else:
        if real is not None:
            wide = torch.where(real, wide, 0.0)
        if reduce == "sum":
            out = wide.sum(dims)
        elif reduce == "mean":
            n = math.prod(grad.shape[d] for d in dims) if real is None else real.sum(dims)
            out = wide.sum(dims) / n if isinstance(n, torch.Tensor) or n else wide.sum(dims) * math.nan
        elif reduce == "norm":
            out = wide.square().sum(dims).sqrt()
        else:
            empty = math.prod(grad.shape[d] for d in dims) == 0
            out = wide.new_zeros(reduced_shape(grad.shape, dims)) if empty else wide.abs().amax(dims)
    return out if scale == 1.0 else out * scale


def _last(wide: torch.Tensor, dims: tuple[int, ...], real: torch.Tensor | None) -> torch.Tensor:
    """The last (real) element over ``dims`` in row-major order; NaN where there is none."""
    kept = [d for d in range(wide.dim()) if d not in dims]
    rows = wide.permute(*kept, *dims).flatten(len(kept))
    n = rows.shape[-1]
    if n == 0:
        return wide.new_full(rows.shape[:-1], math.nan)
    if real is None:
        return rows[..., -1]
    numbered = torch.where(real.permute(*kept, *dims).flatten(len(kept)), torch.arange(n, device=wide.device), -1)
    index = numbered.amax(-1, keepdim=True)
    picked = rows.gather(-1, index.clamp(min=0)).squeeze(-1)
    return torch.where(index.squeeze(-1) < 0, math.nan, picked)


def check_capture(who: str, out: torch.Tensor, grad: torch.Tensor, dims: tuple[int, ...]) -> None:
    """Check dtypes, shape and memory of an op's arguments before a byte is written."""
    if grad.dtype not in FLOATS:
        raise ValueError(
            broken_rule(who, "grad", "be float32, bfloat16, float16 or float64", grad.dtype, "Cast it first.")
        )
    if out.dtype not in (torch.float32, *HALF_TYPES, grad.dtype):
        raise ValueError(
            broken_rule(
                who, "out", "be float32, bfloat16 or float16 (float64 for float64 gradients)", out.dtype,
                "Choose another stored dtype.",
            )
        )  # fmt: skip
    if out.device != grad.device:
        raise ValueError(broken_rule(who, "out", f"be on {grad.device}, as grad is", out.device, "Move one of them."))
    want = reduced_shape(grad.shape, dims)
    if out.shape != want:
        remedy = "Check over= and shapes."
        raise ValueError(broken_rule(who, "out", f"have shape {list(want)}", list(out.shape), remedy))


def check_of_products(who: str, reduce: str) -> None:
    """Check that products are reduced in this way: there are no kernels for the others, which are rarely asked for."""
    if reduce in NOT_OF_PRODUCTS:
        remedy = 'Keep each product by "none", and reduce these by reduce_into.'
        raise ValueError(
            broken_rule(who, "reduce", "be none, sum, mean or last where there is a ref", repr(reduce), remedy)
        )


def check_ref(who: str, ref: torch.Tensor, grad: torch.Tensor, reduce: str) -> None:
    """Check what a gradient is multiplied with, before a byte is written."""
    check_of_products(who, reduce)
    if ref.dtype not in FLOATS:
        rule = "be float32, bfloat16, float16 or float64"
        raise ValueError(broken_rule(who, "ref", rule, ref.dtype, "Cast it first."))
    if ref.shape != grad.shape:
        rule = f"have grad's shape {list(grad.shape)}"
        raise ValueError(broken_rule(who, "ref", rule, list(ref.shape), "Use ref.expand_as(grad)."))
    if ref.device != grad.device:
        raise ValueError(broken_rule(who, "ref", f"be on {grad.device}, as grad is", ref.device, "Move one of them."))


def check_memory(who: str, out: torch.Tensor, grad: torch.Tensor, ref: torch.Tensor | None = None) -> None:
    """Check that no element of ``out`` lies where another one, or one that is read, does."""
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(
            broken_rule(
                who, "out", "have memory of its own for each element", "an expanded tensor", "Pass a contiguous one."
            )
        )
    for name, read in (("grad", grad), ("ref", ref)):
        if read is not None and out.numel() and torch._C._is_alias_of(out, read):  # type: ignore[attr-defined]
            raise ValueError(
                broken_rule(who, "out", f"not share memory with {name}", "a view of it", "Pass a tensor of its own.")
            )


def to_odd(wide: torch.Tensor) -> torch.Tensor:
    """float64 as float32, rounded to odd: what then rounds it to a 16-bit type rounds as if there had been one step.

    Source: Boldo and Melquiond, "When double rounding is odd" (2005).
    """
    narrow = wide.float()
    bits = narrow.view(torch.int32) - (narrow.double().abs() > wide.abs()).int()  # towards zero
    odd = (bits | 1).view(torch.float32)
    return torch.where((narrow.double() == wide) | wide.isnan(), narrow, odd)


@torch.no_grad()
def capture(
    out: torch.Tensor,
    grad: torch.Tensor,
    reduce: str,
    over: tuple[int, ...],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    who: str = "capture",
    ref: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce, cast and copy ``grad`` into ``out``; return how many stored values are non-finite and saturated.

    With a ``ref`` of its shape, its product with that. Accumulates in float32 (float64 for float64 gradients), to which
    both factors are converted first, and casts once, to nearest even. Saturated: finite before the cast,
    infinite after it. The counts are int64 [2] on the device of ``out``, and nothing waits for them.
    """
    grad = plain(who, "grad", grad)
    ref = None if ref is None else plain(who, "ref", ref).detach()
    mask = None if mask is None else plain(who, "mask", mask)
    out = destination(who, "out", out)
    dims = () if reduce == "none" else normal_dims(who, over, grad.dim())
    check_capture(who, out, grad, dims)
    if ref is not None:
        check_ref(who, ref, grad, reduce)
    check_memory(who, out, grad, ref)
    wide = reduce_gradient(grad.detach(), reduce, dims, mask, scale, who, ref)
    out.copy_(to_odd(wide) if wide.dtype == torch.float64 and out.dtype in HALF_TYPES else wide)
    bad = ~torch.isfinite(out)
    return torch.stack([bad.sum(), (bad & torch.isfinite(wide)).sum()])
