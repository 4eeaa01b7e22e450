"""The fused op on a GPU: bandwidth beside a copy, small tensors beside an empty launch, the table beside PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import tlfast

from .clock import Clock
from .measure import Measured, check_close, interleave, reduction_bound
from .report import Cell, Claim, Findings, Table

PREDICTION = (
    "kernel: a mean of [8,1024,4096] bf16 reads 64 MiB at 82-92 % of the rate at which a copy reads and writes, so the "
    "target of 85 % may be missed; [8,128,768] is one wave of blocks and about 3 us where an empty launch is about 2: "
    "1.2-1.5x, so the target of 1.3x may be missed; equal to torch.sum from 16 MiB on, 1.0-1.5x faster below; one long "
    "reduction (split) the same"
)
FLOOR = "an empty kernel launch (floor)"
COPY = "copy of the gradient's bytes"
SUM = "torch.sum(g, 1, dtype=float32, out=row)"
TLFAST = "tlfast.reduce_into"
COLD = 4  # times the cache: what gradients taken in turn hold together when they are to come from memory
COPY_BYTES = 1 << 30  # far more than any cache
SAMPLE_SECONDS = 2e-3

Run = Callable[[torch.Tensor, torch.Tensor], object]  # (out, grad)


@dataclass(frozen=True)
class Case:
    """One line of the table: a gradient, and what is made of it. Rows are stored in float32."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    reduce: str = "mean"
    masked: bool = False

    def __str__(self) -> str:
        name = f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')} {self.reduce}".replace(", ", ",")
        return name + (" masked" if self.masked else "")

    @property
    def n_bytes(self) -> int:
        """The bytes of the gradient."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return self.shape if self.reduce == "none" else (self.shape[0], self.shape[2])


LARGE, SMALL = (8, 1024, 4096), (8, 128, 768)
HALF, FULL = torch.bfloat16, torch.float32
CASES = (
    *(Case(shape, HALF, "mean") for shape in ((1, 16, 64), SMALL, (1, 1024, 768), (8, 1024, 768), (4, 512, 2048),
                                              LARGE, (32, 1024, 1024))),
    *(Case(shape, HALF, "sum") for shape in (SMALL, LARGE)),
    *(Case(shape, FULL, "mean") for shape in (SMALL, (8, 1024, 768), LARGE)),
    Case((8, 1024, 768), torch.float16, "mean"),
    Case((1, 65536, 128), HALF, "mean"),  # few results, each of many positions: the reduction is split
    *(Case((8, 1024, 768), HALF, reduce) for reduce in ("norm", "absmax", "last", "none")),
    Case((8, 1024, 768), HALF, "mean", masked=True),
)  # fmt: skip
TINY = (Case((2, 8, 16), HALF), Case((2, 8, 16), FULL, "sum"), Case((1, 64, 8), HALF), Case((2, 8, 16), HALF, "norm"),
        Case((2, 8, 16), HALF, "absmax"), Case((2, 8, 16), HALF, "last"), Case((2, 8, 16), HALF, "none"),
        Case((2, 8, 16), HALF, "mean", masked=True))  # fmt: skip


def make_mask(case: Case, device: torch.device) -> torch.Tensor | None:
    """Right padding, another length for each example, None for all real."""
    if not case.masked:
        return None
    batch, n = case.shape[:2]
    lengths = n - torch.arange(batch, device=device) * n // (2 * batch)
    return torch.arange(n, device=device) < lengths[:, None]


def variants(case: Case, mask: torch.Tensor | None) -> dict[str, Run]:
    """The fused op, what PyTorch has in its place, and ``torch.sum`` beside every reduction over positions."""

    def by_hand(out: torch.Tensor, grad: torch.Tensor) -> object:
        n = grad.shape[1] if mask is None else mask.sum(1, keepdim=True)
        kept = grad if mask is None else grad * mask[..., None]
        return out.copy_(kept.sum(1, dtype=torch.float32) / n)

    def norm(out: torch.Tensor, grad: torch.Tensor, order: float) -> object:
        return torch.linalg.vector_norm(grad, order, 1, dtype=torch.float32, out=out)

    rivals: dict[str, dict[str, Run]] = {
        "sum": {},
        "mean": {"torch.mean(g, 1, dtype=float32, out=row)": lambda out, grad: torch.mean(
            grad, 1, dtype=torch.float32, out=out)} if mask is None else {"(g * mask).sum(1) / n": by_hand},
        "norm": {"torch.linalg.vector_norm(g, 2, 1, out=row)": lambda out, grad: norm(out, grad, 2)},
        "absmax": {"torch.linalg.vector_norm(g, inf, 1, out=row)": lambda out, grad: norm(out, grad, math.inf)},
        "last": {"out.copy_(g[:, -1])": lambda out, grad: out.copy_(grad[:, -1])},
        "none": {"out.copy_(g)": lambda out, grad: out.copy_(grad)},
    }  # fmt: skip
    out: dict[str, Run] = {**rivals[case.reduce]}
    if case.reduce == "sum" or (case.reduce == "mean" and mask is None):
        out[SUM] = lambda out, grad: torch.sum(grad, 1, dtype=torch.float32, out=out)
    out[TLFAST] = lambda out, grad: tlfast.reduce_into(out, grad, case.reduce, 1, mask)
    return out


def truth(case: Case, grad: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and how far float32 may be from it."""
    eps = torch.finfo(torch.float32).eps
    if case.reduce in ("sum", "mean"):
        if mask is None:
            return reduction_bound(grad, 1, case.reduce, torch.float32)
        value, bound = reduction_bound(grad * mask[..., None], 1, "sum", torch.float32)
        n = mask.sum(1, keepdim=True)
        return value / n, bound / n + eps * (value / n).abs()
    wide = grad.double()
    if case.reduce == "norm":
        value = wide.square().sum(1).sqrt()
        return value, (grad.shape[1] + 2) * eps * value
    value = {"absmax": lambda: wide.abs().amax(1), "last": lambda: wide[:, -1], "none": lambda: wide}[case.reduce]()
    return value, torch.zeros_like(value)  # a number of the gradient, which float32 holds


def check_variants(case: Case, ways: dict[str, Run], grad: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Check each result against float64; the rows are NaN before."""
    value, bound = truth(case, grad, mask)
    for name, run in ways.items():
        out = torch.full(case.out_shape, math.nan, device=grad.device)
        run(out, grad)
        # torch.sum is compared for its time: what it makes is the mean but for the division
        scale = case.shape[1] if name == SUM and case.reduce == "mean" else 1
        check_close(f"{case}: {name}", out, value * scale, bound * scale + torch.finfo(torch.float32).eps * value.abs())


def copy_rate(clock: Clock, n_bytes: int, rounds: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    sample = clock.sampler(lambda: target.copy_(source), SAMPLE_SECONDS)
    return 2 * n_bytes / interleave({COPY: sample}, rounds)[COPY]["total"].median


def measure(case: Case, clock: Clock, rounds: int, cold: bool, ways: dict[str, Run] | None = None) -> Measured:
    """Check all variants, then time them over the same gradients, each call on the next one."""
    n_buffers = max(1, min(256, COLD * clock.cache_bytes // case.n_bytes + 1)) if cold else 1
    generator = torch.Generator(clock.device).manual_seed(0)
    first = torch.randn(case.shape, generator=generator, device=clock.device).to(case.dtype)
    grads, mask = [first, *(first.clone() for _ in range(n_buffers - 1))], make_mask(case, clock.device)
    out, target = torch.empty(case.out_shape, device=clock.device), torch.empty_like(first)
    ways = variants(case, mask) if ways is None else ways
    check_variants(case, ways, first, mask)
    samplers = {FLOOR: clock.sampler(clock.nothing, SAMPLE_SECONDS)}
    for name, run in {COPY: lambda out, grad: target.copy_(grad), **ways}.items():

        def over_all(run: Run = run) -> None:
            for grad in grads:
                run(out, grad)

        def sampled(sample: Callable[[], dict[str, float]] = clock.sampler(over_all, SAMPLE_SECONDS)):  # type: ignore[no-untyped-def] # noqa: B008
            return {section: taken / len(grads) for section, taken in sample().items()}

        samplers[name] = sampled
    return interleave(samplers, rounds)


def run(clock: Clock, quick: bool = False) -> Findings:
    """Measure every case from the cache and from memory."""
    rounds, cases = (2, TINY) if quick else (7, CASES)
    rate = copy_rate(clock, 1 << 16 if quick else COPY_BYTES, rounds)
    found, ratios = Findings(), {}
    for case in cases:
        for state in ("warm", "cold"):
            measured = measure(case, clock, rounds, state == "cold")
            found.tables.append(_table(f"{case} {state}", measured, case.n_bytes, rate))
            fused = measured[TLFAST]["total"]
            if SUM in measured:
                ratios[f"{case} {state}"] = fused.ratio(measured[SUM]["total"])
            if case == Case(LARGE, HALF, "mean") and state == "cold":
                share = case.n_bytes / fused.median / rate
                found.claims.append(Claim(f"{case} {state}: share of the copy's bandwidth", "at least", 0.85, share))
            if case == Case(SMALL, HALF, "mean") and state == "warm":
                ratio = fused.ratio(measured[FLOOR]["total"])
                found.claims.append(Claim(f"{case} {state}: tlfast / an empty launch", "at most", 1.3, ratio))
    worst = max(ratios, key=lambda name: ratios[name])
    found.claims.append(Claim(f"the worst of the table ({worst}): tlfast / torch.sum", "at most", 1, ratios[worst]))
    return found


def _table(name: str, measured: Measured, n_bytes: int, rate: float) -> Table:
    rows: list[dict[str, Cell]] = []
    for variant, times in measured.items():
        total, reads = times["total"], variant != FLOOR
        moved = n_bytes * (2 if variant == COPY else 1)
        rows.append(
            {"variant": variant, "median": total.median * 1e6, "min": total.min * 1e6,
             "GB/s": moved / total.median / 1e9 if reads else None,
             "share_of_copy": moved / total.median / rate if reads else None,
             "ratio_to_floor": total.ratio(measured[FLOOR]["total"]), "host_us": times["host"].median * 1e6}
        )  # fmt: skip
    return Table(f"kernel, {name}: us a call on the device (a large copy moves {rate / 1e9:.0f} GB/s)", FLOOR,
                 ["variant", "median", "min", "GB/s", "share_of_copy", "ratio_to_floor", "host_us"], rows)  # fmt: skip
