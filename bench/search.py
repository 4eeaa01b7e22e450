"""Searching a dataset that is not in memory: beside reading its bytes in order, and the plain loop in Python."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tlfast.dataset import DatasetWriter, Example, Plan, open_dataset
from tlfast.dataset.format.layout import unit_layout

from .collect import SCRATCH, file_system
from .measure import Measured, Sections, WrongResult, interleave, no_collector
from .reading import forget, sequential
from .report import Cell, Claim, Result, Table

PREDICTION = (
    "16 queries: rows are converted and multiplied at about the disk's rate on one core, while a thread reads the next"
    " blocks: 1.1x the time of reading; the plain loop waits for the disk, then computes: 1.8x"
)
WIDTH, UNIT, K, QUERIES = 1024, 8192, 10, 16
POINT = "h"
FLOOR, DIRECT = "reading the bytes", "reading the bytes, O_DIRECT"
OURS, LOOP = "ds.search", "memmap, float, matmul, topk"
Found = tuple[torch.Tensor, torch.Tensor]  # rows and scores, [Q, k]


def rows_from(start: int, stop: int) -> torch.Tensor:
    """The rows ``start`` to ``stop``."""
    return torch.randn(stop - start, WIDTH, generator=torch.Generator().manual_seed(start)).bfloat16()


def store(folder: Path, n_rows: int, queries: torch.Tensor) -> torch.Tensor:
    """Write the dataset; return the k highest scores of each query in float64, [Q, k]."""
    plan = Plan(n_rows, UNIT)
    writer = DatasetWriter(folder, header={}, columns={POINT: (torch.bfloat16, (WIDTH,))}, plan=plan)
    best = torch.empty(len(queries), 0, dtype=torch.float64)
    for unit in plan.units:
        rows = rows_from(unit.start, unit.stop)
        writer.write_unit(unit, {POINT: rows}, [Example(i, [1], "", 0, 1) for i in range(unit.start, unit.stop)])
        scores = queries.double() @ rows.double().T
        best = torch.cat([best, scores], 1).topk(min(K, best.shape[1] + scores.shape[1]), dim=1).values
    return best


def check(name: str, found: Found, best: torch.Tensor, queries: torch.Tensor) -> None:
    """Raise WrongResult unless rows and scores are the best, as far as float32 can tell."""
    rows, scores = found
    unit = rows[0, 0] // UNIT * UNIT
    one = rows_from(int(unit), int(unit) + UNIT)[int(rows[0, 0] - unit)].double()
    # a product and a sum each round once
    bound = 2 * WIDTH * torch.finfo(torch.float32).eps * float((queries[0].double().abs() * one.abs()).sum())
    right = rows.shape == best.shape and bool(((scores.double() - best).abs() <= 2 * bound).all())
    if not right or abs(float(queries[0].double() @ one) - float(best[0, 0])) > 2 * bound:
        raise WrongResult(f"{name}: the scores must be the highest, as far as rounding lets one tell")


def ours(folder: Path, queries: torch.Tensor) -> Found:
    """What is measured."""
    found = open_dataset(folder).search(queries, K)
    return found.indices, found.scores


def loop(folder: Path, queries: torch.Tensor) -> Found:
    """What one writes without it: each unit's rows out of a mapped file, as float32, multiplied, the best kept."""
    ds = open_dataset(folder)
    scores, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for unit in ds.units:
        header = len(unit_layout({POINT: ds.column(POINT)}, unit).header)
        path, shape = folder / "data" / f"{unit.name}.safetensors", (len(unit), WIDTH)
        bits = torch.from_numpy(np.memmap(path, np.int16, "c", header, shape))
        here = queries @ bits.view(torch.bfloat16).float().T
        best = here.topk(min(K, len(unit)), dim=1)
        scores, rows = torch.cat([scores, best.values], 1), torch.cat([rows, best.indices + unit.start], 1)
        kept = scores.topk(min(K, scores.shape[1]), dim=1)
        scores, rows = kept.values, rows.gather(1, kept.indices)
    return rows, scores


def _samplers(folder: Path, queries: torch.Tensor, best: torch.Tensor) -> dict[str, Callable[[], Sections]]:
    files = sorted((folder / "data").iterdir())

    def cold(run: Callable[[], Found | None], name: str) -> Callable[[], Sections]:
        def sample() -> Sections:
            gc.collect()  # whatever maps the files
            left = forget(folder)
            with no_collector():
                cpu, start = time.process_time(), time.perf_counter()
                found = run()
                total, cpu = time.perf_counter() - start, time.process_time() - cpu
            if found is not None:
                check(name, found, best, queries)
            return {"total": total, "cpu": cpu, "in_memory": left}

        return sample

    def read(direct: bool) -> None:
        for path in files:
            sequential(path, path.stat().st_size, direct)

    return {
        FLOOR: cold(lambda: read(False), FLOOR),
        DIRECT: cold(lambda: read(True), DIRECT),
        OURS: cold(lambda: ours(folder, queries), OURS),
        LOOP: cold(lambda: loop(folder, queries), LOOP),
    }


def _table(measured: Measured, n_rows: int) -> Table:
    rows: list[dict[str, Cell]] = [
        {"variant": name, "s": times["total"].median, "best_s": times["total"].min,
         "GB/s": 2 * WIDTH * n_rows / times["total"].median / 1e9,
         "ratio_to_floor": times["total"].ratio(measured[FLOOR]["total"]), "cpu_s": times["cpu"].median,
         "in_memory_percent": times["in_memory"].median * 100}
        for name, times in measured.items()
    ]  # fmt: skip
    title = f"{QUERIES} queries, the best {K} of {n_rows} rows of {WIDTH} bfloat16, not in memory"
    return Table(title, FLOOR, list(rows[0]), rows, "opening the dataset included")


def run(quick: bool = False, rows: int | None = None) -> Result:
    """Write the dataset, check every variant, and time it."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    n_rows, rounds = rows or (UNIT + 100 if quick else 1_000_000), 2 if quick else 5
    settings = {"rows": n_rows, "width": WIDTH, "queries": QUERIES, "k": K, "rows_per_unit": UNIT, "rounds": rounds,
                "disk": file_system(SCRATCH), "quick": quick}  # fmt: skip
    result = Result("search", PREDICTION, settings)
    queries = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(2**40))
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        place = Path(folder) / "ds"
        best = store(place, n_rows, queries)
        for name, search in ((OURS, ours), (LOOP, loop)):
            check(name, search(place, queries), best, queries)
        measured = interleave(_samplers(place, queries, best), rounds)
    result.tables = [_table(measured, n_rows)]
    total = {name: times["total"] for name, times in measured.items()}
    fastest = min((FLOOR, DIRECT), key=lambda name: total[name].median)
    result.claims = [
        Claim("search, time / reading the bytes", "at most", 1.25, total[OURS].ratio(total[fastest])),
        Claim("search, the plain loop / time", "at least", 1.2, total[LOOP].ratio(total[OURS])),
    ]
    return result
