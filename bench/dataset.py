"""The dataset on disk: how fast a unit gets there for good, and how fast all of it is read back and checked."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

import tlfast
from tlfast.dataset.places.durable import open_regular

from . import dataset_read, dataset_resume, memory
from .collect import SCRATCH, file_system
from .measure import Measured, Sections, WrongResult, interleave
from .report import Cell, Claim, Result, Table
from .writing import NATIVE, PYTHON, RAW, SAVE_FILE, VARIANTS, WHOLE, Input, bytes_of, make_input

PREDICTION = (
    "two threads keep the disk busy while a third finds CRC and norms: the unit file at 97 % of raw O_DIRECT, "
    "write_unit at 93 % (the row table is encoded while the disk is at work, a few syncs are not); CPU 0.05 s a GB "
    "raw, 0.2 with CRC and norms, which is a tenth of save_file's 2; pure Python, through the cache, as fast as "
    "save_file; no memory but a page; verify at 90 % of the disk's sequential rate"
)
PIECES = 2 * 4 << 20  # two blocks of tlfast.dataset.write.payload
READ_BYTES = 8 << 20


def check_variants(unit: Input) -> None:
    """Let each variant that keeps the order of the file write a unit, and compare every byte."""
    expected = bytes_of(unit.tensors)
    for name in (RAW, NATIVE, PYTHON, WHOLE):
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            VARIANTS[name](unit, Path(folder))
            file = next(path for path in Path(folder).rglob("*") if path.suffix in ("", ".safetensors") and big(path))
            found = file.read_bytes()
            if name == RAW:
                right = expected.startswith(found) and len(expected) - len(found) < mmap.PAGESIZE
            else:
                right = found.endswith(expected)
            if not right:
                raise WrongResult(f"{name}: the file must hold the rows, got other bytes")
            if name == WHOLE:
                [commit] = Path(folder).glob("commits/*.json")
                if (
                    f"{google_crc32c.value(found):08x}" not in commit.read_text()
                    or not tlfast.open_dataset(folder).verify().ok
                ):
                    raise WrongResult(f"{name}: the dataset must verify, and its commit have the CRC of the file")


def big(path: Path) -> bool:
    """Whether a file could hold the rows."""
    return path.is_file() and path.stat().st_size > mmap.PAGESIZE


def sampler(unit: Input, write: Callable[[Input, Path], None]) -> Callable[[], Sections]:
    """What writes the unit once, into a new folder; the folder's making and removal aren't timed."""

    def sample() -> Sections:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
            cpu, start = time.process_time(), time.perf_counter()
            write(unit, Path(out))
            stop, cpu_stop = time.perf_counter(), time.process_time()
        os.sync()  # the removal, and what the variant left in the cache, belong to no other
        return {"total": stop - start, "cpu": cpu_stop - cpu}

    return sample


def read_raw(folder: Path) -> None:
    """Every byte of the unit past the cache, one read after the other: the disk's sequential rate."""
    [path] = folder.glob("data/*.safetensors")
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    block = np.frombuffer(mmap.mmap(-1, READ_BYTES), np.uint8)
    at = 0
    while n := os.preadv(fd, [block.data], at):
        at += n
    os.close(fd)


def verify(folder: Path) -> None:
    """tlfast verify."""
    if not tlfast.open_dataset(folder).verify().ok:
        raise WrongResult("verify: the dataset must be right")


def cold(folder: Path, read: Callable[[Path], None]) -> Callable[[], Sections]:
    """What reads a dataset of which nothing is in the page cache."""

    def sample() -> Sections:
        for path in folder.rglob("*.*"):
            fd, _ = open_regular(path, "bench")
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        cpu, start = time.process_time(), time.perf_counter()
        read(folder)
        return {"total": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    return sample


def table(title: str, floor: str, measured: Measured, n_bytes: int, above: dict[str, int] | None = None) -> Table:
    """Rates, CPU time a GB, and memory above the input."""
    rows: list[dict[str, Cell]] = []
    for name, times in measured.items():
        rows.append(
            {"variant": name, "MB/s": n_bytes / times["total"].median / 1e6,
             "best_MB/s": n_bytes / times["total"].min / 1e6,
             "percent_of_floor": measured[floor]["total"].ratio(times["total"]) * 100,
             "cpu_s_per_GB": times["cpu"].median / n_bytes * 1e9,
             "cpu_ratio_to_floor": times["cpu"].ratio(measured[floor]["cpu"]),
             "MB_above_input": above[name] / 1e6 if above and name in above else None}
        )  # fmt: skip
    columns = ["variant", "MB/s", "best_MB/s", "percent_of_floor", "cpu_s_per_GB", "cpu_ratio_to_floor"]
    return Table(title, floor, columns + (["MB_above_input"] if above else []), rows)


def run(quick: bool = False) -> Result:
    """Write a unit in every way, read it back and check it; then what the benches of reading and going on measure."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    n_bytes, rounds = (4 << 20, 2) if quick else (1 << 30, 7)
    result = Result(
        "dataset", PREDICTION,
        {"rows": "768 values at 24 points", "unit_bytes": n_bytes, "rounds": rounds, "disk": file_system(SCRATCH),
         "quick": quick},
    )  # fmt: skip
    for dtype in ("bfloat16", "float32"):
        arguments: dict[str, object] = {"dtype": dtype, "n_bytes": n_bytes}
        check_variants(make_input(dtype, 4 << 20))
        peaks = {}
        if sys.platform.startswith("linux"):
            wanted = (NATIVE,) if quick else tuple(VARIANTS)
            peaks = {name: memory.measure(arguments, name, SCRATCH, "bench.writing") for name in wanted}
        unit = make_input(dtype, n_bytes)
        measured = interleave({name: sampler(unit, write) for name, write in VARIANTS.items()}, rounds)
        result.tables.append(table(f"write a unit of {dtype}, durable", RAW, measured, unit.n_bytes, peaks))
        ratio = {name: measured[RAW]["total"].ratio(times["total"]) * 100 for name, times in measured.items()}
        cpu = measured[NATIVE]["cpu"].ratio(measured[RAW]["cpu"])
        python = measured[PYTHON]["total"].ratio(measured[SAVE_FILE]["total"])
        result.claims += [
            Claim(f"{dtype}: bytes/s, unit file / raw O_DIRECT", "at least", 95, ratio[NATIVE], " %"),
            Claim(f"{dtype}: bytes/s, write_unit / raw O_DIRECT", "at least", 95, ratio[WHOLE], " %"),
            Claim(f"{dtype}: CPU time, unit file / raw O_DIRECT", "at most", 1.2, cpu),
            Claim(f"{dtype}: time, pure Python / save_file", "at most", 1, python),
        ]  # fmt: skip
        if NATIVE in peaks:
            what = f"{dtype}: memory of the unit file above its input / two blocks ({PIECES / 1e6:.1f} MB)"
            result.claims.append(Claim(what, "at most", 1, peaks[NATIVE] / PIECES))
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            out = Path(folder)
            VARIANTS[WHOLE](unit, out)
            read = interleave({"raw O_DIRECT read": cold(out, read_raw), "tlfast verify": cold(out, verify)}, rounds)
        result.tables.append(table(f"read every byte of it, cold ({dtype})", "raw O_DIRECT read", read, unit.n_bytes))
        share = read["raw O_DIRECT read"]["total"].ratio(read["tlfast verify"]["total"]) * 100
        result.claims.append(Claim(f"{dtype}: bytes/s, verify / raw O_DIRECT read", "at least", 95, share, " %"))
    for part, what in ((dataset_read, "reading"), (dataset_resume, "going on")):
        other = part.run(quick)
        result.tables += other.tables
        result.claims += other.claims
        result.prediction += f"; {what}: {other.prediction}"
    return result
