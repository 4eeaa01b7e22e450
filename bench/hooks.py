"""What one point costs above the bare model: 200 modules, tiny gradients, alone and beside a busy Python thread."""

from __future__ import annotations

import torch
from torch import nn

from . import contention
from .measure import Measured, interleave
from .report import Claim, Result, Table, cost_rows
from .rivals import (
    AUTO,
    AUTO_FULL,
    BARE,
    EMPTY,
    FULL_HOOK,
    FULL_HOOKS,
    NATIVELY,
    RETURNING,
    TENSOR_HOOK,
    Attach,
    Keep,
)
from .training import Job, check_variants, sampler

PREDICTION = (
    "per point above the bare model: Python full hook 58 us, empty full hook 48, Python tensor hook 14, tlfast auto "
    "about 5 on identity modules (its own autograd node) and 2 on fresh outputs (a hook on the node that is there); "
    "beside a busy thread the Python hooks wait for the GIL at every point, tlfast's backward doesn't change; "
    "full hooks called natively 9 us, 15 with the reduction and the copy, a capture with attach=full 8"
)
SHAPE = (1, 4, 8)
LARGER = (4, 64, 512)  # so much work between two points that a busy thread wakes up in between


class Point(nn.Module):
    """An identity module, as TransformerLens' HookPoint: its output is its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x."""
        return x


class Scale(nn.Module):
    """A module with a fresh output."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the factor."""
        return x * self.factor


class Chain(nn.Module):
    """The same products in both kinds, so that each point has a gradient of its own; where they stand is the kind."""

    def __init__(self, n_points: int, kind: str):
        super().__init__()
        self.factors = [1 + (i * 37 % 11 - 5) / 100 for i in range(n_points)]  # their product stays near 1
        self.points = nn.ModuleList(Point() if kind == "identity" else Scale(f) for f in self.factors)
        self.outside = kind == "identity"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run through all points."""
        if self.outside:
            for point, factor in zip(self.points, self.factors, strict=True):
                x = point(x * factor)
        else:
            for point in self.points:
                x = point(x)
        return x


def chain_job(kind: str, shape: tuple[int, int, int], n_points: int, n_steps: int) -> Job:
    """A chain with a leaf at its start and a weighted sum as its loss."""
    generator = torch.Generator().manual_seed(0)
    chain = Chain(n_points, kind)
    leaf = torch.randn(shape, generator=generator, requires_grad=True)
    weights = torch.randn(shape, generator=generator)
    names = tuple(f"points.{i}" for i in range(n_points))
    keep = Keep(names, "sum", torch.float32, (shape[0], shape[2]), n_steps + 2)
    return Job(chain, lambda: (chain(leaf) * weights).sum(), [leaf], keep)


def claims(kind: str, alone: Measured, busy: Measured) -> list[Claim]:
    """The figures of this kind of module, each beside its target."""

    def above(name: str) -> float:
        return alone[name]["total"].above(alone[BARE]["total"])

    return [
        Claim(f"{kind}: Python full hook / tlfast auto, per point", "at least", 10 if kind == "identity" else 18,
              above(FULL_HOOK) / above(AUTO)),
        Claim(f"{kind}: tlfast auto / Python tensor hook, per point", "at most", 1, above(AUTO) / above(TENSOR_HOOK)),
        Claim(f"{kind}: tlfast auto's backward beside a busy thread / alone", "at most", 1.5,
              contention.backward_ratio(busy, AUTO)),
        Claim(f"{kind}: {EMPTY}{NATIVELY} / as PyTorch calls it, per point", "at most", 0.2,
              above(EMPTY + NATIVELY) / above(EMPTY)),
        Claim(f"{kind}: {RETURNING}{NATIVELY} / as PyTorch calls it, per point", "at most", 0.2,
              above(RETURNING + NATIVELY) / above(RETURNING)),
        Claim(f"{kind}: {FULL_HOOK}{NATIVELY} / as PyTorch calls it, per point", "at most", 0.3,
              above(FULL_HOOK + NATIVELY) / above(FULL_HOOK)),
        Claim(f"{kind}: {FULL_HOOK}{NATIVELY} / as PyTorch calls it, in a backward beside a busy thread", "at most", 1,
              contention.cost_ratio(busy, FULL_HOOK + NATIVELY, FULL_HOOK)),
        Claim(f"{kind}: tlfast full / {FULL_HOOK}, per point", "at most", 0.2, above(AUTO_FULL) / above(FULL_HOOK)),
    ]  # fmt: skip


def run(quick: bool = False, variants: dict[str, Attach] | None = None) -> Result:
    """Measure both kinds of module."""
    variants = FULL_HOOKS if variants is None else variants
    n_points, n_steps, rounds = (20, 2, 3) if quick else (200, 20, 11)
    result = Result(
        "hooks", PREDICTION,
        {"points": n_points, "gradient": list(SHAPE), "larger_gradient": list(LARGER), "rounds": rounds,
         "steps": n_steps, "switch_interval_s": contention.SWITCH_INTERVAL, "quick": quick},
    )  # fmt: skip
    pair = {name: variants[name] for name in (BARE, FULL_HOOK, FULL_HOOK + NATIVELY, TENSOR_HOOK, AUTO)}
    for kind in ("identity", "fresh"):
        job = chain_job(kind, SHAPE, n_points, n_steps)
        check_variants(job, variants)
        alone = interleave({name: sampler(job, attach, n_steps) for name, attach in variants.items()}, rounds)
        result.tables.append(
            Table(f"{kind} modules: us a step; us a point above the floor", BARE,
                  ["variant", "median", "min", "ratio_to_floor", "total_above_floor", "min_above_floor",
                   "forward_above_floor", "backward_above_floor", "free_above_floor", "cpu_above_floor"],
                  cost_rows(alone, BARE, n_points))
        )  # fmt: skip
        busy = contention.measure(job, pair, n_steps // 2, rounds)
        result.tables.append(contention.table(f"{kind} modules beside a busy thread", busy, n_points))
        result.claims += claims(kind, alone, busy)
    job = chain_job("fresh", LARGER, n_points, n_steps)
    busy = contention.measure(job, pair, n_steps // 2, rounds)
    title = f"fresh modules, gradients {list(LARGER)}, beside a busy thread"
    result.tables.append(contention.table(title, busy, n_points))
    return result
