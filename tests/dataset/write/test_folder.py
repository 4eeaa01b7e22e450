"""Whose folder it is: refusing, continuing, overwriting; two writers; the disk; what others read."""

import errno
import fcntl
import os
import shutil
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from dataset_cases import (
    COLUMNS,
    HEADER,
    PLAN,
    check_rows,
    content,
    examples,
    make_dataset,
    make_writer,
    rows_of,
    same_bits,
    truth,
    write_units,
)

import tlfast.dataset.write.writer as writer_module
from tlfast.dataset import (
    DatasetError,
    Plan,
    check_disk_space,
    estimate_bytes,
    open_dataset,
    verify_dataset,
)
from tlfast.dataset.write import unit_folder


def test_a_folder_of_someone_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match=r"DatasetWriter: out must be a new or empty folder.*'notes.txt'"):
            make_writer(tmp_path, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("text", ["{}", '{"format": "other"}', "not json"])
def test_another_dataset_json_is_not_ours(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match="must be a new or empty folder"):
        make_writer(tmp_path, overwrite=True)
    assert (tmp_path / "dataset.json").read_text() == text


def test_a_file_is_refused(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(DatasetError, match=r"got .*: a file"):
        make_writer(tmp_path / "f")


def test_empty_and_nested_folders_are_taken(tmp_path):
    make_writer(tmp_path)
    make_writer(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "dataset.json").exists()


def test_resume_continues(tmp_path):
    first = make_writer(tmp_path)
    first.write_unit(PLAN.unit(1), rows_of(PLAN.unit(1), truth()), examples(PLAN.unit(1)))
    description = (tmp_path / "dataset.json").read_bytes()
    second = make_writer(tmp_path, config="something: else\n")
    assert second.done == {"u000001"}
    write_units(second)
    assert second.done == {"u000000", "u000001", "u000002"}
    check_rows(open_dataset(tmp_path), truth())
    assert (tmp_path / "dataset.json").read_bytes() == description
    assert (tmp_path / "config.yaml").read_text() == "reduce: mean\n"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"header": HEADER | {"reduce": "sum"}}, r"header.reduce: 'mean' there, 'sum' here"),
        ({"header": HEADER | {"model": {"name": "tiny", "sha": "xyz"}}}, r"header.model.sha: 'abc' there, 'xyz' here"),
        ({"header": HEADER | {"seed": 1}}, r"header.seed: nothing there, 1 here"),
        ({"header": {"model": HEADER["model"]}}, r"header.reduce: 'mean' there, nothing here"),
        ({"header": HEADER | {"reduce": True}}, r"header.reduce: 'mean' there, True here"),
        ({"plan": Plan(12, 4)}, r"plan.n_examples: 11 there, 12 here"),
        ({"columns": COLUMNS | {"loss": (torch.float32, ())}}, r"columns\[2\].dtype: 'F16' there, 'F32' here"),
        ({"columns": COLUMNS | {"more": (torch.float32, ())}}, r"columns\[4\].name: nothing there, 'more' here"),
    ],
)
def test_another_run_is_refused_and_named(tmp_path, change, named):
    make_dataset(tmp_path)
    before = content(tmp_path)
    with pytest.raises(DatasetError, match=named):
        make_writer(tmp_path, **change)
    assert content(tmp_path) == before


OTHER = {"model": "another"}


def unused(out):
    """The remains of a run that failed before its first unit, with what others have left beside them."""
    writer = make_writer(out, header=OTHER, config="failed: 1")
    writer.extend(2, {"tokens": 1})
    writer.close()
    (out / "data" / ".tlfast-0123456789abcdef.tmp").write_text("left behind")
    (out / "rows" / "u000000.parquet").write_text("named, and never committed")


def test_what_has_no_unit_is_replaced_where_that_is_asked_for(tmp_path):
    unused(tmp_path)
    before = content(tmp_path)
    with pytest.raises(DatasetError, match=r"header\.model"):
        make_writer(tmp_path)
    assert content(tmp_path) == before
    write_units(make_writer(tmp_path, replace_unused=True))
    make_dataset(tmp_path / "undisturbed")
    assert content(tmp_path / "undisturbed").items() <= content(tmp_path).items()
    assert not (tmp_path / "plan").exists()
    with pytest.raises(DatasetError, match=r"header\.model"):  # units are no remains
        make_writer(tmp_path, header=OTHER, replace_unused=True)


def test_what_a_living_writer_is_at_is_not_replaced(tmp_path):
    writer = make_writer(tmp_path, header=OTHER)
    with pytest.raises(DatasetError, match=r"header\.model"):
        make_writer(tmp_path, replace_unused=True)
    writer.close()
    make_writer(tmp_path, replace_unused=True)


def test_a_writer_whose_dataset_was_replaced_commits_nothing(tmp_path):
    """As by --overwrite, or on a mount where machines don't see each other's locks."""
    writer = make_writer(tmp_path)
    make_writer(tmp_path, header=OTHER, overwrite=True)
    with pytest.raises(DatasetError, match=r"be the same dataset to continue it, got .*header\.model: 'another' there"):
        write_units(writer)
    assert not list((tmp_path / "commits").iterdir())
    shutil.copy(tmp_path / "dataset.json", tmp_path / "copy")
    writer = make_writer(tmp_path, header=OTHER)
    os.replace(tmp_path / "copy", tmp_path / "dataset.json")  # restored as it was
    write_units(writer)


def test_where_files_cannot_be_locked_nothing_is_replaced(tmp_path, monkeypatch):
    unused(tmp_path)

    def no_locks(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DatasetError, match=r"header\.model"):
        make_writer(tmp_path, replace_unused=True)


def test_several_who_find_remains_begin_one_dataset(tmp_path):
    unused(tmp_path)
    start = threading.Barrier(4)

    def begin(k):
        start.wait()
        writer = make_writer(tmp_path, replace_unused=True)
        writer.write_unit(PLAN.unit(k), rows_of(PLAN.unit(k), truth()), examples(PLAN.unit(k)))
        return writer

    with ThreadPoolExecutor(4) as pool:
        writers = list(pool.map(begin, [k % PLAN.n_units for k in range(4)]))
    assert {writer.description.config_hash for writer in writers} == {make_writer(tmp_path).description.config_hash}
    check_rows(open_dataset(tmp_path), truth())


def test_remains_that_another_replaces_while_they_are_read(tmp_path, monkeypatch):
    unused(tmp_path)
    read, first = unit_folder.read_description, iter([True])

    def replaced_meanwhile(*args):
        if next(first, False):
            make_writer(tmp_path, replace_unused=True)
            raise DatasetError("an extension that is gone")
        return read(*args)

    monkeypatch.setattr(unit_folder, "read_description", replaced_meanwhile)
    write_units(make_writer(tmp_path, replace_unused=True))
    check_rows(open_dataset(tmp_path), truth())


def test_a_kill_while_remains_are_removed_leaves_remains(tmp_path, monkeypatch):
    done, k = False, 0
    while not done:
        out = tmp_path / str(k)
        unused(out)
        left = iter(range(k))

        def killed(call, left=left):
            def step(path, *arguments, **more):
                if path.parent.name != "data" or "tmp" not in path.name:
                    next(left)
                return call(path, *arguments, **more)

            return step

        with monkeypatch.context() as patched:
            for name in ("unlink", "rmdir"):
                patched.setattr(Path, name, killed(getattr(Path, name)))
            try:
                make_writer(out, replace_unused=True)
                done = True
            except StopIteration:
                k += 1
        write_units(make_writer(out, replace_unused=True))
        check_rows(open_dataset(out), truth())
    assert k > 5


def test_overwrite(tmp_path):
    make_dataset(tmp_path)
    (tmp_path / "data" / ".tlfast-0123456789abcdef.tmp").write_text("left behind")
    header = {"model": "another"}
    writer = make_writer(tmp_path, header=header, plan=Plan(5, 5), overwrite=True)
    assert writer.done == set()
    assert not list((tmp_path / "data").iterdir())
    write_units(writer)
    ds = open_dataset(tmp_path)
    check_rows(ds, truth(plan=Plan(5, 5)))
    assert ds.header == header


@pytest.mark.parametrize("name", ["mine.txt", "data/mine.bin", "commits/u000000.json.bak", "data/deep/er.txt"])
def test_overwrite_removes_nothing_where_a_stranger_lies(tmp_path, name):
    make_dataset(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(DatasetError, match="got '" + name.replace("/er.txt", "")):
        make_writer(tmp_path, overwrite=True)
    assert content(tmp_path) == before


def test_overwrite_follows_no_link(tmp_path):
    make_dataset(tmp_path / "d")
    shutil.move(tmp_path / "d" / "data", tmp_path / "elsewhere")
    (tmp_path / "d" / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="hold only a tlfast dataset"):
        make_writer(tmp_path / "d", overwrite=True)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3


def test_overwrite_of_a_damaged_dataset(tmp_path):
    make_dataset(tmp_path)
    text = (tmp_path / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(text[: len(text) // 2])
    with pytest.raises(DatasetError):
        make_writer(tmp_path)
    write_units(make_writer(tmp_path, overwrite=True))
    check_rows(open_dataset(tmp_path), truth())


def test_the_second_writer_of_a_unit_loses(tmp_path):
    first, second = make_writer(tmp_path), make_writer(tmp_path)
    unit = PLAN.unit(0)
    assert first.write_unit(unit, rows_of(unit, truth()), examples(unit)) is True
    before = content(tmp_path)
    assert second.write_unit(unit, rows_of(unit, truth(seed=1)), examples(unit)) is False
    assert content(tmp_path) == before
    assert second.done == {"u000000"}


def test_a_writer_overtaken_just_before_its_commit(tmp_path, monkeypatch):
    slow, fast = make_writer(tmp_path), make_writer(tmp_path)
    unit = PLAN.unit(0)
    real = writer_module.publish

    def overtaken(*arguments):
        monkeypatch.setattr(writer_module, "publish", real)
        assert fast.write_unit(unit, rows_of(unit, truth()), examples(unit))
        return real(*arguments)

    monkeypatch.setattr(writer_module, "publish", overtaken)
    assert slow.write_unit(unit, rows_of(unit, truth(seed=1)), examples(unit)) is False
    ds = open_dataset(tmp_path, partial=True)
    assert ds.verify().ok
    assert same_bits(ds["loss"][:], truth()["loss"][:4])


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_filesystem_without_locks(tmp_path, monkeypatch, code):
    def unsupported(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    make_dataset(tmp_path)
    (tmp_path / "data" / ".tlfast-0123456789abcdef.tmp").write_text("whose writer may be alive")
    make_writer(tmp_path)
    assert (tmp_path / "data" / ".tlfast-0123456789abcdef.tmp").exists()
    check_rows(open_dataset(tmp_path), truth())


def test_disk_space_is_checked_before_anything_is_made(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(DatasetError, match=r"DatasetWriter: out must have 0\.0\d\d GB free"):
        make_writer(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    with pytest.raises(DatasetError, match=r"collect: out must have 2\.000 GB free for this dataset, got 0\.000 GB"):
        check_disk_space(tmp_path / "x" / "y", 2 * 10**9, "collect")


def test_disk_space_is_checked_before_anything_is_removed(tmp_path, monkeypatch):
    make_dataset(tmp_path)
    before = content(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(DatasetError, match="GB free"):
        make_writer(tmp_path, plan=Plan(10**6, 100), overwrite=True)
    assert content(tmp_path) == before
    make_writer(tmp_path)  # a complete dataset needs no more space


def test_the_estimate_is_near(tmp_path):
    columns = {f"h.{i}": (torch.bfloat16, (512,)) for i in range(8)}
    plan = Plan(64, 32)
    make_dataset(tmp_path, columns=columns, plan=plan)
    real = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.95 < estimate_bytes(columns, 64, tokens=4) / real < 1.05


def test_where_no_dataset_is(tmp_path):
    def said_of(folder):
        with pytest.raises(DatasetError) as error:
            open_dataset(folder)
        assert str(error.value).removeprefix("open_dataset") in str(verify_dataset(folder))
        return str(error.value).removeprefix("open_dataset: path must be the folder of a dataset, got ")

    near = tmp_path / "gradients"
    assert said_of(tmp_path) == f"{tmp_path} without dataset.json. Check the path."
    assert said_of(near) == f"{near}, no such folder. Check the path."
    make_dataset(near)
    assert said_of(tmp_path) == f"{tmp_path} without dataset.json. Datasets in it: gradients."
    assert said_of(tmp_path / "gradeints") == f"{tmp_path / 'gradeints'}, no such folder. Nearest: {near}."
    assert said_of(near / "dataset.json") == f"{near / 'dataset.json'}, a file. Check the path."
    (near / "dataset.json").unlink()
    text = "Restore that file: it is written once, and never changed."
    assert said_of(near) == f"{near} without dataset.json. {text}"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_no_descriptor_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    ds = make_dataset(tmp_path / "d")
    check_rows(ds, truth())
    ds.verify()
    with pytest.raises(DatasetError):
        make_writer(tmp_path / "d", header={})
    ds.__dict__.clear()
    assert len(os.listdir("/proc/self/fd")) == before
