"""Processes of `tlfast collect` on the same small model and text, and what one of them makes alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny_models import save_model, save_text, unit_bytes

import tlfast
from tlfast.cli import main

N_UNITS = 60
ROWS_PER_UNIT = 4
WAIT_S = 240  # for a start on a busy machine; an end long before that is the rule


def arguments(folder, out, *more):
    return [
        "collect", "--model", str(folder / "model"), "--text", str(folder / "text"), "--points", "transformer.h.*",
        "--seq-len", "16", "--max-examples", str(ROWS_PER_UNIT * N_UNITS), "--rows-per-unit", str(ROWS_PER_UNIT),
        "--batch-tokens", "16", "--out", str(out), *more,
    ]  # fmt: skip


def make_undisturbed(folder):
    """Model and text in a folder, and the dataset of one process from beginning to end."""
    torch.set_num_threads(1)  # what torchrun and Ray give each process
    save_model(folder / "model")
    save_text(folder / "text", n_files=40)
    assert main(arguments(folder, folder / "out")) == 0
    return folder


def start(*command, **environment):
    """A Python process in a session of its own, so that it can be ended with all that it started."""
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@contextmanager
def started(*command, **environment):
    process = start(*command, **environment)
    try:
        yield process
    finally:
        end(process)


def end(process):
    """End a process and what it started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.communicate()


def n_commits(out):
    return len(list(out.glob("commits/*.json")))


def wait_for_units(process, out, n_units):
    stop = time.monotonic() + WAIT_S
    while n_commits(out) < n_units:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < stop, f"no {n_units} units in {WAIT_S} s"
        time.sleep(0.002)


def pids_with(**variables):
    """The living processes that were started with these environment variables."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            given = set((folder / "environ").read_bytes().split(b"\0"))
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:  # gone, or another user's
            continue
        if wanted <= given and not zombie:
            found.append(int(folder.name))
    return found


def check_equal(folder, out):
    assert unit_bytes(out) == unit_bytes(folder / "out")
    assert tlfast.open_dataset(out).verify().ok
