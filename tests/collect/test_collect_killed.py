"""A collection that is interrupted or killed, and goes on later, makes the bytes of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from tiny_models import save_model, save_text, unit_bytes

import tlfast
from tlfast.cli import main

N_UNITS = 40
WAIT_S = 120  # for a start on a busy machine; an end long before that is the rule


def arguments(folder, out):
    return [
        "collect", "--model", str(folder / "model"), "--text", str(folder / "text"), "--points", "transformer.h.*",
        "--seq-len", "16", "--max-examples", str(4 * N_UNITS), "--rows-per-unit", "4", "--batch-tokens", "32",
        "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where model and text lie, and beside them the dataset of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)  # as every test has it; this comes before
    save_model(folder / "model")
    save_text(folder / "text")
    assert main(arguments(folder, folder / "out")) == 0
    return folder


@contextmanager
def running(folder, out, n_units):
    """A process that collects, once it has committed ``n_units``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tlfast", *arguments(folder, out)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + WAIT_S
        while len(list(out.glob("commits/*.json"))) < n_units:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end, f"no {n_units} units in {WAIT_S} s"
            time.sleep(0.002)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_what_was_interrupted_goes_on_to_the_same_bytes(undisturbed, tmp_path, capsys, number):
    out = tmp_path / "out"
    with running(undisturbed, out, 3) as process:
        process.send_signal(number)
        shown, complaint = process.communicate(timeout=WAIT_S)
    kept = tlfast.open_dataset(out, partial=True)
    assert 3 <= len(kept.units) < N_UNITS, "the signal came too late to prove anything"
    assert kept.verify().ok
    if number == signal.SIGINT:
        assert process.returncode == 130
        expected = (
            f"interrupted: {len(kept.units)} of {N_UNITS} units are kept in {out}. To continue: tlfast collect {out}"
        )
        assert complaint.strip().splitlines()[-1] == f"{expected}/config.yaml"
        assert shown == f"{tlfast.backend()}\n"
    else:
        assert process.returncode == -signal.SIGKILL
    assert main(["collect", str(out / "config.yaml")]) == 0
    assert f"beside {len(kept)} that were there" in capsys.readouterr().out
    assert unit_bytes(out) == unit_bytes(undisturbed / "out")
    assert tlfast.open_dataset(out).verify().ok
