"""Peak memory of one variant, in a process of its own: `python -m bench.memory <arguments as JSON>`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def measure(arguments: dict[str, object], variant: str, folder: Path) -> int:
    """The peak resident bytes of a process while it runs the variant.

    Not getrusage's ru_maxrss: that is inherited from the process that started this one.
    """
    command = [sys.executable, "-m", "bench.memory", json.dumps([arguments, variant, str(folder)])]
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
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak until now: proc(5)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        VARIANTS[variant].run(work, Path(out))
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
