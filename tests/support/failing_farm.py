"""Run as a program: make one dataset many times, each time disturbed at another of its system calls.

``python failing_farm.py FOLDER RUN BACKEND MODE...`` with failing_calls.c preloaded: one run is traced, undisturbed,
then each mode is tried at each call, in a process of its own, in FOLDER/<mode>-<k>. RUN is ``units`` (a dataset is
written) or ``extend`` (FOLDER/whole, a whole one, is extended). Prints one JSON line per run: mode, k, the calls that
were told of, exit status, error. Forking saves importing torch a hundred times.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import google_crc32c  # noqa: F401 (imported here, once, instead of in every child)
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from checkout import SUPPORT
from dataset_cases import examples, make_writer, rows_of, run_python, truth, write_units

from tlfast.dataset import BackgroundWriter, DatasetError, Plan
from tlfast.dataset.write import payload

# Payloads of several pages, some of which begin in one column and end in the next.
COLUMNS = {"wide": (torch.bfloat16, (1000,)), "deep": (torch.float32, (2, 300)), "loss": (torch.float16, ())}
PLAN = Plan(n_examples=11, rows_per_unit=4)
PIECE_BYTES = 8192
COMPILER = shutil.which("cc")
needs_preload = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="LD_PRELOAD with a library made by cc is Linux's"
)
RAISED = 3  # the exit status of a run that ended with an error

MODES = {
    "trace": (0, 0),
    "kill": (1, 0),
    "kill-within": (2, 0),
    "EIO": (3, errno.EIO),
    "ENOSPC": (3, errno.ENOSPC),
    "EIO-or-ENOSPC": (3, 0),  # in turn
    "short": (4, 0),
    "no-direct": (5, 0),
}
ONLY_WRITES = ("kill-within", "short")


def units(out: Path, backend: str) -> None:
    """Two units through the background thread, the last one directly."""
    writer = make_writer(out, columns=COLUMNS, plan=PLAN, backend=backend)
    tensors = truth(COLUMNS, PLAN)
    with BackgroundWriter(writer) as background:
        for unit in PLAN.units[:2]:
            background.submit(unit, rows_of(unit, tensors), examples(unit))
    write_units(writer, tensors)


def extend(out: Path, backend: str) -> None:
    """A dataset, extended by six examples."""
    writer = make_writer(out, columns=COLUMNS, plan=PLAN, backend=backend)
    writer.extend(6, {"sha256": "0" * 64}, {"max_examples": 17})


RUNS = {"units": units, "extend": extend}


def disturbed(run: str, out: Path, backend: str, mode: str, k: int) -> tuple[int, list[list[str]], str]:
    """Do the run in a process of its own; return its exit status, the calls that it told of, and its error."""
    (told, telling), (heard, saying) = os.pipe(), os.pipe()
    if run == "extend":
        shutil.copytree(out.parent / "whole", out)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            how, code = MODES[mode]
            code = code or (errno.EIO, errno.ENOSPC)[k % 2]
            ctypes.CDLL(None).arm(ctypes.c_long(k), how, code, telling, os.fsencode(out))
            RUNS[run](out, backend)
            status = 0
        except (OSError, DatasetError) as error:
            os.write(saying, str(error).encode())
            status = RAISED
        finally:
            os._exit(status)
    os.close(telling)
    os.close(saying)
    with open(told) as calls, open(heard) as error:
        lines, text = calls.read().splitlines(), error.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), [line.split(" ", 1) for line in lines], text


def run_farm(folder: Path, run: str, backend: str, modes: list[str]) -> tuple[list[list[str]], list[dict]]:
    """Start this program; return the traced calls of the undisturbed run, and what it prints of all others."""
    library = folder.parent / "failing_calls.so"
    if not library.exists():
        source = str(SUPPORT / "failing_calls.c")
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", source, "-o", str(library), "-ldl"], check=True
        )
    process = run_python(
        SUPPORT / "failing_farm.py", folder, run, backend, *modes, preload=library,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    traced, *runs = map(json.loads, output.splitlines())
    assert (traced["status"], traced["error"]) == (0, ""), errors
    return traced["calls"], runs


def main(folder: Path, run: str, backend: str, modes: list[str]) -> None:
    torch.set_num_threads(1)
    pa.array([1])  # imports what pyarrow imports late (pandas, where it is installed): once, not in every child
    payload.PIECE_BYTES = PIECE_BYTES
    gc.collect()
    gc.freeze()
    folder.mkdir(parents=True)
    if run == "extend":
        write_units(make_writer(folder / "whole", columns=COLUMNS, plan=PLAN, backend=backend))
    status, calls, text = disturbed(run, folder / "trace-0", backend, "trace", 0)
    print(json.dumps({"mode": "trace", "calls": calls, "status": status, "error": text}), flush=True)
    for mode in modes:
        places = [k for k, (name, _) in enumerate(calls) if name == "pwrite" or mode not in ONLY_WRITES]
        for k in places if mode != "no-direct" else [0]:
            out = folder / f"{mode}-{k}"
            status, hit, text = disturbed(run, out, backend, mode, k)
            print(json.dumps({"mode": mode, "k": k, "calls": hit, "status": status, "error": text}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
