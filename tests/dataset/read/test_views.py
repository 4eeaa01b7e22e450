"""Views: selected, filtered and joined rows read as the rows themselves do, everywhere that a dataset can be given."""

import json
import pickle

import kinds_cases
import pyarrow.parquet
import pytest
import torch
from dataset_cases import COLUMNS, PLAN, examples, make_dataset, make_writer, rows_of, same_bits, truth
from view_cases import VIEWS, check_columns, check_examples, check_loaders

from tlfast.dataset import DatasetError, RowDataset, ShuffledBatches, concat_datasets, export_dataset, open_dataset

POINTS = ["loss", "double"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two datasets of other rows."""
    folder = tmp_path_factory.mktemp("views")
    a = make_dataset(folder / "a")
    writer = make_writer(folder / "b", plan=PLAN)
    for unit in PLAN.units:
        writer.write_unit(unit, rows_of(unit, truth(seed=7)), examples(unit))
    return a, open_dataset(folder / "b")


@pytest.fixture(params=VIEWS)
def view(request, two):
    return VIEWS[request.param](*two)


def test_a_view_reads_as_its_rows(view):
    check_columns(*view)
    check_examples(*view)


def test_a_view_in_loaders(view):
    check_loaders(*view, POINTS)


def test_the_checks_can_fail(two):
    view, rows = VIEWS["some of both"](*two)
    for wrong in (rows[::-1], [(two[0], 3), *rows[1:]]):
        for check in (check_columns, check_examples, lambda *given: check_loaders(*given, POINTS)):
            if check is not check_loaders and wrong == rows:
                continue
            if wrong == rows[::-1] and check not in (check_columns, check_examples):
                continue  # a loader may give them in any order
            with pytest.raises(AssertionError):
                check(view, wrong)


def test_a_view_is_pickled_and_told(view):
    view, rows = view
    again = pickle.loads(pickle.dumps(view))
    assert same_bits(again["loss"][:], view["loss"][:])
    info = json.loads(json.dumps(view.info()))
    assert info["rows"] == len(rows)
    assert list(info["points"]) == view.points
    assert repr(view).splitlines()[0].startswith("DatasetView of ")
    assert f"{len(rows)} of " in view._repr_html_()
    assert len(view.sample(3)) == min(3, len(rows))


def test_a_view_is_exported(view, tmp_path):
    view, rows = view
    if not rows:
        with pytest.raises(DatasetError, match=r"path must hold at least one row, got a view without any. Select some"):
            export_dataset(view, tmp_path / "x", to="parquet")
        return
    table = pyarrow.parquet.read_table(export_dataset(view, tmp_path / "x", to="parquet"))
    assert table.column("id").to_pylist() == [ds.examples[row]["id"] for ds, row in rows]
    assert table.column("grad:loss").to_pylist() == [float(ds["loss"][row]) for ds, row in rows]
    with pytest.raises(
        DatasetError, match=r"export_dataset: out must be given for a view, got none. Name the new file"
    ):
        export_dataset(view, to="parquet")


def test_an_export_of_a_view_is_verified(tmp_path):
    ds = make_dataset(tmp_path / "d")
    path = tmp_path / "d" / "data" / "u000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    export_dataset(ds.select([0, 9]), tmp_path / "fine", to="npy")
    with pytest.raises(DatasetError, match=r"u000001.safetensors must have the CRC32C"):
        export_dataset(ds.select([0, 5]), tmp_path / "wrong", to="npy")
    assert not (tmp_path / "wrong").exists()


def test_shuffled_batches_of_a_view_go_on_where_they_were(two):
    view = concat_datasets(two).filter("length != 4")
    whole = [batch["id"].tolist() for batch in ShuffledBatches(view, 3, seed=5)]
    first = ShuffledBatches(view, 3, seed=5)
    iterator = iter(first)
    begun = [next(iterator)["id"].tolist() for _ in range(2)]
    rest = ShuffledBatches(view, 3, seed=5)
    rest.load_state_dict(first.state_dict())
    assert begun + [batch["id"].tolist() for batch in rest] == whole


def test_a_partial_dataset(tmp_path):
    writer, tensors = make_writer(tmp_path), truth()
    for unit in PLAN.units[1:]:
        writer.write_unit(unit, rows_of(unit, tensors), examples(unit))
    view = open_dataset(tmp_path, partial=True).filter("id >= 6")
    assert view.ids.tolist() == [6, 7, 8, 9, 10]
    assert same_bits(view["loss"][:], tensors["loss"][6:])
    assert view.rows_of([10, 6]).tolist() == [4, 0]
    with pytest.raises(KeyError, match=r"id must be of a row of the view, got 5. See view.ids."):
        view.rows_of([6, 5])
    assert len(open_dataset(make_writer(tmp_path / "e").out, partial=True).filter("length > 0")) == 0


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    kinds_cases.write_units(kinds_cases.make_writer(folder))
    return open_dataset(folder)


@pytest.mark.parametrize("rows", [[6, 0, 0, 2], [], [3], list(range(7))], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_columns_of_every_kind(kinds, rows, several):
    view = concat_datasets([kinds, kinds.select([0])]).select(rows) if several else kinds.select(rows)
    for point in kinds.points:
        found, whole = view[point][:], kinds[point][rows]
        assert len(found) == len(rows)
        assert all(same_bits(a, b) for a, b in zip(found, whole, strict=True)), point
        if rows:
            assert same_bits(view[point][-1], kinds[point][rows[-1]])
    assert view["t"].lengths().tolist() == [kinds_cases.LENGTHS[r] for r in rows]
    for point in ("q", "tq"):
        codes = zip(view.raw(point)[:].codes, kinds.raw(point)[rows].codes, strict=True)
        assert all(torch.equal(a, b) for a, b in codes), point
    batches = list(ShuffledBatches(view, 2, points=["q", "h"], shuffle=False))
    assert sum(len(batch["q"]) for batch in batches) == len(rows)
    if rows:
        assert same_bits(torch.cat([batch["q"] for batch in batches]), kinds["q"][rows])


def test_what_tokens_of_a_view_do_not_have(kinds):
    column = kinds.select([2])["t"]
    assert repr(column) == "ViewTokenColumn('t', float16, 1 examples)"
    with pytest.raises(AttributeError, match="DatasetView: shape must be asked of a column per example, got 't', per"):
        column.shape  # noqa: B018 (it raises)
    with pytest.raises(
        TypeError, match=r"DatasetView: numpy must be asked of a dataset's own column, got h. Read view"
    ):
        kinds.select([2])["h"].numpy(0)
    assert kinds.with_fields("t")["t"].flat.shape == (sum(kinds_cases.LENGTHS), 5)


def test_what_belongs_to_a_dataset_alone(two):
    view = two[0].select([1])
    for name in ("plan", "header", "units", "verify", "push_to_hub", "report", "path"):
        message = f"DatasetView: {name} must be asked of a dataset, got a view of 1. Ask one of view.sources: "
        with pytest.raises(AttributeError, match=message):
            getattr(view, name)
    with pytest.raises(AttributeError, match=r"'DatasetView' object has no attribute 'nothing'"):
        view.nothing  # noqa: B018 (it raises)
    with pytest.raises(KeyError, match=r"DatasetView: point must be one of loss, got 'double'. See view.points."):
        view.with_fields("loss")["double"]
    with pytest.raises(IndexError, match=r"DatasetView: example must be in 0\.\.0, got 1. See len\(view\)."):
        view.examples[1]
    assert same_bits(two[0].select([3, 4])["loss"][::-1], two[0]["loss"][[4, 3]])


@pytest.mark.parametrize("indices, error, message", [
    ([11], IndexError, r"row must be in -11\.\.10, got 11"), ([-12], IndexError, r"row must be in -11\.\.10, got -12"),
    ([True], IndexError, r"mask must have shape \[11\], got \[1\]"), ([1.0], TypeError, "must hold ints, got"),
    (3, TypeError, r"select: indices must be a list of rows, got one number. Give \[row\], or flatten it."),
    ([[1], [2]], TypeError, r"select: indices must be a list of rows, got shape \[2, 1\]"),
    (None, TypeError, "got None"),
])  # fmt: skip
def test_wrong_rows(two, indices, error, message):
    with pytest.raises(error, match=message):
        two[0].select(indices)


def test_rows_by_ids_that_several_have(two):
    both = concat_datasets(two)
    message = r"DatasetView: id must be of one row, got 3, which several rows have. See view.ids and view.where\(\)."
    with pytest.raises(KeyError, match=message):
        both.rows_of([3])
    assert both.select([3, 15]).rows_of([4, 3]).tolist() == [1, 0]


def test_datasets_that_can_not_be_joined(two, kinds, tmp_path):
    changed = dict(COLUMNS) | {"double": (torch.float64, (3,))}
    other = make_dataset(tmp_path, columns=changed)
    message = (
        r"concat_datasets: point 'double' must be the same in all datasets, got F64 \[2\] in dataset 1 and F64 \[3\] in"
        r" dataset 2. They can't be joined."
    )
    with pytest.raises(DatasetError, match=message):
        concat_datasets([two[0], other])
    message = "got BF16 .* and no such point in dataset 2. concat_datasets of ds.with_fields"
    with pytest.raises(DatasetError, match=message):
        concat_datasets([two[0], two[1].with_fields("double")])
    assert concat_datasets([two[0].with_fields("loss"), other.with_fields("loss")]).points == ["loss"]
    third = make_dataset(tmp_path / "third", header={"model": "another"})
    with pytest.raises(DatasetError, match=r"concat_datasets: header\['model'\] must be the same in all datasets, got"):
        concat_datasets([*two, third])
    assert len(concat_datasets([*two, third], may_differ=["model", *two[0].header])) == 3 * len(third)
    with pytest.raises(DatasetError, match=r"concat_datasets: datasets must be open datasets or views, got none. Open"):
        concat_datasets([])
    with pytest.raises(DatasetError, match=r"datasets must be open datasets or views, got str. Open each by open_dat"):
        concat_datasets(["a"])
    q = kinds.with_fields("q")
    plain = make_dataset(tmp_path / "q", columns={"q": (torch.float32, (70,))})
    with pytest.raises(
        DatasetError, match=r"got F32 \[70\], int8:64 in dataset 1|got F32 \[70\], as int8:64 in dataset"
    ):
        concat_datasets([q, plain])


def test_fields_that_batches_carry(two):
    view = two[0].with_fields("loss", "length", "norms")
    assert view.points == ["loss"]
    (batch,) = ShuffledBatches(view, 100, shuffle=False)
    assert list(batch) == ["id", "loss", "length", "norm:loss"]
    assert batch["length"].tolist() == [i % 5 + 2 for i in range(11)]
    assert torch.equal(batch["norm:loss"], two[0].norms("loss"))
    assert list(RowDataset(view.filter("id > 5"))[0]) == ["id", "loss", "length", "norm:loss"]
    assert two[0].with_fields("source").points == two[0].points
    assert two[0].fields == ["id", "input_ids", "source", "start", "length", "flags"]
    item = RowDataset(two[0].with_fields("loss", "source"))[[3, 1]]
    assert item["source"] == ["file_0.py", "file_1.py"]


def test_fields_that_there_are_not(two):
    with pytest.raises(
        KeyError, match=r"with_fields: name must be one of .*, norms, got 'nope'. See ds.points and ds.f"
    ):
        two[0].with_fields("loss", "nope")
    with pytest.raises(
        ValueError, match=r"with_fields: names must be names of points or fields, got \(\). Write ds.wi"
    ):
        two[0].with_fields()
    with pytest.raises(ValueError, match=r"with_fields: names must be names of points or fields, got"):
        two[0].with_fields(["loss"])


def test_a_point_with_the_name_of_a_field(tmp_path):
    ds = make_dataset(tmp_path, columns=dict.fromkeys(["length", "x", "norm:x"], (torch.float32, ())))
    with pytest.raises(
        ValueError, match=r"with_fields: name must be of a point or of a field, got 'length', which is bo"
    ):
        ds.with_fields("length")
    with pytest.raises(
        ValueError, match=r"RowDataset: points must not include the name of another entry, got 'norm:x'"
    ):
        RowDataset(ds.with_fields("norms"))
