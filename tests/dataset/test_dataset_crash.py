"""SIGKILL at every system call and at random instants: committed rows are right, a resume ends with the same bytes."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_cases import (
    HERE,
    check_rows,
    content,
    examples,
    make_dataset,
    make_writer,
    rows_of,
    run_python,
    truth,
    write_units,
)

from tlfast.dataset import DatasetError, open_dataset, verify_dataset
from tlfast.dataset.durable import TEMPORARY


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders left by runs that were killed at each of their system calls, and what the farm printed."""
    folder = tmp_path_factory.mktemp("killed")
    process = run_python(HERE / "kill_farm.py", folder, "units", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    runs = [line.split() for line in output.splitlines()]
    assert runs[-1][1:] == ["end", "0"], (runs, errors)
    assert all(status == str(-signal.SIGKILL) for _, _, status in runs[:-1])
    return folder, [call for _, call, _ in runs[:-1]]


def test_the_kills_cover_every_step(killed):
    _, calls = killed
    assert len(calls) >= 100
    assert {"mkdir", "posix_fallocate", "write", "pwrite", "fsync", "replace", "link", "unlink"} <= set(calls)


def check_survivor(out: Path, tensors) -> int:
    """Fail if anything but whole, right units can be read in ``out``; return how many there are."""
    if not (out / "commits").is_dir():  # killed while the folder was being made: no dataset yet, and it says so
        with pytest.raises(DatasetError, match=r"no folder|No such file"):
            open_dataset(out, partial=True)
        return 0
    ds = open_dataset(out, partial=True)
    check_rows(ds, tensors)
    report = ds.verify()
    assert report.ok, str(report)
    return len(ds.units)


def test_after_every_kill_the_rows_are_right_and_resume_ends_the_same(killed, tmp_path):
    folder, calls = killed
    undisturbed = tmp_path / "undisturbed"
    make_dataset(undisturbed)
    expected = content(undisturbed)
    survivors = []
    for k in range(len(calls)):
        out = folder / str(k)
        survivors.append(check_survivor(out, truth()))
        write_units(make_writer(out))
        assert verify_dataset(out).ok
        found = content(out)
        assert {name for name in found if TEMPORARY.search(name)} == set()
        assert found == expected, f"killed before call {k} ({calls[k]})"
    assert sorted(survivors) == survivors, "a later kill lost a unit"
    assert set(survivors) == {0, 1, 2, 3}


def test_random_instants_with_large_units(tmp_path):
    process = run_python(HERE / "random_kills.py", tmp_path, 12, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.split() == ["-9"] * 12
    import random_kills

    tensors = truth(random_kills.COLUMNS, random_kills.PLAN)
    folders = [tmp_path / str(k) for k in range(12)]
    for k, out in enumerate(folders):
        if k % 4 or out.exists():
            assert check_survivor(out, tensors) >= k % 4
    out = random.Random(1).choice(folders)
    write_units(make_writer(out, columns=random_kills.COLUMNS, plan=random_kills.PLAN), tensors)
    check_rows(open_dataset(out), tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, which names a descriptor's file, is Linux's")
def test_the_order_of_durability(tmp_path, monkeypatch):
    """No name before its content is synced, no commit before the names are, and the commit's own name last."""
    writer = make_writer(tmp_path)
    steps = []

    def kind(path):
        return re.sub(r"\.tlfast-[0-9a-f]{16}\.tmp", "temporary", str(Path(path).relative_to(tmp_path)))

    fsync, replace, link = os.fsync, os.replace, os.link
    monkeypatch.setattr(
        os, "fsync", lambda fd: (steps.append(f"sync {kind(os.readlink(f'/proc/self/fd/{fd}'))}"), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(f"name {kind(b)}"), replace(a, b)))
    monkeypatch.setattr(os, "link", lambda a, b: (steps.append(f"link {kind(b)}"), link(a, b)))
    unit = writer.plan.unit(0)
    writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
    assert steps == [
        "sync data/temporary",
        "sync rows/temporary",
        "sync commits/temporary",
        "name data/u000000.safetensors",
        "name rows/u000000.parquet",
        "sync data",
        "sync rows",
        "link commits/u000000.json",
        "sync commits",
    ]


def test_a_live_writer_keeps_its_temporary_file(tmp_path):
    from tlfast.dataset.durable import PendingFile

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
