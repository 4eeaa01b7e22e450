"""A collection that is interrupted or killed, and goes on later, makes the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import collect_fields
import processes
import pytest
import torch
from checkout import SUPPORT
from processes import WAIT_S
from tiny_models import save_model, save_text, unit_bytes

import tlfast
from tlfast.cli import main

N_UNITS = 40


def arguments(folder, out, kind="text"):
    data, points = ["--text", str(folder / "text")], "transformer.h.*"
    if kind == "weights":
        data, points = [*data, "--of", "weight", "--project", "8", "--bias"], "transformer.h.**"
    elif kind != "text":
        columns = ["--prompt-column", "prompt", "--response-column", "answer", "--keep-fields", "number"]
        data = ["--dataset", str(folder / "records.jsonl"), *columns]
    if kind == "tokens":
        data += ["--per", "token", "--encoding", "int8:64", "--of", "act,grad"]
    return [
        "collect", "--model", str(folder / "model"), *data, "--points", points,
        "--seq-len", "16", "--max-examples", str(4 * N_UNITS), "--rows-per-unit", "4", "--batch-tokens", "32",
        "--out", str(out),
    ]  # fmt: skip


def save_answers(path):
    lines = ({"prompt": f"{k}? ", "answer": "yes"[: k % 4] + ".", "number": k} for k in range(4 * N_UNITS))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where model and text lie, and beside them the dataset of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)  # as every test has it; this comes before
    save_model(folder / "model")
    save_text(folder / "text")
    save_answers(folder / "records.jsonl")
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
        processes.wait_for_units(process, out, n_units)
        yield process
    finally:
        process.kill()
        process.communicate()


KILLS = 5


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "records", "tokens", "weights"])
def test_killed_at_random_instants_it_goes_on_to_the_same_bytes(undisturbed, tmp_path, kind):
    words = arguments(undisturbed, tmp_path, kind)[1:-2]
    program = [sys.executable, str(SUPPORT / "collect_farm.py"), str(tmp_path), str(KILLS), "0", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    runs = [tuple(map(int, line[1:])) for line in lines if line[0] == "run"]
    assert len(runs) == KILLS
    assert {resumed for _, _, resumed in runs} == {0}, done.stderr
    assert sum(killed == -signal.SIGKILL for _, killed, _ in runs) > KILLS // 2, "most runs ended before their kill"
    assert any(0 < n_units < N_UNITS for n_units, _, _ in runs), "no kill came in the middle of a run"
    whole = undisturbed / "out"
    if kind != "text":
        whole = tmp_path / "whole"
        assert main(arguments(undisturbed, whole, kind)) == 0
    expected = unit_bytes(whole)
    for k in range(KILLS):
        assert unit_bytes(tmp_path / str(k)) == expected, runs[k]
        assert tlfast.open_dataset(tmp_path / str(k)).verify().ok


@pytest.mark.long
@pytest.mark.parametrize("kind", collect_fields.KINDS)
def test_examples_with_fields_are_killed_and_go_on_to_the_same_bytes(tmp_path, kind):
    """Each run but the last is killed a little later than the one before."""
    program = str(SUPPORT / "collect_fields.py")
    with processes.started(program, kind, str(tmp_path / "whole")) as process:
        _, complaint = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, complaint
    expected, instants, out = unit_bytes(tmp_path / "whole"), random.Random(kind), tmp_path / "out"
    assert len(expected) == collect_fields.N_UNITS
    n_left = []
    for n_units in (6, 26):
        with processes.started(program, kind, str(out)) as process:
            processes.wait_for_units(process, out, n_units)
            time.sleep(instants.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            process.wait(WAIT_S)
        n_left.append(processes.n_commits(out))
    assert n_left[-1] < collect_fields.N_UNITS, "the last kill came too late to prove anything"
    with processes.started(program, kind, str(out)) as process:
        _, complaint = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, complaint
    assert unit_bytes(out) == expected
    dataset = tlfast.open_dataset(out)
    assert dataset.verify().ok
    assert len(dataset.skipped) == (collect_fields.N_UNITS if kind == "images" else 0)


STOPPED = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.long
def test_what_was_interrupted_goes_on_to_the_same_bytes(undisturbed, tmp_path, capsys, number):
    out = tmp_path / "out"
    with running(undisturbed, out, 3) as process:
        process.send_signal(number)
        shown, complaint = process.communicate(timeout=WAIT_S)
    kept = tlfast.open_dataset(out, partial=True)
    assert 3 <= len(kept.units) < N_UNITS, "the signal came too late to prove anything"
    assert kept.verify().ok
    word, code = STOPPED[number]
    assert process.returncode == code
    expected = f"{word}: {len(kept.units)} of {N_UNITS} units are kept in {out}. To continue: tlfast collect {out}"
    assert complaint.strip().splitlines()[-1] == f"{expected}/config.yaml"
    assert shown == ""
    assert main(["collect", str(out / "config.yaml")]) == 0
    assert f"beside {len(kept)} that were there" in capsys.readouterr().out
    assert unit_bytes(out) == unit_bytes(undisturbed / "out")
    assert tlfast.open_dataset(out).verify().ok


@pytest.mark.long
def test_ctrl_c_twice_leaves_at_once_and_what_is_committed_is_whole(undisturbed, tmp_path):
    out = tmp_path / "out"
    with running(undisturbed, out, 3) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert complaint.strip().splitlines()[-1].startswith("interrupted: ")
    assert tlfast.open_dataset(out, partial=True).verify().ok
    assert main(["collect", str(out / "config.yaml")]) == 0
    assert unit_bytes(out) == unit_bytes(undisturbed / "out")
