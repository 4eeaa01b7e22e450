"""Whose folder it is: refusing, continuing, overwriting; two writers; the disk; what others read."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
import yaml
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
from test_dataset_crash import run_python

import tlfast.dataset.writer as writer_module
from tlfast.dataset import DatasetError, Plan, check_disk_space, estimate_bytes, open_dataset, verify_dataset


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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"columns": {}}, "columns must name at least one point"),
        ({"columns": {"x": (torch.int64, ())}}, "dtype of 'x' must be one of float64, float32, float16, bfloat16"),
        ({"columns": {"x": (torch.float32, (-1,))}}, "shape of 'x' must be non-negative ints"),
        ({"columns": {"__metadata__": (torch.float32, ())}}, "column name must be valid text"),
        ({"columns": {"\ud800": (torch.float32, ())}}, "column name must be valid text"),
        ({"header": {"x": object()}}, "header must be JSON"),
        ({"header": {"x": float("nan")}}, "header must be JSON"),
    ],
)
def test_bad_arguments_make_no_folder(tmp_path, change, message):
    with pytest.raises(DatasetError, match=message):
        make_writer(tmp_path / "d", **change)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-1, 1), (1.0, 1), (True, 1), ("1", 1)])
def test_bad_plans(numbers):
    with pytest.raises(DatasetError, match="must be a positive int"):
        Plan(*numbers)


def test_plan():
    plan = Plan(11, 4)
    assert [(u.name, u.start, u.stop) for u in plan.units] == [
        ("u000000", 0, 4),
        ("u000001", 4, 8),
        ("u000002", 8, 11),
    ]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.unit_named("u000002") == plan.unit(2)
    big = Plan(3_000_000, 1)
    assert big.unit_named("u1000000") == big.unit(1_000_000)
    for name in ("u3", "u0000001", "u000003", "U000001", "", "../u000000", "u000000\n", "u" + "\u0660" * 6):
        with pytest.raises(DatasetError):
            plan.unit_named(name)
    with pytest.raises(IndexError):
        plan.unit(3)


def test_config_and_card(tmp_path):
    make_dataset(tmp_path, config={"points": ["a|b", "ü"], "dtype": "bfloat16"}, columns={"a|b`\n": COLUMNS["loss"]})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"points": ["a|b", "ü"], "dtype": "bfloat16"}
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["configs"] == [{"config_name": "rows", "data_files": "rows/*.parquet"}]
    assert r"| `a\|b'\x0a` | F16 | [] |" in card


def test_hugging_face_reads_the_rows_by_the_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = (
        "import sys, datasets; d = datasets.load_dataset(sys.argv[1], 'rows', split='train', cache_dir=sys.argv[2]);"
        "print(len(d), d[10]['input_ids'], sorted(d.column_names)[:3], d[3]['source'])"
    )
    make_dataset(tmp_path / "d")
    process = run_python(
        "-c", script, tmp_path / "d", tmp_path / "cache", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = process.communicate(timeout=120)
    assert output == "11 [10, 2147483647] ['flags', 'id', 'input_ids'] file_0.py\n", errors


def test_importing_the_dataset_needs_torch_and_numpy_only():
    script = (
        "import sys\n"
        "for name in ('pyarrow', 'safetensors', 'google_crc32c', 'yaml', 'pandas'): sys.modules[name] = None\n"
        "import tlfast.dataset as d\n"
        "try: d.DatasetWriter('/nonexistent', header={}, columns={}, plan=d.Plan(1, 1))\n"
        "except ImportError as error: print(error)\n"
    )
    process = run_python("-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    assert "google_crc32c must be installed" in output, errors
    assert output.endswith("Run: pip install 'tlfast[collect]'\n")


def test_verify_of_no_dataset(tmp_path):
    assert "dataset.json must be a readable file" in str(verify_dataset(tmp_path))
    with pytest.raises(DatasetError, match="No such file"):
        open_dataset(tmp_path / "nowhere")


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
