"""Run as a program: ``python collect_farm.py FOLDER N SEED ARGUMENT ...`` collects N times, each killed with SIGKILL.

Run k is ``tlfast collect ARGUMENT ... --out FOLDER/<k>`` in a process of its own. It is killed at a random instant in
the making of a random unit, at most of the first three quarters; then it is started again and left alone. Prints a line
per run: units there when it was killed, exit code of the kill, exit code of the run that continued it. Forking from one
process, which has collected once, saves importing everything N times.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tlfast.cli import main as tlfast


def start(words: list[str], out: Path) -> int:
    """Fork a process that collects into ``out``; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        status = tlfast(["collect", *words, "--out", str(out)])
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a process and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def n_commits(out: Path) -> int:
    """How many units there are."""
    return len(list(out.glob("commits/*.json")))


def main(folder: Path, n: int, seed: int, words: list[str]) -> None:
    torch.set_num_threads(1)  # a thread of torch would be missing in the children
    instants = random.Random(seed)
    begun = time.monotonic()
    if tlfast(["collect", *words, "--out", str(folder / "undisturbed")]):
        sys.exit("the undisturbed run failed")
    n_units = n_commits(folder / "undisturbed")
    unit_s = (time.monotonic() - begun) / n_units
    for k in range(n):
        out = folder / str(k)
        child = start(words, out)
        # By units, not by the time of a run: another load of the machine doesn't move the kill out of the run.
        last = instants.randrange(3 * n_units // 4)
        while n_commits(out) < last:
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit(f"run {k} ended by itself")
            time.sleep(0.0005)
        # That unit ends sooner where the undisturbed run was slow.
        until = time.monotonic() + instants.uniform(0, unit_s)
        while time.monotonic() < until and n_commits(out) <= last:
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        killed = ended(child)
        print("run", n_commits(out), killed, ended(start(words, out)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
