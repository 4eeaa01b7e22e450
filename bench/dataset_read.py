"""Reading a dataset: rows here and there, in memory and not; shuffled batches; against files, Lance, Hugging Face."""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tlfast.dataset import open_dataset

from .collect import SCRATCH, file_system
from .measure import Measured, Sections, WrongResult, interleave, no_collector
from .reading import (
    BLOCK_ROWS,
    MIXED,
    POINT,
    ROW_BYTES,
    Batch,
    Stored,
    forget,
    hf_batches,
    ids_in,
    lance_batches,
    our_batches,
    raw_rows,
    rows_from,
    sequential,
    store,
)  # fmt: skip
from .report import Cell, Claim, Result, Table

PREDICTION = (
    "warm: one gather over all units costs a tenth more than numpy's on one file; pread twice that, its system calls. "
    "cold: asking for all rows before touching the first keeps the disk's queue full, 5x naive faults; pread about the "
    "same. batches: the disk's rate but for the first group, 1.1x the time of reading in order; Lance 2x slower, "
    "Hugging Face 100x and more, which converts every row in Python"
)
Read = Callable[[np.ndarray], torch.Tensor]  # row numbers -> their bits
N_RANDOM = 10_000
WARM_CALLS = 10  # of as many rows each, in a sample
UNIT = 8192  # rows of a unit: 12.6 MB; rows_from begins anew with each
FLOOR, DISK, DIRECT = "numpy.memmap", "disk in order", "disk in order, O_DIRECT"


def _checked(name: str, rows: torch.Tensor, ids: torch.Tensor) -> None:
    """Raise WrongResult unless rows are those with these ids, the first of them to the bit."""
    start = int(ids[0]) - int(ids[0]) % UNIT
    truth = torch.from_numpy(rows_from(start, start + UNIT))[int(ids[0]) - start]
    if not torch.equal(ids_in(rows), ids) or not torch.equal(rows[0], truth):
        raise WrongResult(f"{name}: rows must be those that were written, to the bit")


def _random_samplers(stored: Stored, cold: bool) -> dict[str, Callable[[], Sections]]:
    """Samplers that read random rows of an own choice each time; cold: of files that are not in memory."""
    generator = np.random.default_rng(0)

    def through(name: str, make: Callable[[], Read], where: Path) -> Callable[[], Sections]:
        kept = None if cold else make()

        def sample() -> Sections:
            calls = [generator.integers(0, stored.n_rows, N_RANDOM) for _ in range(1 if cold else WARM_CALLS)]
            if cold:
                gc.collect()  # whatever maps the files
                left = forget(where if where.is_dir() else where.parent)
            read = make() if kept is None else kept
            if not cold:  # the first touch of a page in a mapping is a fault, also where it is in memory
                _checked(name, read(np.concatenate(calls)), torch.from_numpy(np.concatenate(calls)))
            with no_collector():
                cpu, start = time.process_time(), time.perf_counter()
                for rows in calls:
                    found = read(rows)
                total, cpu = time.perf_counter() - start, time.process_time() - cpu
            _checked(name, found, torch.from_numpy(rows))
            n = N_RANDOM * len(calls)
            return {"total": total / n, "cpu": cpu / n} | ({"in_memory": left} if cold else {})

        return sample

    def mapped() -> Read:
        raw = raw_rows(stored)
        return lambda rows: torch.from_numpy(raw[rows])

    def ours(access: str) -> Callable[[], Read]:
        def make() -> Read:
            column = open_dataset(stored.ours, access=access)[POINT]  # type: ignore[arg-type]
            return lambda rows: column[rows].view(torch.int16)

        return make

    if not cold:  # all of it into memory
        raw_rows(stored).max()
        open_dataset(stored.ours)[POINT][:]
    return {
        FLOOR: through(FLOOR, mapped, stored.raw),
        "tlfast, mmap": through("tlfast, mmap", ours("mmap"), stored.ours),
        "tlfast, pread": through("tlfast, pread", ours("pread"), stored.ours),
    }


def _stream(name: str, batches: Callable[[], Iterator[Batch]], n_rows: int) -> Sections:
    """Take about so many rows in batches; seconds a row."""
    taken = 0
    with no_collector():
        cpu, start = time.process_time(), time.perf_counter()
        stream = batches()
        while taken < n_rows:
            ids, rows = next(stream)
            taken += len(ids)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
    _checked(name, rows, ids)
    del stream
    return {"total": total / taken, "cpu": cpu / taken}


def _stream_samplers(stored: Stored, n_rows: int, batch_size: int) -> dict[str, Callable[[], Sections]]:
    def cold(where: Path, sample: Callable[[], Sections]) -> Callable[[], Sections]:
        def run() -> Sections:
            gc.collect()
            left = forget(where if where.is_dir() else where.parent)
            return sample() | {"in_memory": left}

        return run

    def in_order(direct: bool) -> Sections:
        start = time.perf_counter()
        sequential(stored.raw, n_rows * ROW_BYTES, direct)
        return {"total": (time.perf_counter() - start) / n_rows, "cpu": 0.0}

    few = min(n_rows, stored.hf_rows // 2)
    return {
        DISK: cold(stored.raw, lambda: in_order(False)),
        DIRECT: cold(stored.raw, lambda: in_order(True)),
        "tlfast": cold(stored.ours, lambda: _stream("tlfast", lambda: our_batches(stored, batch_size), n_rows)),
        "Lance": cold(stored.lance, lambda: _stream("Lance", lambda: lance_batches(stored, batch_size), n_rows)),
        "HF Array2D": cold(stored.hf, lambda: _stream("HF", lambda: hf_batches(stored, batch_size), few)),
    }


def _table(title: str, measured: Measured, floor: str, n: int, note: str) -> Table:
    rows: list[dict[str, Cell]] = [
        {"variant": name, "ms": times["total"].median * n * 1e3, "best_ms": times["total"].min * n * 1e3,
         "rows/s": 1 / times["total"].median, "ratio_to_floor": times["total"].ratio(measured[floor]["total"]),
         "cpu_ms": times["cpu"].median * n * 1e3,
         "in_memory_percent": times["in_memory"].median * 100 if "in_memory" in times else None}
        for name, times in measured.items()
    ]  # fmt: skip
    return Table(title, floor, [key for key in rows[0] if rows[0][key] is not None], rows, note)


def _check_streams(stored: Stored, batch_size: int) -> None:
    """Compare the first batches of every variant with what was written."""
    for name, batches in (("tlfast", our_batches), ("Lance", lance_batches), ("HF", hf_batches)):
        for ids, rows in itertools.islice(batches(stored, batch_size), 3):
            _checked(name, rows, ids)


def run(quick: bool = False) -> Result:
    """Write the rows in every form, check them, and time reading them."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    n_rows, hf_rows, streamed, rounds = (2 * UNIT, 1024, UNIT, 2) if quick else (256 * UNIT, 20_000, 1_000_000, 7)
    batch_size = 256
    settings = {
        "rows": n_rows, "row_bytes": ROW_BYTES, "rows_per_unit": UNIT, "rounds": rounds, "disk": file_system(SCRATCH),
        "quick": quick,
    }  # fmt: skip
    result = Result("dataset_read", PREDICTION, settings)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        stored = store(Path(folder), n_rows, UNIT, hf_rows)
        _check_streams(stored, batch_size)
        cold = interleave(_random_samplers(stored, cold=True), rounds)
        streams = interleave(_stream_samplers(stored, streamed, batch_size), rounds)
        warm = interleave(_random_samplers(stored, cold=False), rounds)
    shape = f"of {n_rows} rows of {ROW_BYTES} bytes in {n_rows // UNIT} units"
    result.tables = [
        _table(f"{N_RANDOM} random rows {shape}, in memory", warm, FLOOR, N_RANDOM, "one indexing"),
        _table(f"{N_RANDOM} random rows {shape}, not in memory", cold, FLOOR, N_RANDOM, "one indexing"),
        _table(
            f"batches of {batch_size} {shape}, shuffled in blocks of {BLOCK_ROWS} rows, {MIXED} mixed; not in memory",
            streams, DISK, streamed, f"ms: for {streamed} rows; HF Array2D has {hf_rows} rows, shuffled one by one",
        ),
    ]  # fmt: skip
    disk = min((streams[name] for name in (DISK, DIRECT)), key=lambda times: times["total"].median)
    ours = streams["tlfast"]["total"]
    result.claims = [
        Claim("warm random rows, time / numpy.memmap", "at most", 1.3, _ratio(warm, "tlfast, mmap", FLOOR)),
        Claim("cold random rows, numpy.memmap / time, mapped", "at least", 4, _ratio(cold, FLOOR, "tlfast, mmap")),
        Claim("cold random rows, numpy.memmap / time, pread", "at least", 4, _ratio(cold, FLOOR, "tlfast, pread")),
        Claim("shuffled batches, Lance / time", "at least", 1.5, _ratio(streams, "Lance", "tlfast")),
        Claim("shuffled batches, HF Array2D / time", "at least", 50, _ratio(streams, "HF Array2D", "tlfast")),
        Claim("shuffled batches, time / the disk in order", "at most", 1.5, ours.ratio(disk["total"])),
    ]
    return result


def _ratio(measured: Measured, a: str, b: str) -> float:
    return measured[a]["total"].ratio(measured[b]["total"])
