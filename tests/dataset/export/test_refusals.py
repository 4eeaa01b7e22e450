"""Exports that can't be made: a clear error, and nothing left of them."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import kinds_cases
import numpy as np
import pytest
import torch
from dataset_cases import flip, make_dataset, make_writer

from tlfast.dataset import Column, DatasetError, FieldExample, Plan, export_dataset
from tlfast.dataset.export.formats import FORMATS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of three units, and room beside it."""
    folder = tmp_path_factory.mktemp("export")
    make_dataset(folder / "ds")
    return folder


@pytest.mark.parametrize("to", FORMATS)
def test_a_failed_export_leaves_nothing(folder, tmp_path, to):
    def fail(n):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        export_dataset(folder / "ds", tmp_path / "out", to=to, progress=fail)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_flipped_bit_is_not_exported(folder, tmp_path, to):
    shutil.copytree(folder / "ds", tmp_path / "ds")
    flip(tmp_path / "ds" / "data" / "u000001.safetensors", 4100, 3)
    with pytest.raises(DatasetError, match=r"u000001\.safetensors must have the CRC32C"):
        export_dataset(tmp_path / "ds", to=to)
    assert os.listdir(tmp_path) == ["ds"]


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(DatasetError, match=r"out must be a new name, got .*, which exists\. Choose"):
            export_dataset(folder / "ds", tmp_path / name, to="npy")

    def somebody_else(n):
        (tmp_path / "late").mkdir(exist_ok=True)
        (tmp_path / "late" / "mine").touch()

    with pytest.raises(DatasetError, match="out must be a new name"):
        export_dataset(folder / "ds", tmp_path / "late", to="npy", progress=somebody_else)
    assert os.listdir(tmp_path / "late") == ["mine"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"to": "csv"}, "to must be one of parquet, arrow, npy, hf, lance, bergson, got 'csv'"),
        ({"to": "npy", "points": ["los"]}, r"points must be some of blocks\.0\.hook_resid_post, .*, got 'los'"),
        ({"to": "npy", "points": []}, "points must be some of .*, got none"),
        ({"to": "npy", "out": "nowhere/out"}, "out must lie in a folder that exists, got nowhere"),
    ],
)
def test_bad_arguments_are_refused(folder, settings, text):
    with pytest.raises(DatasetError, match=f"export_dataset: {text}"):
        export_dataset(folder / "ds", **settings)
    assert os.listdir(folder) == ["ds"]


def test_an_empty_row_is_refused(tmp_path):
    columns = {"a": (torch.float32, (3, 0)), "b": (torch.float32, ())}
    make_dataset(tmp_path / "ds", columns=columns)
    with pytest.raises(DatasetError, match=r"point 'a' must have a value in each row, got shape \[3, 0\]\. Leave it"):
        export_dataset(tmp_path / "ds", to="arrow")
    export_dataset(tmp_path / "ds", to="arrow", points=["b"])


def test_rows_per_token_are_refused_where_nobody_could_tell_whose_they_are(tmp_path):
    kinds_cases.write_units(kinds_cases.make_writer(tmp_path / "ds"))
    message = r"point 't' must have a row for each example, got one per token\. Leave it out, and read ds\['t'\]"
    with pytest.raises(DatasetError, match="export_dataset: " + message):
        export_dataset(tmp_path / "ds", to="bergson")  # has such rows of weights alone
    rule = (
        r"export_dataset: points must have rows of one kind, got 't', 'tq' per token and 'h', 'h:act', 'q' per example"
    )
    for to in set(FORMATS) - {"bergson"}:
        with pytest.raises(DatasetError, match=rule + r"\. Name those of one kind, and then the others\."):
            export_dataset(tmp_path / "ds", to=to)
    assert os.listdir(tmp_path) == ["ds"]


def test_a_field_called_as_the_position_of_a_token_is_refused(tmp_path):
    columns, plan = {"t": Column(torch.float32, (), per="token")}, Plan(1, 1)
    writer = kinds_cases.make_writer(tmp_path / "ds", columns=columns, plan=plan, fields={"position": "int64"})
    writer.write_unit(plan.unit(0), {"t": torch.ones(2)}, [FieldExample(0, [1, 2], "a", 0, 2, {"position": 7})])
    with pytest.raises(DatasetError, match="a field of the examples must have another name beside points per token"):
        export_dataset(tmp_path / "ds", to="parquet")
    assert np.load(export_dataset(tmp_path / "ds", to="npy") / "positions.npy").tolist() == [0, 1]


def test_nothing_to_export_is_refused(tmp_path):
    make_writer(tmp_path / "ds")
    with pytest.raises(DatasetError, match=r"export_dataset: path must hold at least one unit, got .*ds without any"):
        export_dataset(tmp_path / "ds", to="parquet", partial=True)


def test_a_full_disk_is_found_before(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    with pytest.raises(DatasetError, match=r"out must have 0\.000 GB free for this dataset, got 0\.000 GB"):
        export_dataset(folder / "ds", tmp_path / "out", to="npy")


@pytest.mark.parametrize("to, library, name", [("hf", "datasets", "hub"), ("lance", "lance", "lance")])
def test_a_missing_library_names_its_extra(folder, tmp_path, monkeypatch, to, library, name):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ImportError, match=rf"{library} must be installed.*pip install 'tlfast\[{name}\]'"):
        export_dataset(folder / "ds", tmp_path / "out", to=to)
    assert os.listdir(tmp_path) == []
