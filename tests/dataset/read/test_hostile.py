"""Hostile files: commits, headers, row tables and plans that lie are refused; nothing outside the folder is read."""

import json
import os
import struct
from hashlib import sha256

import pytest
from dataset_cases import COLUMNS, check_rows, make_dataset, truth

from tlfast.dataset import DatasetError, open_dataset, verify_dataset
from tlfast.dataset.format.strict_json import canonical, checksum_of


@pytest.fixture
def out(tmp_path):
    """The folder of a complete dataset."""
    make_dataset(tmp_path / "d")
    return tmp_path / "d"


def edit_json(path, change):
    """Apply ``change`` to the JSON value in ``path``."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


COMMITS = [
    lambda c: c["files"][0].update(path="../../../etc/passwd"),
    lambda c: c["files"][0].update(path="/etc/passwd"),
    lambda c: c["files"][1].update(path="rows/../../x"),
    lambda c: c["files"][0].update(path="data/u000001.safetensors"),
    lambda c: c["files"][0].update(path=["data/u000000.safetensors"]),
    lambda c: c["files"].reverse(),
    lambda c: c["files"].append(c["files"][0]),
    lambda c: c["files"].clear(),
    lambda c: c.pop("files"),
    lambda c: c.update(files=7),
    lambda c: c.update(rows=5),
    lambda c: c.update(first_example=1),
    lambda c: c.update(unit="u000001"),
    lambda c: c.update(version=2),
    lambda c: c.update(config_hash="0" * 64),
    lambda c: c.update(extra=1),
    lambda c: c.update(non_finite_rows=-1),
    lambda c: c.update(non_finite_rows="0"),
    lambda c: c["files"][0].update(bytes=-1),
    lambda c: c["files"][0].update(bytes=2**63),
    lambda c: c["files"][0].update(bytes=1e3),
    lambda c: c["files"][0].update(crc32c="zzzzzzzz"),
    lambda c: c["files"][0].update(crc32c=7),
]


@pytest.mark.parametrize("change", COMMITS)
def test_hostile_commits(out, change):
    edit_json(out / "commits" / "u000000.json", change)
    with pytest.raises(DatasetError):
        open_dataset(out)
    assert [problem.unit for problem in verify_dataset(out).problems] == ["u000000"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"{", b"null", b"[1]", b'"commit"', b"[" * 100_000, b'{"a":1,"a":2}', b"NaN", b"9" * 60_000,
     b"x" * 70_000, b"\0" * 10],
)  # fmt: skip
@pytest.mark.parametrize("name", ["commits/u000000.json", "dataset.json"])
def test_hostile_json(out, name, content):
    (out / name).write_bytes(content)
    with pytest.raises(DatasetError):
        open_dataset(out)
    assert not verify_dataset(out).ok


def test_a_commit_of_no_planned_unit(out):
    for name in ("u000003", "u999999", "u000000000000000001"):
        (out / "commits" / f"{name}.json").write_text((out / "commits" / "u000000.json").read_text())
        with pytest.raises(DatasetError, match="unit must be one of the plan's 3 units"):
            open_dataset(out)
        (out / "commits" / f"{name}.json").unlink()


def test_files_of_other_names_are_not_commits(out):
    (out / "commits" / "..json").write_text("x")
    (out / "commits" / "u000007.json.bak").write_text("x")
    (out / "data" / "u000007.safetensors").write_text("x")
    check_rows(open_dataset(out), truth())
    assert verify_dataset(out).ok


HEADERS = [
    struct.pack("<Q", 2**63 - 1),
    struct.pack("<Q", 0),
    struct.pack("<Q", 4089),
    b"\xff" * 8,
]


@pytest.mark.parametrize("length", HEADERS)
def test_hostile_header_lengths(out, length):
    path = out / "data" / "u000000.safetensors"
    path.write_bytes(length + path.read_bytes()[8:])
    with pytest.raises(DatasetError, match="must begin with the header of its plan"):
        open_dataset(out)["loss"][0]
    assert [problem.unit for problem in verify_dataset(out).problems] == ["u000000"]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["loss"].update(data_offsets=h["double"]["data_offsets"]),
        lambda h: h["loss"].update(data_offsets=[0, 2**60]),
        lambda h: h["loss"].update(shape=[2**40]),
        lambda h: h["loss"].update(dtype="I16"),
        lambda h: h.update(other=h.pop("loss")),
    ],
)
def test_hostile_headers(out, change):
    path = out / "data" / "u000000.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8:4096])
    change(header)
    path.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(4088) + data[4096:])
    with pytest.raises(DatasetError, match="must begin with the header of its plan"):
        open_dataset(out)["loss"][0]


def test_two_units_swapped(out):
    a, b, away = (out / "data" / name for name in ("u000000.safetensors", "u000001.safetensors", "away"))
    a.rename(away)
    b.rename(a)
    away.rename(b)
    with pytest.raises(DatasetError, match="must begin with the header of its plan"):
        open_dataset(out)["loss"][0]


def test_a_row_table_of_other_examples(out):
    other = make_dataset(out.parent / "e", columns={"x": COLUMNS["loss"]})
    for source in (out / "rows" / "u000001.parquet", other.path / "rows" / "u000000.parquet"):
        data = source.read_bytes()
        (out / "rows" / "u000000.parquet").write_bytes(data)
        edit_json(out / "commits" / "u000000.json", lambda c: c["files"][1].update(bytes=len(data)))  # noqa: B023
        with pytest.raises(DatasetError, match=r"must hold examples 0\.\.3 and the norms of 4 points"):
            open_dataset(out).examples[0]


def test_garbage_instead_of_a_row_table(out):
    path = out / "rows" / "u000000.parquet"
    for data in (b"", b"PAR1", b"PAR1" + os.urandom(100) + b"PAR1", b"\x80\x04." * 20):
        path.write_bytes(data)
        edit_json(out / "commits" / "u000000.json", lambda c: c["files"][1].update(bytes=len(data)))  # noqa: B023
        with pytest.raises(DatasetError, match="must hold examples"):
            open_dataset(out).examples[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(format="zarr"), "Is it a tlfast dataset"),
        (lambda d: d.update(version=4), "must be of format version 1 or 2 or 3, got 4. Update tlfast"),
        (lambda d: d.update(version=3), "must match its own checksum"),
        (lambda d: d["plan"].update(n_examples=12), "must match its own checksum"),
        (lambda d: d["header"].update(model="other"), "must match its own checksum"),
        (lambda d: d.pop("about"), "must match its own checksum"),
        (lambda d: d["columns"][0].update(shape=[1e999]), "must match its own checksum|valid JSON"),
    ],
)
def test_changed_dataset_json(out, change, message):
    edit_json(out / "dataset.json", change)
    with pytest.raises(DatasetError, match=message):
        open_dataset(out)


def test_a_config_hash_of_another_dataset(out):
    def forge(d):
        d.pop("checksum")
        d["config_hash"] = "0" * 64
        d["checksum"] = checksum_of(d)

    edit_json(out / "dataset.json", forge)
    with pytest.raises(DatasetError, match="must match its config_hash"):
        open_dataset(out)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["plan"].update(n_examples=2**59, rows_per_unit=1),
        lambda d: d["columns"][0].update(shape=[2**47, 2**47]),
        lambda d: d["columns"][0].update(shape=[-6]),
        lambda d: d["columns"][0].update(shape="66"),
        lambda d: d["columns"][0].update(dtype="U8"),
        lambda d: d["columns"][0].update(name=7),
        lambda d: d["columns"].append(d["columns"][0]),
        lambda d: d["columns"].clear(),
        lambda d: d.update(columns=None),
        lambda d: d.update(plan=[1, 2]),
        lambda d: d["plan"].update(n_examples=True),
        lambda d: d.update(header=[]),
    ],
)
def test_hostile_dataset_json_with_a_right_checksum(out, change):

    def forge(d):
        change(d)
        d.pop("checksum")
        identity = {key: d[key] for key in ("format", "version", "header", "columns", "plan")}
        d["config_hash"] = sha256(canonical(identity)).hexdigest()
        d["checksum"] = checksum_of(d)

    edit_json(out / "dataset.json", forge)
    with pytest.raises(DatasetError):
        open_dataset(out)
    assert not verify_dataset(out).ok
