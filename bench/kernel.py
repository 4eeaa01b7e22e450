"""The fused ops alone: mean over positions, cast and copy, beside PyTorch and beside merely reading the bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tlfast

from . import kernel_product
from .measure import Measured, Sections, calls_for, check_close, interleave, reduction_bound, repeat
from .report import Cell, Claim, Result, Table

PREDICTION = (
    "the time is that of reading the gradient once: equal to g.sum() at [4,512,2048] and above, 1.7x faster than "
    "out.copy_(g.mean(1)) there and 4x at [8,128,768]; at [1,16,64] the call itself is all that is seen; a product "
    "that is summed over the width takes 1.0-1.1x of reading both operands, 1.5-2.5x where each head has its own sum"
)
SHAPES = ((1, 16, 64), (8, 128, 768), (4, 512, 2048), (32, 1024, 1024))
QUICK_SHAPES = ((1, 16, 64), (8, 128, 768))
COLD_BYTES = 256 << 20  # several times the last-level cache of the machines at hand
COLD_BUFFERS = 256  # at most: more make the sample longer, not colder
SAMPLE_SECONDS = 0.06

Reduce = Callable[[torch.Tensor, torch.Tensor], object]  # (out, grad): writes the mean over dim 1 into out

FLOOR = "g.sum(): read the bytes (floor)"
TLFAST = "tlfast.reduce_into"
COPY_MEAN = "out.copy_(g.mean(1))"


def _mean_out(out: torch.Tensor, grad: torch.Tensor) -> object:
    return out.copy_(torch.mean(grad, 1, out=_scratch(out.shape, grad.dtype)))


def _matmul(out: torch.Tensor, grad: torch.Tensor) -> object:
    n = grad.shape[1]
    return out.copy_(torch.matmul(_weights(n, grad.dtype), grad).squeeze(1).div_(n))


_NO_ROWS, _NO_GRADIENT = torch.empty(0, 64, dtype=torch.bfloat16), torch.empty(0, 16, 64)
_held: dict[object, torch.Tensor] = {}


def _scratch(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A preallocated result in the gradient's dtype, for the variants that need one before the cast."""
    key = (shape, dtype)
    if key not in _held:
        _held[key] = torch.empty(shape, dtype=dtype)
    return _held[key]


def _weights(n: int, dtype: torch.dtype) -> torch.Tensor:
    key = (n, dtype)
    if key not in _held:
        _held[key] = torch.ones(1, n, dtype=dtype)
    return _held[key]


VARIANTS: dict[str, Reduce] = {
    FLOOR: lambda out, grad: grad.sum(),
    COPY_MEAN: lambda out, grad: out.copy_(grad.mean(1)),
    "out.copy_(torch.mean(g, 1, out=wide))": _mean_out,
    "out.copy_(g.sum(1, dtype=float32) / n)": lambda out, grad: out.copy_(
        grad.sum(1, dtype=torch.float32).div_(grad.shape[1])
    ),
    "out.copy_(ones @ g / n)": _matmul,
    "an empty call: reduce_into of no rows": lambda out, grad: tlfast.reduce_into(_NO_ROWS, _NO_GRADIENT, "mean", 1),
    TLFAST: lambda out, grad: tlfast.reduce_into(out, grad, "mean", 1),
}


def writes(name: str) -> bool:
    """Whether a variant has a result to check; the floor and the empty call have none."""
    return name != FLOOR and "empty" not in name


def gradients(shape: tuple[int, ...], dtype: torch.dtype, n_buffers: int) -> list[torch.Tensor]:
    """So many gradients of normal numbers, no two in the same memory."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator).to(dtype)
    return [first] + [first.clone() for _ in range(n_buffers - 1)]


def check_variants(variants: dict[str, Reduce], grad: torch.Tensor) -> None:
    """Check each result against the float64 mean; the row is NaN before."""
    truth, bound = reduction_bound(grad, 1, "mean", torch.bfloat16)
    # A PyTorch variant rounds twice where the gradient is bf16: to the gradient's dtype and to the row's.
    rounding = torch.finfo(grad.dtype).eps * truth.abs() if grad.dtype == torch.bfloat16 else 0.0
    for name, reduce in variants.items():
        if writes(name):
            out = torch.full((grad.shape[0], grad.shape[2]), torch.nan, dtype=torch.bfloat16)
            reduce(out, grad)
            check_close(name, out, truth, bound if name == TLFAST else bound + rounding)


def measure(variants: dict[str, Reduce], grads: list[torch.Tensor], rounds: int, seconds: float) -> Measured:
    """Time all variants over the same gradients in turn, each call on the next one."""
    out = torch.empty(grads[0].shape[0], grads[0].shape[2], dtype=torch.bfloat16)

    def sampler(reduce: Reduce) -> Callable[[], Sections]:
        def over_all() -> None:
            for grad in grads:
                reduce(out, grad)

        n_calls = calls_for(over_all, seconds)

        def sample() -> Sections:
            return {section: taken / len(grads) for section, taken in repeat(over_all, n_calls).items()}

        return sample

    return interleave({name: sampler(reduce) for name, reduce in variants.items()}, rounds)


def run(quick: bool = False, variants: dict[str, Reduce] | None = None) -> Result:
    """Measure all sizes, fp32 and bf16 gradients, from the cache and from memory."""
    variants = VARIANTS if variants is None else variants
    rounds, seconds = (3, 0.002) if quick else (11, SAMPLE_SECONDS)
    result = Result(
        "kernel", PREDICTION,
        {"reduce": "mean over dim 1", "stored": "bfloat16", "rounds": rounds, "sample_s": seconds, "quick": quick,
         "hot": "the same gradient again and again, as one just written by the layer above",
         "cold": f"gradients in turn, {COLD_BYTES >> 20} MiB or {COLD_BUFFERS} of them"},
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for shape in QUICK_SHAPES if quick else SHAPES:
            for state in ("hot", "cold"):
                n_bytes = dtype.itemsize * shape[0] * shape[1] * shape[2]
                n_buffers = (
                    1 if state == "hot" else max(1, min(COLD_BUFFERS, COLD_BYTES // n_bytes, 4 if quick else 1 << 30))
                )
                grads = gradients(shape, dtype, n_buffers)
                check_variants(variants, grads[0])
                measured = measure(variants, grads, rounds, seconds)
                name = f"{list(shape)} {str(dtype).removeprefix('torch.')} {state}".replace(", ", ",")
                result.tables.append(_table(name, measured, n_bytes))
                result.claims += _claims(name, shape, measured)
    products = kernel_product.run(quick, rounds, seconds)
    result.tables += products.tables
    result.claims += products.claims
    return result


def _table(name: str, measured: Measured, n_bytes: int) -> Table:
    rows: list[dict[str, Cell]] = []
    for variant, times in measured.items():
        total = times["total"]
        n_read = 0 if "empty" in variant else n_bytes
        rows.append(
            {"variant": variant, "median": total.median * 1e6, "min": total.min * 1e6,
             "GB/s": n_read / total.median / 1e9,
             "ratio_to_floor": total.ratio(measured[FLOOR]["total"]),
             "speedup_over_copy_mean": measured[COPY_MEAN]["total"].ratio(total), "cpu": times["cpu"].median * 1e6}
        )  # fmt: skip
    return Table(
        f"{name}: us a call", FLOOR,
        ["variant", "median", "min", "GB/s", "ratio_to_floor", "speedup_over_copy_mean", "cpu"], rows,
    )  # fmt: skip


def _claims(name: str, shape: tuple[int, ...], measured: Measured) -> list[Claim]:
    least = {(4, 512, 2048): 1.5, (8, 128, 768): 3.0}.get(shape)
    fused = measured[TLFAST]["total"]
    out = []
    if least is not None:
        out.append(
            Claim(
                f"{name}: out.copy_(g.mean(1)) / tlfast", "at least", least, measured[COPY_MEAN]["total"].ratio(fused)
            )
        )
    if shape in ((4, 512, 2048), (32, 1024, 1024)):
        out.append(Claim(f"{name}: tlfast / g.sum()", "at most", 1.15, fused.ratio(measured[FLOOR]["total"])))
    return out
