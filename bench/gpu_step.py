"""A step of GPT-2 shapes on a GPU, taps at every residual point and MLP output, drained to disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from .clock import Clock
from .collect import SCRATCH
from .gpu_storing import EAGER, EMPTY, FLOOR, FULL_CPU, GRAPH, TENSOR, Way, make_variants
from .gpu_work import MIDDLE, SMALL, TINY, Shape, Timed, check_rows, make_model, make_work, watched
from .measure import Measured, Sections, interleave
from .report import Claim, Findings, Table, cost_rows

PREDICTION = (
    "step: at batch 1 and 2 the eager step is bound by its launches, 8-12 ms, of which the GPU works "
    "2-4: 24 taps of 5.5-6.5 us are 1-2 %, empty full hooks +10 %, tensor hooks +10 %, full hooks with .cpu() +30-60 % "
    "(every one waits for the GPU); a graph takes the GPU's own time: 2.5-4x at batch 1, 1.5-2.5x at batch 2, under "
    "1.5x at batch 4, where the GPU itself is the limit, so 2x may be missed there; at batch 8 taps cost 0.5-1.5 %"
)
RUNS = ((SMALL, (1, 2, 4, 8)), (MIDDLE, (1, 8)))  # each shape with its batch sizes
LAUNCH_BOUND = (1, 2, 4)


def check_variants(work: Timed, variants: dict[str, Way]) -> None:
    """Let each variant do two batches, and compare what it reads back with the gradients of that very backward."""
    for name, way in variants.items():
        seen = watched(work, 2)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
            way.run(seen, Path(out))
            if way.read is not None:
                check_rows(name, seen, {point: way.read(seen, Path(out), point) for point in seen.points})


def sampler(work: Timed, way: Way) -> Callable[[], Sections]:
    """What runs all units once, into a new folder."""

    def sample() -> Sections:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
            way.run(work, Path(out))
        return {"total": work.step_time_s}

    return sample


def run(clock: Clock, quick: bool = False, variants: dict[str, Way] | None = None) -> Findings:
    """Measure both shapes at their batch sizes."""
    variants = make_variants(clock) if variants is None else variants
    SCRATCH.mkdir(parents=True, exist_ok=True)
    runs, rounds, steps_per_unit, n_units = (((TINY, (1, 2)),), 2, 2, 1) if quick else (RUNS, 7, 4, 2)
    found = Findings()
    for shape, batches in runs:
        model = make_model(shape, clock)
        for batch in batches:
            work = make_work(shape, model, clock, batch, steps_per_unit, n_units)
            check_variants(work, variants)
            measured = interleave({name: sampler(work, way) for name, way in variants.items()}, rounds)
            found.tables.append(_table(shape, batch, measured))
            found.claims += _claims(f"{shape.name}, batch {batch}", batch, measured)
    return found


def _table(shape: Shape, batch: int, measured: Measured) -> Table:
    rows = cost_rows(measured, FLOOR, unit=1e3)
    for row in rows:
        times = measured[str(row["variant"])]["total"]
        row["overhead_percent"] = (times.ratio(measured[FLOOR]["total"]) - 1) * 100
        row["speedup_over_floor"] = measured[FLOOR]["total"].ratio(times)
        row["tokens/s"] = batch * shape.length / times.median
    title = f"step, {shape.name}, bf16, batch {batch}, {shape.length} positions, {2 * shape.n_layers} points: ms a step"
    columns = ["variant", "median", "min", "ratio_to_floor", "overhead_percent", "speedup_over_floor", "tokens/s"]
    return Table(title, FLOOR, columns, rows)


def _claims(where: str, batch: int, measured: Measured) -> list[Claim]:
    base = measured[FLOOR]["total"]
    over = {name: (times["total"].ratio(base) - 1) * 100 for name, times in measured.items()}
    beside = ", ".join(f"{name} {over[name]:.1f} %" for name in (EMPTY, FULL_CPU, TENSOR) if name in over)
    claims = [Claim(f"{where}: eager over the floor ({beside})", "at most", 2, over[EAGER], " %")]
    if batch in LAUNCH_BOUND:
        gain = base.ratio(measured[GRAPH]["total"])
        claims.append(Claim(f"{where}: eager floor / CUDA graph with taps", "at least", 2, gain))
    return claims
