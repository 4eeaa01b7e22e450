"""Run as a program: make one dataset many times, each time killed with SIGKILL at another instant.

``python kill_farm.py FOLDER RUN``: run k goes to FOLDER/<k> and dies just before its k-th system call that changes the
disk (a write dies in its middle), until a run ends undisturbed. RUN is ``units`` (a dataset is written) or ``extend``
(a whole dataset is extended). Prints one line per run: number, call, exit status.
Forking from one process saves importing torch a hundred times.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import google_crc32c  # noqa: F401 (imported here, once, instead of in every child)
import pyarrow as pa
import pyarrow.parquet
import torch
from dataset_cases import examples, make_dataset, make_writer, rows_of, truth, write_units

from tlfast.dataset import BackgroundWriter

CALLS = ("open", "mkdir", "posix_fallocate", "write", "pwrite", "fsync", "replace", "link", "unlink")


def die_before(k: int, report: int) -> None:
    """Make the k-th call of CALLS the last thing that this process does."""
    count = itertools.count()

    def dying(name, call):
        def wrapper(*args, **kwargs):
            if next(count) == k:
                if name in ("write", "pwrite"):
                    call(args[0], bytes(memoryview(args[1]).cast("B"))[: memoryview(args[1]).nbytes // 2], *args[2:])
                os.write_report(report, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    os.write_report = os.write
    for name in CALLS:
        setattr(os, name, dying(name, getattr(os, name)))


def one_run(out: Path, k: int, report: int) -> None:
    """The run: two units through the background thread, the last one directly."""
    die_before(k, report)
    writer = make_writer(out)
    tensors = truth()
    units = writer.plan.units
    with BackgroundWriter(writer) as background:
        for unit in units[:2]:
            background.submit(unit, rows_of(unit, tensors), examples(unit))
    write_units(writer, tensors)


def extend(out: Path, k: int, report: int) -> None:
    """A dataset, extended by six examples."""
    writer = make_writer(shutil.copytree(out.parent / "whole", out))
    die_before(k, report)
    writer.extend(6, {"sha256": "0" * 64}, {"max_examples": 17})


def main(folder: Path, run: str) -> None:
    torch.set_num_threads(1)
    if run == "extend":
        make_dataset(folder / "whole")
    pa.array([1])  # imports what pyarrow imports late (pandas, where it is installed): once, not in every child
    for k in itertools.count():
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                {"units": one_run, "extend": extend}[run](folder / str(k), k, writing)
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        print(k, os.read(reading, 100).decode() or "end", os.waitstatus_to_exitcode(status), flush=True)
        os.close(reading)
        if status == 0 or k > 1000:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
