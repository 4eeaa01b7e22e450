"""How tests compare: an independent truth in float64, a tolerance computed from it, and what must not have changed."""

from __future__ import annotations

import math

import numpy as np
import torch

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the design promises for sums: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_columns(values: torch.Tensor, dims: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """``values`` as float64 or bool [outer, n], the reduced ``dims`` in row-major order, and the shape left."""
    array = (values if values.dtype == torch.bool else values.double()).detach().numpy()
    dims = tuple(sorted(d % array.ndim for d in dims))
    kept = [d for d in range(array.ndim) if d not in dims]
    left = tuple(array.shape[d] for d in kept)
    n = math.prod(array.shape[d] for d in dims)
    return array.transpose(*kept, *dims).reshape(math.prod(left), n), left


def spread_mask(mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """The mask at every element of a gradient of ``shape``."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)


def terms(grad: torch.Tensor, ref: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What is reduced, in float64: the gradient, or its product with ``ref``; and how far each term may be moved.

    A factor of another dtype and the product are rounded to the accumulator's, or lost below its smallest number.
    """
    wide = grad.detach().double()
    if ref is None:
        return wide, torch.zeros_like(wide)
    acc = torch.finfo(accumulator(grad.dtype))
    product = wide * ref.detach().double()
    return product, 2 * acc.eps * product.abs() + acc.smallest_normal * acc.eps * (1 + wide.abs())


def truth(
    grad: torch.Tensor,
    reduce: str,
    dims: tuple[int, ...],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    ref: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The right values in float64 by numpy, and how far the accumulator's rounding may move each (absolute)."""
    acc = torch.finfo(accumulator(grad.dtype))
    taken, apart = terms(grad, ref)
    if reduce == "none":
        real = spread_mask(mask, grad.shape).numpy()
        value, moved = np.where(real, taken.numpy(), 0.0) * scale, np.where(real, apart.numpy(), 0.0) * abs(scale)
        return torch.from_numpy(value), torch.from_numpy(moved + _scaling(value, scale, acc))
    g, left = as_columns(taken, dims)
    each, _ = as_columns(apart, dims)
    real, _ = as_columns(spread_mask(mask, grad.shape), dims)
    outer, n = g.shape
    with np.errstate(all="ignore"):
        kept = np.where(real, g, 0.0)
        size = np.abs(kept)
        moved = np.zeros(outer)
        if reduce in ("sum", "mean"):
            count = real.sum(1) if reduce == "mean" else np.ones(outer)
            value = kept.sum(1) / count
            moved = n * acc.eps * size.sum(1) + np.where(real, each, 0.0).sum(1)
            moved = moved / np.maximum(count, 1) + acc.eps * np.abs(value)
        elif reduce == "norm":
            squares = np.square(size).sum(1)
            value = np.sqrt(squares)
            # Each square and each partial sum is rounded relatively; a square below the smallest number is lost whole.
            lost = n * acc.smallest_normal * acc.eps
            moved = (n + 2) * acc.eps * value + np.sqrt(squares + lost) - value
        elif reduce == "absmax":
            value = size.max(1) if n else np.zeros(outer)
        elif reduce == "last":
            place = np.where(real, np.arange(n), -1).max(1) if n else np.full(outer, -1)
            value = np.where(place < 0, np.nan, g[np.arange(outer), np.maximum(place, 0)] if n else np.nan)
            moved = np.where(place < 0, 0.0, each[np.arange(outer), np.maximum(place, 0)] if n else 0.0)
        else:
            raise AssertionError(reduce)
        value = value * scale
        moved = moved * abs(scale) + _scaling(value, scale, acc)
    return torch.from_numpy(value.reshape(left)), torch.from_numpy(moved.reshape(left))


def _scaling(value: np.ndarray, scale: float, acc: torch.finfo) -> np.ndarray:
    """What the multiplication by ``scale`` (itself rounded to the accumulator) may add."""
    return np.zeros_like(value) if scale == 1.0 else np.abs(value) * 2 * acc.eps


def rounded_once(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values as ``dtype``, by one rounding to nearest even; torch's own cast goes through float32."""
    if dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    stored = torch.finfo(dtype)
    wide = value.numpy()
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(wide)[1] - 1, round(math.log2(stored.smallest_normal)))
        step = np.ldexp(stored.eps, exponent)
        near = np.where(np.isfinite(wide), np.rint(wide / step) * step, wide)
    near = np.where(np.abs(near) > stored.max, np.copysign(np.inf, near), near)
    return torch.from_numpy(near).to(dtype)


def tolerance(value: torch.Tensor, moved: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The accumulator's error and one rounding to ``dtype``, whose step never gets below its smallest subnormal."""
    stored = torch.finfo(dtype)
    return moved + stored.eps * value.abs() + stored.smallest_normal * stored.eps


def assert_close_to_truth(actual: torch.Tensor, value: torch.Tensor, moved: torch.Tensor, what: object = "") -> None:
    """Every element within the computed tolerance; NaN and inf exactly where the truth has them."""
    assert actual.shape == value.shape, f"{what}: shape {list(actual.shape)}, want {list(value.shape)}"
    stored = torch.finfo(actual.dtype)
    got = actual.detach().double()
    nan = torch.isnan(value)
    assert torch.equal(torch.isnan(got), nan), (
        f"{what}: NaN at {torch.isnan(got).nonzero()[:4].tolist()}, not as in truth"
    )
    margin = torch.nan_to_num(tolerance(value, moved, actual.dtype), nan=0.0, posinf=math.inf)
    # Half a step above the largest number everything rounds to inf: by IEEE, ties go to the even one, which is inf.
    edge = stored.max * (1 + stored.eps / 4)
    infinite = torch.isinf(got)
    must = ~nan & ((value.abs() - torch.where(torch.isinf(value), 0.0, margin) >= edge) | torch.isinf(value))
    may = ~nan & ((value.abs() + margin >= edge) | torch.isinf(value))
    assert not (infinite & ~may).any(), f"{what}: inf at {(infinite & ~may).nonzero()[:4].tolist()}, truth is finite"
    assert not (must & ~infinite).any(), f"{what}: finite at {(must & ~infinite).nonzero()[:4].tolist()}, truth is inf"
    assert torch.equal(got[infinite].sign(), value[infinite].sign()), f"{what}: inf of the wrong sign"
    rest = ~nan & ~infinite
    error = (got - value)[rest].abs()
    if error.numel():
        excess = error - margin[rest]
        worst = int(excess.argmax())
        assert excess[worst] <= 0, (
            f"{what}: {got[rest][worst]} for {value[rest][worst]}, off by {error[worst]} > {margin[rest][worst]}"
        )


def assert_captured(
    actual: torch.Tensor,
    grad: torch.Tensor,
    reduce: str,
    dims: tuple[int, ...],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    what: object = "",
    ref: torch.Tensor | None = None,
) -> None:
    """``actual`` is ``grad``, or its product with ``ref``, reduced, scaled and stored, by the float64 truth.

    Picks and copies of a gradient to the bit.
    """
    assert_close_to_truth(actual, *truth(grad, reduce, dims, mask, scale, ref), what)
    if scale == 1.0 and reduce in ("none", "last", "absmax") and ref is None:
        assert_same_bits(actual, rounded_once(truth(grad, reduce, dims, mask)[0], actual.dtype), what)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """The same shape, dtype and bits; NaN is NaN whatever its payload."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, want {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, want {list(expected.shape)}"
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), nan), f"{what}: NaN in other places"
    bits = BITS[actual.dtype]
    a, b = (torch.where(nan, 0.0, t.detach()).to(t.dtype).contiguous().view(bits) for t in (actual, expected))
    different = (a != b).nonzero()
    assert not len(different), f"{what}: {len(different)} of {a.numel()} differ, first at {different[0].tolist()}"


def assert_untouched(ring: torch.Tensor, written: int) -> None:
    """A ring: the first ``written`` rows hold numbers, every row after them is still NaN."""
    assert ring.shape[0] > written, f"a ring of {ring.shape[0]} rows leaves no room to look beyond row {written}"
    rest = ring[written:]
    assert rest.numel() > 0, "rows without elements prove nothing"
    assert torch.isnan(rest).all(), (
        f"row {written + int((~torch.isnan(rest.flatten(1))).any(1).nonzero()[0])} was written"
    )
    assert not torch.isnan(ring[:written]).any(), "a written row holds NaN"


def assert_rows(cap: object, name: str, expected: torch.Tensor) -> None:
    """A column holds ``expected`` to the bit, and nothing lies behind it in the ring."""
    assert_same_bits(cap[name], expected, name)  # type: ignore[index]
    assert_untouched(cap._columns[name].rows, len(expected))  # type: ignore[attr-defined]
