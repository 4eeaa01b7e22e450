"""How soon a run of ten thousand units goes on: opening the dataset, and the way to the first forward."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tlfast
from tlfast.collecting.progress import Report

from .collect import SCRATCH, Work, file_system, make_work
from .measure import WrongResult
from .report import Cell, Claim, Result, Table

PREDICTION = (
    "two listings and one small file a unit: 0.4 s to open 10,000 units; a run that continues does that once, hashes "
    "its examples and the model and takes two tokens through it: 0.7 s to its first batch"
)


FLOOR = "list the folders, read the commits"


class _FirstForward(Exception):
    """The model was called for the first unit: the time is taken, the rest of the run isn't wanted."""


def _collect(work: Work, out: Path) -> Report:
    examples = [batch.input_ids for batch in work.batches]
    return tlfast.collect(
        work.model, examples, out, points=list(work.points), reduce=work.reduce,  # type: ignore[arg-type]
        dtype=torch.bfloat16, batch_tokens=examples[0].numel(), rows_per_unit=work.rows_per_unit, progress=False,
    )  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _list(out: Path) -> None:
    for folder in ("commits", "data", "rows"):
        for entry in os.scandir(out / folder):
            if folder == "commits":
                Path(entry.path).read_bytes()
            else:
                entry.stat()


def _until_computing(work: Work, out: Path) -> float:
    """Seconds from the call of `collect`, the model being loaded, to its first forward that isn't the probe's."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first is the probe, which finds the shapes of the rows
            raise _FirstForward

    handle = work.model.register_forward_pre_hook(count)
    start = time.perf_counter()
    try:
        _collect(work, out)
    except _FirstForward:
        return time.perf_counter() - start
    finally:
        handle.remove()
    raise WrongResult("resume: the run must have a unit to compute, got none")


def run(quick: bool = False) -> Result:
    """Collect a dataset of many units, take the last one's commit away, and go on several times."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    n_units, rounds = (50, 2) if quick else (10_000, 7)
    work = make_work("mean", n_layers=2, width=32, length=16, batch=1, n_examples=n_units, rows_per_unit=1)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        out = Path(folder)
        made_s = _collect(work, out).time_s
        whole = tlfast.open_dataset(out)
        expected = {point: whole[point][:] for point in work.points}
        listed_s = [_seconds(lambda: _list(out)) for _ in range(rounds)]
        opened_s = [_seconds(lambda: tlfast.open_dataset(out)) for _ in range(rounds)]
        (out / "commits" / f"u{n_units - 1:06d}.json").unlink()
        computing_s = [_until_computing(work, out) for _ in range(rounds)]
        _collect(work, out)
        for point, rows in expected.items():
            if not torch.equal(tlfast.open_dataset(out)[point][:], rows):
                raise WrongResult(f"resume: the rows at {point} must be those of the undisturbed run")
    figures = {FLOOR: listed_s, "open_dataset": opened_s, "collect to its first forward": computing_s}
    base = statistics.median(listed_s)
    rows_: list[dict[str, Cell]] = [
        {"variant": what, "median_s": statistics.median(times), "min_s": min(times),
         "ratio_to_floor": statistics.median(times) / base}
        for what, times in figures.items()
    ]  # fmt: skip
    title = f"{n_units} units of one row at {len(work.points)} points, made in {made_s:.0f} s"
    columns = ["variant", "median_s", "min_s", "ratio_to_floor"]
    return Result(
        "dataset_resume", PREDICTION, {"disk": file_system(SCRATCH), "rounds": rounds, "quick": quick},
        [Table(title, FLOOR, columns, rows_, "files in the page cache")],
        [Claim(f"seconds to open {n_units} units", "at most", 1, statistics.median(opened_s), " s"),
         Claim("seconds from a loaded model to computing", "at most", 2, statistics.median(computing_s), " s")],
    )  # fmt: skip
