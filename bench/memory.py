"""Peak memory of one variant, in a process of its own: `python -m bench.memory <arguments as JSON>`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def measure(arguments: dict[str, object], variant: str, folder: Path, program: str = "bench.memory") -> int:
    """What a process of its own prints that runs the variant: by `main` below its peak resident bytes.

    Not getrusage's ru_maxrss: that is inherited from the process that started this one.
    """
    command = [sys.executable, "-m", program, json.dumps([arguments, variant, str(folder)])]
    # A fixed threshold: glibc raises it with use and then keeps what was freed, differently in every run.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = os.environ | malloc | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"bench: the process that measures memory must succeed, got {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def main() -> None:
    """Warm up on one batch, with `collect` too, so that all variants hold the same libraries; then measure."""
    from .collect import make_work
    from .storing import COLLECT, VARIANTS, Work

    torch.set_num_threads(1)
    arguments, variant, folder = json.loads(sys.argv[1])
    work = make_work(**arguments)
    first = Work(work.model, work.batches[:1], work.points, work.reduce, work.rows_per_unit)
    for name in (COLLECT, variant):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            VARIANTS[name].run(first, Path(out))
    gc.collect()
    _forget_peak()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        VARIANTS[variant].run(work, Path(out))
    print(_status("VmHWM"))


def peak_above(call: Callable[[], object]) -> int:
    """How far the resident bytes of this process rise above what they are, while ``call`` runs."""
    _forget_peak()
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak_of(call: Callable[[], object]) -> int:
    """The peak of the resident bytes of this process while ``call`` runs, all that was there before included."""
    _forget_peak()
    call()
    return _status("VmHWM")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
