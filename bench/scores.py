"""Scoring a dataset of many columns that is not in memory: beside reading its bytes in order, and the plain loop."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import tlfast
from tlfast.dataset import DatasetWriter, Example, Plan, open_dataset
from tlfast.dataset.format.layout import unit_layout

from .collect import SCRATCH, file_system
from .measure import Measured, Sections, WrongResult, interleave, no_collector
from .memory import measure, peak_of
from .reading import forget, sequential
from .report import Cell, Claim, Result, Table

PREDICTION = (
    "16 queries: a unit's columns are read in the order of the disk, and converted and multiplied within a cache, while"
    " two threads read the next ones: 0.85-0.95 of the rate of reading on two cores; the plain loop waits for the disk,"
    " then computes: 0.6; memory: torch and five pieces of 8 MiB: a third of a GiB"
)
MODULES, SIDE, UNIT, K, QUERIES = 16, 16, 8192, 10, 16  # 4,096 values: 16 x 16 of each of 16 modules
FLOOR, DIRECT = "reading the bytes", "reading the bytes, O_DIRECT"
OURS, COSINE, LOOP = "tlfast.score, dot", "tlfast.score, cosine", "memmap, float, matmul, topk"
Found = tuple[torch.Tensor, torch.Tensor]  # rows and scores, [Q, k]
GIB = 1 << 30


def columns() -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """What is stored of each example."""
    return {f"h.{number}:weight": (torch.bfloat16, (SIDE, SIDE)) for number in range(MODULES)}


def rows_of(unit: int, n_rows: int) -> torch.Tensor:
    """The rows of a unit, [rows, modules, values]: those of unit 0, each unit turned by some places."""
    width = MODULES * SIDE * SIDE
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(UNIT, width, generator=generator).bfloat16() if unit == 0 else _base(width)
    return base.roll(unit * 17, 1)[:n_rows].view(n_rows, MODULES, -1)


_held: dict[int, torch.Tensor] = {}


def _base(width: int) -> torch.Tensor:
    if width not in _held:
        _held[width] = rows_of(0, UNIT).reshape(UNIT, width)
    return _held[width]


def queries_of() -> dict[str, torch.Tensor]:
    """The queries of each column."""
    generator = torch.Generator().manual_seed(2**40)
    return {name: torch.randn(QUERIES, *shape, generator=generator) for name, (_, shape) in columns().items()}


def store(folder: Path, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the dataset; return the k highest dot products and cosines of each query, as float64 or near it."""
    plan = Plan(n_rows, UNIT)
    writer = DatasetWriter(folder, header={}, columns=columns(), plan=plan)
    queries = torch.cat([q.flatten(1) for q in queries_of().values()], 1).double()
    directions = queries / queries.norm(dim=1, keepdim=True)
    best = [torch.empty(QUERIES, 0, dtype=torch.float64) for _ in range(2)]
    for number, unit in enumerate(plan.units):
        rows = rows_of(number, len(unit))
        blocks = {name: rows[:, k].reshape(len(unit), SIDE, SIDE) for k, name in enumerate(columns())}
        writer.write_unit(unit, blocks, [Example(i, [1], "", 0, 1) for i in range(unit.start, unit.stop)])
        wide = rows.reshape(len(unit), -1).double()
        scores = queries @ wide.T
        for at, found in enumerate((scores, directions @ wide.T / wide.norm(dim=1))):
            joined = torch.cat([best[at], found], 1)
            best[at] = joined.topk(min(K, joined.shape[1]), dim=1).values
    _held.clear()
    return best[0], best[1]


def check(name: str, found: Found, best: torch.Tensor) -> None:
    """Raise WrongResult unless the scores are the best, as far as float32 can tell."""
    rows, scores = found
    width = MODULES * SIDE * SIDE
    # A product and a sum each round once; sum|a b| is at most |a| |b|, 4 sqrt(width) bounds a norm of these rows.
    bound = 2 * width * torch.finfo(torch.float32).eps * (16 * width if float(best.max()) > 1 else 1)
    if rows.shape != best.shape or not bool(((scores.double() - best).abs() <= bound).all()):
        raise WrongResult(f"{name}: the scores must be the highest, as far as rounding lets one tell")
    again = [len(set(some.tolist())) for some in rows]
    if min(again) < rows.shape[1]:
        raise WrongResult(f"{name}: the rows of a query must be different ones")


def ours(folder: Path, method: str = "dot") -> Found:
    """What is measured."""
    found = tlfast.score(folder, queries_of(), method, k=K)
    return found.indices, found.scores


def loop(folder: Path) -> Found:
    """What one writes without it: each column of a unit out of a mapped file, as float32, multiplied; the best kept."""
    ds, queries = open_dataset(folder), queries_of()
    scores, rows = torch.empty(QUERIES, 0), torch.empty(QUERIES, 0, dtype=torch.int64)
    for unit in ds.units:
        at = len(unit_layout({name: ds.column(name) for name in ds.points}, unit).header)
        path, shape = folder / "data" / f"{unit.name}.safetensors", (len(unit), SIDE * SIDE)
        here = torch.zeros(QUERIES, len(unit))
        for name in ds.points:
            bits = torch.from_numpy(np.memmap(path, np.int16, "c", at, shape))
            here += queries[name].flatten(1) @ bits.view(torch.bfloat16).float().T
            at += 2 * len(unit) * SIDE * SIDE
        best = here.topk(min(K, len(unit)), dim=1)
        scores, rows = torch.cat([scores, best.values], 1), torch.cat([rows, best.indices + unit.start], 1)
        kept = scores.topk(min(K, scores.shape[1]), dim=1)
        scores, rows = kept.values, rows.gather(1, kept.indices)
    return rows, scores


def _samplers(folder: Path, best: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Callable[[], Sections]]:
    files = sorted((folder / "data").iterdir())

    def cold(run: Callable[[], Found | None], name: str, right: torch.Tensor) -> Callable[[], Sections]:
        def sample() -> Sections:
            gc.collect()  # whatever maps the files
            left = forget(folder)
            with no_collector():
                cpu, start = time.process_time(), time.perf_counter()
                found = run()
                total, cpu = time.perf_counter() - start, time.process_time() - cpu
            if found is not None:
                check(name, found, right)
            return {"total": total, "cpu": cpu, "in_memory": left}

        return sample

    def read(direct: bool) -> None:
        for path in files:
            sequential(path, path.stat().st_size, direct)

    return {
        FLOOR: cold(lambda: read(False), FLOOR, best[0]),
        DIRECT: cold(lambda: read(True), DIRECT, best[0]),
        OURS: cold(lambda: ours(folder), OURS, best[0]),
        COSINE: cold(lambda: ours(folder, "cosine"), COSINE, best[1]),
        LOOP: cold(lambda: loop(folder), LOOP, best[0]),
    }


def _table(measured: Measured, n_rows: int, peak: int) -> Table:
    width = MODULES * SIDE * SIDE
    rows: list[dict[str, Cell]] = [
        {"variant": name, "s": times["total"].median, "best_s": times["total"].min,
         "GB/s": 2 * width * n_rows / times["total"].median / 1e9,
         "ratio_to_floor": times["total"].ratio(measured[FLOOR]["total"]), "cpu_s": times["cpu"].median,
         "in_memory_percent": times["in_memory"].median * 100,
         "peak_MB": peak / 1e6 if name == OURS else None}
        for name, times in measured.items()
    ]  # fmt: skip
    title = f"{QUERIES} queries, the best {K} of {n_rows} rows of {width} bfloat16 in {MODULES} columns, not in memory"
    return Table(title, FLOOR, list(rows[0]), rows, "opening the dataset included; peak: of a whole process, torch too")


def run(quick: bool = False, rows: int | None = None) -> Result:
    """Write the dataset, check every variant, and time it."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    n_rows, rounds = rows or (UNIT + 100 if quick else 1_000_000), 2 if quick else 7
    settings = {"rows": n_rows, "columns": MODULES, "width": MODULES * SIDE * SIDE, "queries": QUERIES, "k": K,
                "rows_per_unit": UNIT, "rounds": rounds, "disk": file_system(SCRATCH), "quick": quick,
                "not_in_memory_by": "posix_fadvise before each sample"}  # fmt: skip
    result = Result("scores", PREDICTION, settings)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        place = Path(folder) / "ds"
        best = store(place, n_rows)
        check(OURS, ours(place), best[0])
        check(COSINE, ours(place, "cosine"), best[1])
        check(LOOP, loop(place), best[0])
        arguments: dict[str, object] = {"MODULES": MODULES, "SIDE": SIDE}
        peak = measure(arguments, OURS, place, "bench.scores")
        measured = interleave(_samplers(place, best), rounds)
    result.tables = [_table(measured, n_rows, peak)]
    total = {name: times["total"] for name, times in measured.items()}
    fastest = min((FLOOR, DIRECT), key=lambda name: total[name].median)
    result.claims = [
        Claim("scoring, rate / that of reading the bytes", "at least", 0.8, total[fastest].ratio(total[OURS])),
        Claim("scoring by cosine, rate / that of reading", "at least", 0.8, total[fastest].ratio(total[COSINE])),
        Claim("scoring, the plain loop / time", "at least", 1.2, total[LOOP].ratio(total[OURS])),
        Claim("scoring, peak of its process", "at most", 1.0, peak / GIB, "GiB"),
    ]
    return result


def main() -> None:
    """Score in this process alone; print its peak resident bytes, those of torch included."""
    sizes, _, folder = json.loads(sys.argv[1])
    globals().update(sizes)
    torch.set_num_threads(1)
    print(peak_of(lambda: ours(Path(folder))))


if __name__ == "__main__":
    main()
