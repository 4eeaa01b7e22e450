"""Rows by the ids of their examples, several points at once, arrays without a copy, joins, other programs."""

import mmap

import duckdb
import faiss
import numpy as np
import pandas
import pytest
import torch
from dataset_cases import COLUMNS, PLAN, examples, make_dataset, make_writer, rows_of, same_bits, truth, write_units

from tlfast.dataset import DatasetError, Example, Plan, join_datasets, open_dataset
from tlfast.dataset.read.columns import read_stretches

THERE = [4, 5, 6, 7, 8, 9, 10]  # units 1 and 2 of three


@pytest.fixture
def partial(tmp_path):
    """A dataset without its first unit."""
    writer, tensors = make_writer(tmp_path / "partial"), truth()
    for unit in PLAN.units[1:]:
        writer.write_unit(unit, rows_of(unit, tensors), examples(unit))
    return open_dataset(tmp_path / "partial", partial=True)


def test_ids_are_not_rows_in_a_partial_dataset(partial, tmp_path):
    assert partial.ids.tolist() == THERE
    assert partial.ids_of([-1, 0]).tolist() == [10, 4]
    assert partial.rows_of([10, 4, 4]).tolist() == [6, 0, 0]
    assert partial.rows_of(torch.tensor([[5, 6], [7, 8]])).tolist() == [[1, 2], [3, 4]]
    assert partial.rows_of([]).tolist() == []
    assert int(partial.rows_of(9)) == 5
    assert partial.examples[int(partial.rows_of(9))]["id"] == 9
    for name, tensor in truth().items():
        assert same_bits(partial[name][partial.rows_of([8, 5])], tensor[[8, 5]])
    whole = make_dataset(tmp_path / "whole")
    assert whole.rows_of(whole.ids).tolist() == list(range(11))


@pytest.mark.parametrize("ids, message", [
    ([5, 3], "id must be of a unit that is there, got 3. See ds.ids; complete the dataset."),
    (0, "id must be of a unit that is there, got 0"), ([11], r"id must be in 0\.\.10, got 11. See ds.ids"),
    (-1, r"id must be in 0\.\.10, got -1"),
])  # fmt: skip
def test_ids_that_are_not_there(partial, ids, message):
    with pytest.raises(KeyError, match=message):
        partial.rows_of(ids)


def test_ids_of_another_type(partial):
    with pytest.raises(TypeError, match="GradientDataset: ids must hold ints, got float64"):
        partial.rows_of([1.0])
    with pytest.raises(TypeError, match="GradientDataset: ids must hold ints, got bool"):
        partial.rows_of([True])


def test_an_empty_dataset_has_no_ids(tmp_path):
    make_writer(tmp_path)
    ds = open_dataset(tmp_path, partial=True)
    assert ds.ids.tolist() == []
    assert ds["loss"][:].shape == (0,)
    assert ds["loss"][[]].shape == (0,)
    for example in (0, -1):
        with pytest.raises(KeyError, match="id must be"):
            ds.rows_of(example)


def test_units_of_unequal_length(tmp_path):
    writer, tensors = make_writer(tmp_path, plan=Plan(11, 4)), truth()
    for unit in (PLAN.unit(0), PLAN.unit(2)):
        writer.write_unit(unit, rows_of(unit, tensors), examples(unit))
    ds = open_dataset(tmp_path, partial=True)
    there = [0, 1, 2, 3, 8, 9, 10]
    assert ds.ids.tolist() == there
    for name, tensor in tensors.items():
        assert same_bits(ds[name][[6, 0, 5, 4, 3]], tensor[there][[6, 0, 5, 4, 3]])


def test_several_points_at_once(tmp_path):
    ds, tensors = make_dataset(tmp_path), truth()
    for index in (3, [9, 1], slice(2, 7), torch.arange(11) > 6):
        everything = ds.rows(index)
        assert list(everything) == list(COLUMNS)
        assert all(same_bits(rows, tensors[name][index]) for name, rows in everything.items())
    assert list(ds.rows([0], points=["loss"])) == ["loss"]
    columns, memory = [ds["double"], ds["loss"]], None
    for bounds in ([(9, 11), (2, 7), (3, 3)], [(0, 3)], [(0, 11)], []):
        memory = read_stretches(columns, bounds, memory)
        there = [row for start, stop in bounds for row in range(start, stop)]
        assert all(same_bits(rows, tensors[name][there]) for name, rows in memory.items())
    with pytest.raises(KeyError, match="point must be one of"):
        ds.rows(0, points=["nope"])


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_arrays_of_a_unit(tmp_path, access):
    make_dataset(tmp_path)
    ds, tensors = open_dataset(tmp_path, access=access), truth()
    for name in ("blocks.1.attn", "loss", "double"):
        for k, unit in enumerate(ds.units):
            array = ds[name].numpy(k)
            assert same_bits(torch.from_numpy(array.copy()), tensors[name][unit.start : unit.stop])
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
        assert (ds[name].numpy(-1) == ds[name].numpy(2)).all()
    name = "blocks.0.hook_resid_post"
    with pytest.raises(TypeError) as error:
        ds[name].numpy(-1)
    copy = f"ds['{name}'][{ds.units[-1].start}:{ds.units[-1].stop}].float().numpy()"
    assert str(error.value) == (
        f"GradientColumn: dtype must be one that numpy has, got bfloat16. Convert a copy: {copy}."
    )
    unit = ds.units[-1]
    assert same_bits(torch.from_numpy(eval(copy)), tensors[name][unit.start : unit.stop].float())
    with pytest.raises(IndexError, match=r"GradientColumn: unit must be in -3\.\.2, got 3. See ds.units"):
        ds["loss"].numpy(3)


def owner(array):
    """What an array's memory belongs to in the end."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_faiss_takes_the_mapped_rows_as_they_are(tmp_path):
    columns, plan = {"h": (torch.float32, (8,))}, Plan(120, 50)
    ds, rows = make_dataset(tmp_path, columns=columns, plan=plan), truth(columns, plan)["h"]
    index, expected = faiss.IndexFlatL2(8), faiss.IndexFlatL2(8)
    for k in range(len(ds.units)):
        array = ds["h"].numpy(k)
        assert isinstance(owner(array), mmap.mmap)
        assert np.shares_memory(array, np.ascontiguousarray(array, dtype=np.float32)), "what faiss makes of it"
        index.add(array)
    expected.add(rows.numpy())
    for found, true in zip(index.search(rows[:20].numpy(), 3), expected.search(rows[:20].numpy(), 3), strict=True):
        assert (found == true).all()
    assert not isinstance(owner(ds["h"].numpy(0).copy()), mmap.mmap)


def test_other_programs_read_the_row_tables(tmp_path):
    ds = make_dataset(tmp_path)
    rows = duckdb.sql(f"SELECT id, source, \"norm:loss\" FROM '{tmp_path}/rows/*.parquet' ORDER BY id").fetchall()
    assert [(i, source) for i, source, _ in rows] == [(i, f"file_{i % 3}.py") for i in range(11)]
    assert np.array_equal(np.float32([norm for _, _, norm in rows]), ds.norms("loss").numpy())
    frame = pandas.concat(pandas.read_parquet(path) for path in sorted((tmp_path / "rows").iterdir()))
    assert frame["id"].tolist() == list(range(11))
    assert frame["input_ids"].iloc[3].tolist() == ds.examples[3]["input_ids"]
    assert np.array_equal(frame["norm:double"].to_numpy(), ds.norms("double").numpy())


OTHER = {"late": (torch.float32, (3,))}


def test_a_join_has_the_examples_of_both(partial, tmp_path):
    other = make_dataset(tmp_path / "other", columns=OTHER)
    for left, right in ((partial, other), (other, partial)):
        pair = join_datasets(left, right)
        assert pair.ids.tolist() == THERE
        assert len(pair) == 7
        sides = (pair.left, pair.right) if left is partial else (pair.right, pair.left)
        for index in (2, -1, [6, 0], slice(1, 6, 2), torch.arange(7) > 3):
            assert same_bits(sides[0]["loss"][index], truth()["loss"][THERE][index])
            assert same_bits(sides[1]["late"][index], truth(OTHER)["late"][THERE][index])
        assert torch.equal(sides[1].norms("late"), other.norms("late")[THERE])
        assert "Join: 7 examples of" in repr(pair)
    with pytest.raises(IndexError, match="row must be in"):
        pair.left["late"][7]


def test_a_join_of_other_data_is_refused(tmp_path):
    ds = make_dataset(tmp_path / "a")
    writer = make_writer(tmp_path / "b", columns=OTHER)
    for unit in PLAN.units:
        changed = [Example(e.id, [*e.input_ids, 7] if e.id == 9 else e.input_ids, "b", 0, 1) for e in examples(unit)]
        writer.write_unit(unit, rows_of(unit, truth(OTHER)), changed)
    with pytest.raises(DatasetError, match=r"example 9 must have the same tokens in both datasets, got 6 tokens .* 7"):
        join_datasets(ds, open_dataset(tmp_path / "b"))


def test_equal_fingerprints_save_reading_the_tokens(tmp_path):
    header = {"examples": {"sha256": "f" * 64}}
    a, b = (make_dataset(tmp_path / n, columns=c, header=header) for n, c in (("a", COLUMNS), ("b", OTHER)))
    c = make_dataset(tmp_path / "c", columns=OTHER, header={"examples": {"sha256": "e" * 64}})
    for path in (tmp_path / "a" / "rows").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert len(join_datasets(a, b)) == 11
    with pytest.raises(DatasetError, match="must hold examples"):
        join_datasets(a, c)


def test_a_dataset_that_grows_keeps_the_rows_it_was_opened_with(tmp_path):
    writer, tensors = make_writer(tmp_path), truth()
    unit = PLAN.unit(1)
    writer.write_unit(unit, rows_of(unit, tensors), examples(unit))
    ds = open_dataset(tmp_path, partial=True)
    write_units(writer)
    assert ds.ids.tolist() == [4, 5, 6, 7]
    assert same_bits(ds["loss"][[0, 3]], tensors["loss"][[4, 7]])
