"""The fused op of products by itself: gradient times activation, summed over the width, beside reading both of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

import tlfast

from .measure import Measured, Sections, calls_for, check_close, interleave, reduction_bound, repeat
from .report import Cell, Claim, Findings, Table

# Examples, positions, width; a fourth dimension splits the width into heads, of which each has a sum of its own.
SHAPES = ((8, 128, 768), (8, 128, 12, 64), (4, 512, 2048), (32, 1024, 1024))
QUICK_SHAPES = ((8, 128, 768), (8, 128, 12, 64))
CLAIMED = ((4, 512, 2048), (32, 1024, 1024))
COLD_BYTES = 256 << 20  # as of the gradients in `kernel`
MOST_PAIRS = 256

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]  # (out, grad, act): sums over the last dim
Pair = tuple[torch.Tensor, torch.Tensor]

FLOOR = "g.sum(), a.sum(): read the bytes of both (floor)"
TLFAST = "tlfast.reduce_product_into"
SUM = "out.copy_((g * a).sum(-1))"
EINSUM = 'out.copy_(einsum("...d,...d->...", g, a))'
MATMUL = "out.copy_(g[..., None, :] @ a[..., None])"

VARIANTS: dict[str, Multiply] = {
    FLOOR: lambda out, grad, act: (grad.sum(), act.sum()),
    SUM: lambda out, grad, act: out.copy_((grad * act).sum(-1)),
    EINSUM: lambda out, grad, act: out.copy_(torch.einsum("...d,...d->...", grad, act)),
    MATMUL: lambda out, grad, act: out.copy_((grad.unsqueeze(-2) @ act.unsqueeze(-1)).flatten(-3)),
    TLFAST: lambda out, grad, act: tlfast.reduce_product_into(out, grad, act, "sum", -1),
}


def pairs(shape: tuple[int, ...], dtype: torch.dtype, n_pairs: int) -> list[Pair]:
    """So many gradients and activations of normal numbers, no two in the same memory."""
    generator = torch.Generator().manual_seed(0)
    grad, act = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return [(grad, act)] + [(grad.clone(), act.clone()) for _ in range(n_pairs - 1)]


def check_variants(variants: dict[str, Multiply], grad: torch.Tensor, act: torch.Tensor) -> None:
    """Check each result against the float64 sum; the row is NaN before."""
    product = grad.double() * act.double()
    truth, bound = reduction_bound(product, -1, "sum", torch.float32)
    bound = bound + torch.finfo(torch.float32).eps * product.abs().sum(-1)  # of each product
    # PyTorch rounds each product, and each sum, to the dtype of the two.
    rounding = 2 * torch.finfo(grad.dtype).eps * product.abs().sum(-1)
    for name, multiply in variants.items():
        if name != FLOOR:
            out = torch.full(grad.shape[:-1], torch.nan)
            multiply(out, grad, act)
            check_close(name, out, truth, bound if name == TLFAST else bound + rounding)


def measure(variants: dict[str, Multiply], given: list[Pair], rounds: int, seconds: float) -> Measured:
    """Time all variants over the same pairs in turn, each call on the next one."""
    out = torch.empty(given[0][0].shape[:-1])

    def sampler(multiply: Multiply) -> Callable[[], Sections]:
        def over_all() -> None:
            for grad, act in given:
                multiply(out, grad, act)

        n_calls = calls_for(over_all, seconds)

        def sample() -> Sections:
            return {section: taken / len(given) for section, taken in repeat(over_all, n_calls).items()}

        return sample

    return interleave({name: sampler(multiply) for name, multiply in variants.items()}, rounds)


def run(quick: bool, rounds: int, seconds: float) -> Findings:
    """Measure all sizes, both operands fp32 or bf16, from the cache and from memory."""
    found = Findings()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in QUICK_SHAPES if quick else SHAPES:
            n_bytes = 2 * dtype.itemsize * torch.Size(shape).numel()
            n_cold = 2 if quick else max(1, min(MOST_PAIRS, COLD_BYTES // n_bytes))
            for state, n_pairs in (("hot", 1), ("cold", n_cold)):
                given = pairs(shape, dtype, n_pairs)
                check_variants(VARIANTS, *given[0])
                measured = measure(VARIANTS, given, rounds, seconds)
                name = f"grad x act {list(shape)} {str(dtype).removeprefix('torch.')} {state}".replace(", ", ",")
                found.tables.append(_table(name, measured, n_bytes))
                if shape in (QUICK_SHAPES if quick else CLAIMED):
                    ratio = measured[TLFAST]["total"].ratio(measured[FLOOR]["total"])
                    found.claims.append(Claim(f"{name}: tlfast / reading both", "at most", 1.15, ratio))
    return found


def _table(name: str, measured: Measured, n_bytes: int) -> Table:
    best = min((measured[rival] for rival in (SUM, EINSUM, MATMUL)), key=lambda times: times["total"].median)
    rows: list[dict[str, Cell]] = []
    for variant, times in measured.items():
        total = times["total"]
        rows.append(
            {"variant": variant, "median": total.median * 1e6, "min": total.min * 1e6,
             "GB/s": n_bytes / total.median / 1e9,
             "ratio_to_floor": total.ratio(measured[FLOOR]["total"]),
             "speedup_over_best_simple": best["total"].ratio(total), "cpu": times["cpu"].median * 1e6}
        )  # fmt: skip
    return Table(
        f"{name}: us a call", FLOOR,
        ["variant", "median", "min", "GB/s", "ratio_to_floor", "speedup_over_best_simple", "cpu"], rows,
    )  # fmt: skip
