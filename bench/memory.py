"""Peak memory of one variant, in a process of its own: `python -m bench.memory <arguments as JSON>`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(arguments: dict[str, object], variant: str, folder: Path) -> int:
    """The bytes that a run of the variant needs at its peak, above what its process held before.

    Not getrusage's ru_maxrss: that is inherited from the process that started this one.
    """
    command = [sys.executable, "-m", "bench.memory", json.dumps([arguments, variant, str(folder)])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"bench: the process that measures memory must succeed, got {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def main() -> None:
    """Warm up on one unit, so that libraries and the allocator are in place; then measure the whole run."""
    from .collect import make_work
    from .storing import VARIANTS, Work

    torch.set_num_threads(1)
    arguments, variant, folder = json.loads(sys.argv[1])
    work = make_work(**arguments)
    first = Work(work.model, work.batches[:1], work.points, work.reduce, work.rows_per_unit)
    run = VARIANTS[variant].run
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run(first, Path(out))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak until now: proc(5)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run(work, Path(out))
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main()
