"""Repair: damaged units lose their commits, nothing else is touched, and a resume makes the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from dataset_cases import check_rows, content, flip, make_dataset, make_writer, truth, write_units

import tlfast
from tlfast.dataset import DatasetError, open_dataset, repair_dataset, verify_dataset
from tlfast.dataset.check import repair, verify
from tlfast.dataset.places import durable


@pytest.fixture
def out(tmp_path):
    """The folder of a complete dataset."""
    make_dataset(tmp_path / "d")
    return tmp_path / "d"


def swap(out, a, b):
    """Exchange two files."""
    os.rename(out / a, out / "x")
    os.rename(out / b, out / a)
    os.rename(out / "x", out / b)


def edit_commit(out, **changes):
    """Change what the commit of the second unit says."""
    path = out / "commits" / "u000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1) + "\n")


def hide(out, name):
    """A link to the same bytes in the place of a file."""
    os.rename(out / name, out.parent / "elsewhere")
    (out / name).symlink_to(out.parent / "elsewhere")


def make_folder(out, name):
    """An empty folder in the place of a file."""
    (out / name).unlink()
    (out / name).mkdir()


DATA, ROWS, COMMIT = "data/u000001.safetensors", "rows/u000001.parquet", "commits/u000001.json"
DAMAGE = {
    "a bit of the data": lambda out: flip(out / DATA, 4100, 3),
    "a bit of the header": lambda out: flip(out / DATA, 20, 0),
    "a bit of the rows": lambda out: flip(out / ROWS, 300, 5),
    "a bit of the commit": lambda out: flip(out / COMMIT, 12, 2),
    "another checksum": lambda out: flip(out / COMMIT, (out / COMMIT).read_text().index('crc32c": "') + 10, 0),
    "another count of non-finite rows": lambda out: edit_commit(out, non_finite_rows=2),
    "no data": lambda out: (out / DATA).unlink(),
    "no rows": lambda out: (out / ROWS).unlink(),
    "no files": lambda out: [(out / DATA).unlink(), (out / ROWS).unlink()],
    "short data": lambda out: os.truncate(out / DATA, 5000),
    "long rows": lambda out: (out / ROWS).write_bytes((out / ROWS).read_bytes() + b"x"),
    "empty commit": lambda out: os.truncate(out / COMMIT, 0),
    "a link to the data": lambda out: hide(out, DATA),
    "a link to the commit": lambda out: hide(out, COMMIT),
    "a folder for the data": lambda out: make_folder(out, DATA),
    "a folder for the commit": lambda out: make_folder(out, COMMIT),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_repair_and_resume_give_the_same_bytes(out, damage):
    before, description = content(out), (out / "dataset.json").read_bytes()
    DAMAGE[damage](out)
    assert not verify_dataset(out).ok
    repaired = repair_dataset(out)
    assert (repaired.ok, repaired.dropped, repaired.left) == (True, ["u000001"], [])
    assert "dropped u000001: the next run of the same collection makes them again" in str(repaired)
    assert set(before) - set(content(out)) == {DATA, ROWS, COMMIT}
    assert {name: data for name, data in before.items() if "u000001" not in name} == content(out)
    assert verify_dataset(out, partial=True).ok
    check_rows(open_dataset(out, partial=True), truth())
    write_units(make_writer(out))
    assert content(out) == before
    assert (out / "dataset.json").read_bytes() == description
    assert repair_dataset(out).dropped == []


def test_swapped_units_are_both_made_again(out):
    before = content(out)
    for name in (DATA, ROWS, COMMIT):
        swap(out, name, name.replace("1", "0"))
    assert repair_dataset(out).dropped == ["u000000", "u000001"]
    write_units(make_writer(out))
    assert content(out) == before


def test_random_damage_of_several_files(tmp_path):
    make_dataset(tmp_path / "whole")
    before = content(tmp_path / "whole")
    draw = random.Random(0)
    for k in range(12):
        out = tmp_path / str(k)
        shutil.copytree(tmp_path / "whole", out)
        for name in draw.sample([name for name in before if "/" in name], draw.randrange(1, 4)):
            flip(out / name, draw.randrange((out / name).stat().st_size), draw.randrange(8))
        broken = [problem.unit for problem in verify_dataset(out).problems]
        assert repair_dataset(out).dropped == broken
        write_units(make_writer(out))
        changed = {name for name, data in content(out).items() if data != before[name]}
        # A flip that verify rightly passes, in the spelling of a commit, stays.
        assert all(name.startswith("commits/") and name[8:15] not in broken for name in changed)
        check_rows(open_dataset(out), truth())
        shutil.rmtree(out)


def test_a_right_dataset_is_left_alone(out):
    (out / COMMIT).unlink()
    (out / "data" / "mine.txt").write_text("not tlfast's")
    before = content(out)
    repaired = repair_dataset(out)
    assert repaired.ok
    assert str(repaired).startswith("ok: 7 rows in 2 units")
    assert content(out) == before | {".lock": b""}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files")])
def test_what_cannot_be_read_here_is_not_damaged(out, monkeypatch, error):
    before = content(out)

    def refuse(path, *arguments, **options):
        if str(path).endswith(DATA):
            raise error
        return os_open(path, *arguments, **options)

    os_open = os.open
    monkeypatch.setattr(durable.os, "open", refuse)
    repaired = repair_dataset(out)
    monkeypatch.undo()
    assert not repaired.ok
    assert repaired.dropped == []
    assert f"not repaired: u000001: verify: {out / DATA} must be a readable file" in str(repaired)
    assert content(out) == before


@pytest.mark.parametrize("error", [MemoryError("all used"), NotImplementedError("no zstd in this pyarrow")])
def test_what_a_library_cannot_do_is_no_damage(out, monkeypatch, error):
    def fail(*_, **__):
        raise error

    before = content(out)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", fail)
    repaired = repair_dataset(out)
    assert (repaired.ok, repaired.dropped, len(repaired.left)) == (False, [], 3)
    assert content(out) == before


def test_a_commit_of_no_unit_of_the_plan_stays(out):
    (out / "commits" / "u000009.json").write_text("{}")
    repaired = repair_dataset(out)
    assert [problem.unit for problem in repaired.left] == ["u000009"]
    assert (out / "commits" / "u000009.json").exists()


def test_a_unit_made_again_meanwhile_stays(out, monkeypatch):
    before = content(out)
    flip(out / DATA, 4100, 3)

    def made_again(*arguments, **options):
        report = verify_dataset(*arguments, **options)
        flip(out / DATA, 4100, 3)
        return report

    monkeypatch.setattr(repair, "verify_dataset", made_again)
    repaired = repair_dataset(out)
    assert (repaired.ok, repaired.dropped) == (True, [])
    assert content(out) == before


def test_a_damaged_description_is_refused(out):
    flip(out / "dataset.json", 40, 1)
    flip(out / DATA, 4100, 3)
    before = content(out)
    with pytest.raises(DatasetError, match=r"repair_dataset: .*dataset\.json must "):
        repair_dataset(out)
    assert content(out) == before


def test_an_extended_dataset(tmp_path):
    out = tmp_path / "d"
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    settings = {"points": "0", "rows_per_unit": 2, "progress": False}
    for n, extend in ((3, False), (6, True)):
        tlfast.collect(model, [[1, 2, 3]] * n, out, extend=extend, **settings)
    before = content(out)
    flip(out / "data" / "u000002.safetensors", 4100, 3)
    flip(out / "plan" / "x000001.json", 30, 1)
    with pytest.raises(DatasetError, match=r"x000001\.json must "):
        repair_dataset(out)
    flip(out / "plan" / "x000001.json", 30, 1)
    assert repair_dataset(out).dropped == ["u000002"]
    tlfast.collect(model, [[1, 2, 3]] * 6, out, **settings)
    assert content(out) == before


def test_the_commit_goes_first_and_for_good(out, monkeypatch):
    """A kill between two steps leaves files without a commit, never a commit without files."""
    flip(out / DATA, 4100, 3)
    done = []
    for name in ("_remove", "sync_folder"):
        step = getattr(repair, name)
        monkeypatch.setattr(
            repair, name, lambda path, n=name, step=step: [step(path), done.append((n, str(path.relative_to(out))))]
        )
    repair_dataset(out)
    assert done == [
        ("_remove", COMMIT), ("sync_folder", "commits"),
        ("_remove", DATA), ("_remove", ROWS), ("sync_folder", "data"), ("sync_folder", "rows"),
    ]  # fmt: skip


def test_damage_is_told_from_trouble():
    assert verify.is_damage(OSError(5, "Input/output error"))
    assert verify.is_damage(DatasetError("other bytes"))
    assert not verify.is_damage(OSError(12, "Cannot allocate memory"))
