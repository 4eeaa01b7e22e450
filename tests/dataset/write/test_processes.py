"""The writer in processes of its own: one that never closes, Ctrl-C, a fork, four at once on the same units."""

import signal
import subprocess

import pytest
from dataset_cases import PLAN, check_rows, run_python, same_bits, truth

from tlfast.dataset import Plan, open_dataset

SECONDS = 120  # far above what any of this takes: only a hang takes longer


NO_CLOSE = """
import sys, threading
from dataset_cases import *
from tlfast.dataset import BackgroundWriter
background = BackgroundWriter(make_writer(sys.argv[1]))
background._writer.write_unit = lambda *job: threading.Event().wait()
background.submit(PLAN.unit(0), {}, [])
print("leaving", flush=True)
"""


def test_a_program_that_never_closes_still_ends(tmp_path):
    process = run_python("-c", NO_CLOSE, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output) == (0, "leaving\n"), errors
    assert len(open_dataset(tmp_path, partial=True)) == 0


INTERRUPTED = """
import os, sys, threading
from dataset_cases import *
from tlfast.dataset import BackgroundWriter
writer, fsync, go = make_writer(sys.argv[1]), os.fsync, threading.Event()
go.set()
os.fsync = lambda fd: (go.wait(), fsync(fd))
with BackgroundWriter(writer) as background:
    wait = background._changed.wait
    def told(seconds=None):
        if threading.current_thread() is threading.main_thread():
            print("waiting", flush=True)
        return wait(seconds)
    def submit(unit):
        background.submit(unit, rows_of(unit, truth()), examples(unit))
        print("submitted", flush=True)
    submit(PLAN.unit(0))
    background.flush()
    background._changed.wait = told
    go.clear()  # from here on the disk answers no sooner than Ctrl-C comes
    try:
        for unit in PLAN.units[1:]:
            submit(unit)
    finally:
        go.set()
"""


def test_ctrl_c_ends_at_once_and_keeps_whole_units(tmp_path):
    process = run_python("-c", INTERRUPTED, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert [process.stdout.readline() for _ in range(3)] == ["submitted\n", "submitted\n", "waiting\n"]
    process.send_signal(signal.SIGINT)  # it waits in the third submit
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    ds = open_dataset(tmp_path, partial=True)
    assert ds.verify().ok
    assert len(ds.units) == 2
    check_rows(ds, truth())


FORKED = """
import os, sys
from dataset_cases import *
from tlfast.dataset import BackgroundWriter
background = BackgroundWriter(make_writer(sys.argv[1]))
child = os.fork()
if child == 0:
    status = 1
    try:
        background.submit(PLAN.unit(0), rows_of(PLAN.unit(0), truth()), examples(PLAN.unit(0)))
        background.flush()
    except RuntimeError as error:
        print(error, flush=True)
        status = 7
    finally:
        os._exit(status)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_without_the_thread_does_not_hang(tmp_path):
    process = run_python("-c", FORKED, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 7, errors
    assert "BackgroundWriter: thread must be alive" in output


RACE = """
import os, sys, google_crc32c, pyarrow, pyarrow.parquet, torch
from dataset_cases import *
torch.set_num_threads(1)
pyarrow.array([1])
for round in range(5):
    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                writer, tensors = make_writer(f"{sys.argv[1]}/{round}"), truth(seed=seed)
                won = [writer.write_unit(unit, rows_of(unit, tensors), examples(unit)) for unit in PLAN.units]
                status = 10 + sum(won)
            finally:
                os._exit(status)
        children.append(child)
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.long
def test_four_processes_on_the_same_units(tmp_path):
    process = run_python("-c", RACE, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    assert len(output.splitlines()) == 5
    for k, line in enumerate(output.splitlines()):
        wins = [int(status) - 10 for status in line.split()]
        assert min(wins) >= 0, errors
        assert sum(wins) == PLAN.n_units
        ds = open_dataset(tmp_path / str(k))
        assert ds.verify().ok
        for unit in PLAN.units:
            rows = ds["blocks.1.attn"][unit.start : unit.stop]
            assert any(same_bits(rows, truth(seed=s)["blocks.1.attn"][unit.start : unit.stop]) for s in range(4))


WRITING = """
import sys
from dataset_cases import *
plan = Plan(n_examples=120, rows_per_unit=3)
writer = make_writer(sys.argv[1], plan=plan)
print("made", flush=True)
write_units(writer, truth(plan=plan))
"""


@pytest.mark.long
def test_a_reader_beside_a_writer_sees_whole_units_alone(tmp_path):
    plan = Plan(n_examples=120, rows_per_unit=3)
    tensors = truth(plan=plan)
    process = run_python("-c", WRITING, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "made\n"
    early, seen = open_dataset(tmp_path, partial=True), [0]
    n_early = len(early)
    while process.poll() is None:
        ds = open_dataset(tmp_path, partial=True)
        check_rows(ds, tensors)
        assert len(ds) >= seen[-1], "a unit that was there is gone"
        seen.append(len(ds))
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    check_rows(early, tensors)
    assert len(early) == n_early, "an open dataset must stay as it was"
    assert any(0 < n < plan.n_examples for n in seen), "the reader was never beside the writer"
    check_rows(open_dataset(tmp_path), tensors)
