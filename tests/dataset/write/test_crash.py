"""Every system call of a writer fails or is its last: committed rows are right, a resume ends with the same bytes."""

import os
import random
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from backends import usable
from checkout import SUPPORT
from dataset_cases import check_rows, content, make_writer, run_python, truth, write_units
from failing_farm import COLUMNS, ONLY_WRITES, PLAN, RAISED, needs_preload, run_farm

from tlfast.dataset import DatasetError, open_dataset
from tlfast.dataset.places.durable import TEMPORARY, PendingFile

ALL = os.environ.get("TLFAST_ALL_FAILURES") == "1"  # twice as many, and on the disk: minutes
MODES = ["kill", "kill-within", "short", "no-direct", *(["EIO", "ENOSPC"] if ALL else ["EIO-or-ENOSPC"])]
MEMORY = Path("/dev/shm")  # where fsync costs nothing; what a kill leaves is the same there
N_KILLS = 200 if ALL else 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in memory, if there is one."""
    if ALL or not os.access(MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("disturbed")
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        yield Path(made)


@pytest.fixture(scope="module", params=["native", pytest.param("python", marks=pytest.mark.long)])
def disturbed(request, folder):
    """The traced calls of an undisturbed run, all other runs, and where they lie."""
    usable(request.param)
    out = folder / request.param
    calls, runs = run_farm(out, "units", request.param, MODES)
    return [(name, plain(path)) for name, path in calls], runs, out


def plain(path):
    return re.sub(r"\.tlfast-[0-9a-f]{16}\.tmp", "temporary", path)


# Natively pieces of whole pages and what is left; in Python column by column.
PAYLOAD = {"native": (4096, 12288, 20480), "python": (4096, 13696, 21696)}
UNIT = [
    "open data/temporary",
    "posix_fallocate data/temporary",
    *["pwrite data/temporary@PAYLOAD"] * 3,
    "pwrite data/temporary@0",
    "fdatasync data/temporary",
    "open rows/temporary",
    "posix_fallocate rows/temporary",
    "pwrite rows/temporary@0",
    "fdatasync rows/temporary",
    "open commits/temporary",
    "posix_fallocate commits/temporary",
    "pwrite commits/temporary@0",
    "fdatasync commits/temporary",
    "open .lock",
    "rename data/u000001.safetensors",
    "rename rows/u000001.parquet",
    "open data",
    "fsync data",
    "open rows",
    "fsync rows",
    "link commits/u000001.json",
    "open commits",
    "fsync commits",
    "unlink commits/temporary",
    "unlink rows/temporary",
    "unlink data/temporary",
]


@needs_preload
def test_the_order_of_durability(disturbed):
    """No name before its content is synced, the header last, no commit before the names, its own name after all."""
    calls = [" ".join(call) for call in disturbed[0]]
    end = (
        len(calls) - 1 - calls[::-1].index("link commits/u000001.json") + UNIT[::-1].index("link commits/u000001.json")
    )
    unit = calls[end + 1 - len(UNIT) : end + 1]
    written = [f"pwrite data/temporary@{at}" for at in PAYLOAD[disturbed[2].name]]
    assert sorted(unit[2:4]) == sorted(written[:2])  # two threads: either may be first
    assert unit[4] == written[2]
    assert unit[:2] + unit[5:] == UNIT[:2] + UNIT[5:]


@needs_preload
def test_every_call_was_disturbed_and_no_failure_is_silent(disturbed):
    calls, runs, _ = disturbed
    assert {"open", "mkdir", "posix_fallocate", "pwrite", "fdatasync", "fsync", "rename", "link", "unlink"} == {
        name for name, _ in calls
    }
    for mode in MODES:
        found = {run["k"]: run for run in runs if run["mode"] == mode}
        if mode == "no-direct":
            assert found[0]["status"] == 0
            assert {name for name, _ in found[0]["calls"]} <= {"refused"}
            continue
        assert len(found) == len([name for name, _ in calls if name == "pwrite" or mode not in ONLY_WRITES])
        for k, run in found.items():
            [(name, path)] = run["calls"]
            if mode.startswith("kill"):
                expected = {-signal.SIGKILL}
            elif mode == "short" or name == "unlink":  # a temporary name stays, the next writer removes it
                expected = {0}
            elif k == 0:  # whether a dataset is there: what can't be read is none, and the folder is empty
                expected = {0, RAISED}
            else:
                expected = {RAISED}
                assert re.search(r"Input/output error|No space left on device", run["error"]), (mode, name, path)
            assert run["status"] in expected, (mode, k, name, path, run["error"])


def check_survivor(out: Path, tensors) -> int:
    """Fail if anything but whole, right units can be read in ``out``; return how many there are."""
    if not (out / "commits").is_dir():  # ended while the folder was being made: no dataset yet, and it says so
        with pytest.raises(DatasetError, match=r"no such folder|without dataset\.json|got no folder"):
            open_dataset(out, partial=True)
        return 0
    ds = open_dataset(out, partial=True)
    check_rows(ds, tensors)
    report = ds.verify()
    assert report.ok, str(report)
    return len(ds.units)


@pytest.mark.long
@needs_preload
def test_after_every_failure_the_rows_are_right_and_resume_ends_the_same(disturbed):
    _, runs, folder = disturbed
    tensors, expected = truth(COLUMNS, PLAN), content(folder / "trace-0")
    survivors = {mode: [] for mode in MODES}
    for run in runs:
        out = folder / f"{run['mode']}-{run['k']}"
        n_units = check_survivor(out, tensors)
        survivors[run["mode"]].append(n_units)
        assert run["status"] != 0 or n_units == PLAN.n_units, "a run that ended well lost a unit"
        write_units(make_writer(out, columns=COLUMNS, plan=PLAN), tensors)
        found = content(out)
        assert {name for name in found if TEMPORARY.search(name)} == set()
        assert found == expected, run
    assert sorted(survivors["kill"]) == survivors["kill"], "a later kill lost a unit"
    assert set(survivors["kill"]) == {0, 1, 2, 3}


@needs_preload
def test_both_writers_make_the_same_files(disturbed):
    folder = disturbed[2]
    for other in ("native", "python"):
        if (folder.parent / other).exists():
            assert content(folder.parent / other / "trace-0") == content(folder / "trace-0")


@pytest.mark.long
def test_random_instants_with_large_units(tmp_path):
    process = run_python(SUPPORT / "random_kills.py", tmp_path, N_KILLS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert output.split() == ["-9"] * N_KILLS
    import random_kills

    tensors = truth(random_kills.COLUMNS, random_kills.PLAN)
    folders = [tmp_path / str(k) for k in range(N_KILLS)]
    for k, out in enumerate(folders):
        if k % 4 or out.exists():
            assert check_survivor(out, tensors) >= k % 4
    out = random.Random(1).choice(folders)
    write_units(make_writer(out, columns=random_kills.COLUMNS, plan=random_kills.PLAN), tensors)
    check_rows(open_dataset(out), tensors)


def test_a_live_writer_keeps_its_temporary_file(tmp_path):
    make_writer(tmp_path / "d")
    stale = tmp_path / "d" / "data" / ".tlfast-0123456789abcdef.tmp"
    stale.write_bytes(b"left by a killed process")
    with PendingFile(tmp_path / "d" / "data" / "u000000.safetensors", 3) as file:
        make_writer(tmp_path / "d")  # a second process that starts now
        assert not stale.exists()
        file.append(b"abc")
        file.seal()
        file.rename()
    assert (tmp_path / "d" / "data" / "u000000.safetensors").read_bytes() == b"abc"
