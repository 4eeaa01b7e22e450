"""Columns with a row for each token: by example, each with its own length, and all tokens behind each other."""

import pickle
import re
from dataclasses import replace
from itertools import chain

import pytest
import torch
from dataset_cases import same_bits
from kinds_cases import COLUMNS, LENGTHS, PLAN, example, make_writer, n_rows, rows_of, truth, write_units
from torch.utils.data import DataLoader

from tlfast.dataset import (
    Column,
    DatasetError,
    DatasetWriter,
    Example,
    Plan,
    RowDataset,
    ShuffledBatches,
    concat_datasets,
    join_datasets,
    merge_datasets,
    open_dataset,
)

N = len(LENGTHS)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A complete dataset, which no test changes."""
    folder = tmp_path_factory.mktemp("kinds") / "d"
    write_units(make_writer(folder))
    return folder


@pytest.fixture(params=["mmap", "pread"])
def ds(out, request):
    return open_dataset(out, access=request.param)


def test_an_example_has_a_row_for_each_of_its_tokens(ds):
    for i, expected in enumerate(truth()["t"]):
        assert same_bits(ds["t"][i], expected)
        assert same_bits(ds["t"][i - N], expected)
    assert ds["t"].lengths().tolist() == LENGTHS
    assert len(ds["t"]) == N
    assert repr(ds["t"]) == "TokenColumn('t', float16, 7 examples, [15, 5])"


@pytest.mark.parametrize(
    "index", [slice(None), slice(1, 6, 2), [3, 0, 0, 5], [], torch.tensor([6, 1]), torch.arange(N) % 2 == 0]
)
def test_several_examples_are_a_list(ds, index):
    expected = truth()["t"]
    chosen = torch.arange(N)[index].tolist() if len(torch.arange(N)[index]) else []
    for ours, i in zip(ds["t"][index], chosen, strict=True):
        assert same_bits(ours, expected[i])


@pytest.mark.parametrize("bad", [N, -N - 1, [0, N]])
def test_an_example_that_is_not_there(ds, bad):
    with pytest.raises(IndexError, match=r"row must be in -7\.\.6"):
        ds["t"][bad]


def test_the_flat_rows_and_whose_they_are(ds):
    column, expected = ds["t"], torch.cat(truth()["t"])
    assert same_bits(column.flat[:], expected)
    assert same_bits(column.flat[[14, 3, 3]], expected[[14, 3, 3]])
    assert column.flat.shape == (15, 5)
    examples, positions = column.where()
    assert examples.tolist() == [i for i in range(N) for _ in range(LENGTHS[i])]
    assert positions.tolist() == [k for i in range(N) for k in range(LENGTHS[i])]
    for index in ([14, 3, 3], slice(2, 9, 3), torch.tensor([[0, 1], [5, 6]]), 10):
        some, where = column.where(index)
        assert torch.equal(some, examples[index])
        assert torch.equal(where, positions[index])
        assert same_bits(column.flat[index], expected[index])
    with pytest.raises(IndexError, match=r"row must be in -15\.\.14"):
        column.where([15])


def test_the_rows_of_a_unit_as_an_array(ds):
    assert same_bits(torch.from_numpy(ds["t"].flat.numpy(1).copy()), torch.cat(truth()["t"][3:6]))


def test_the_norm_of_an_example_is_that_of_all_its_tokens(ds):
    expected = [torch.linalg.vector_norm(part.double()).float() for part in truth()["t"]]
    torch.testing.assert_close(ds.norms("t"), torch.stack(expected), rtol=2**-23, atol=0)
    assert ds.examples[1]["norms"]["t"] == 0.0


def test_encoded_tokens(ds):
    raw, decoded = ds.raw("tq"), ds["tq"]
    for i, expected in enumerate(truth()["tq"]):
        codes, scales = raw[i]
        assert codes.shape == expected.shape
        assert scales.shape == (LENGTHS[i],)
        assert torch.equal(decoded[i], codes * scales.view(-1, 1, 1))
        assert ((decoded[i] - expected).abs() <= scales.view(-1, 1, 1) * (0.5 + 2**-16)).all()
    assert [len(part) for part in raw[[4, 1]].codes] == [4, 0]
    assert torch.equal(torch.cat(decoded[:]), decoded.flat[:])


def test_a_partial_dataset_has_the_tokens_of_its_units(tmp_path):
    writer = make_writer(tmp_path / "d")
    unit = writer.plan.unit(1)
    writer.write_unit(unit, rows_of(unit, truth()), [example(i) for i in range(3, 6)])
    ds = open_dataset(tmp_path / "d", partial=True)
    assert [len(part) for part in ds["t"][:]] == LENGTHS[3:6]
    assert same_bits(ds["t"][1], truth()["t"][4])
    assert ds["t"].where()[0].tolist() == [0, 1, 1, 1, 1]


def test_units_without_a_token(tmp_path):
    empty = {"t": [torch.zeros(0, 5, dtype=torch.float16)] * 3}
    writer = make_writer(tmp_path / "d", columns={"t": make_writer(tmp_path / "x").columns["t"]})
    unit = writer.plan.unit(0)
    writer.write_unit(unit, {"t": torch.cat(empty["t"])}, [replace(example(i), length=0) for i in range(3)])
    ds = open_dataset(tmp_path / "d", partial=True)
    assert [part.shape for part in ds["t"][:]] == [(0, 5)] * 3
    assert ds["t"].flat[:].shape == (0, 5)
    assert ds["t"].where()[0].tolist() == []
    assert ds.verify().ok


def test_at_a_url(url):
    with DatasetWriter(url, header={}, columns=COLUMNS, plan=PLAN) as writer:
        write_units(writer)
    ds = open_dataset(url)
    assert ds.verify().ok
    for i, expected in enumerate(truth()["t"]):
        assert same_bits(ds["t"][i], expected)
    assert ds.raw("tq")[4].codes.shape == (4, 2, 3)


def test_rows_and_row_datasets_hold_them(ds):
    rows = ds.rows([4, 0], points=["t", "h"])
    assert [len(part) for part in rows["t"]] == [4, 2]
    assert rows["h"].shape == (2, 3)
    items = RowDataset(ds, points=["t", "tq"])
    assert items[4]["t"].shape == (4, 5)
    assert [len(item["tq"]) for item in items.__getitems__([6, 0])] == [5, 2]


def test_shuffled_batches_refuse_them_beside_rows_of_examples(ds):
    message = "ShuffledBatches: point 't' must have a row for each example, got one per token. Leave it out of points"
    with pytest.raises(ValueError, match=re.escape(message)):
        ShuffledBatches(ds, batch_size=2)
    batches = list(ShuffledBatches(ds, batch_size=2, points=["h", "q"]))
    for batch in batches:
        for i, row in zip(batch["id"].tolist(), batch["q"], strict=True):
            assert torch.equal(row, ds["q"][i])
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(N))


def test_shuffled_batches_of_tokens(ds):
    settings = {"batch_size": 4, "points": ["t", "tq"], "block_rows": 2, "mixed_blocks": 3}
    every = [(i, k) for i, n in enumerate(LENGTHS) for k in range(n)]

    def read(batches):
        places = []
        for batch in batches:
            assert list(batch) == ["id", "position", "t", "tq"]
            here = list(zip(batch["id"].tolist(), batch["position"].tolist(), strict=True))
            for point in ("t", "tq"):
                assert same_bits(batch[point], torch.stack([ds[point][i][k] for i, k in here]))
            places.append(here)
        return places

    first, again, other = (read(ShuffledBatches(ds, seed=seed, **settings)) for seed in (3, 3, 4))
    assert [len(part) for part in first] == [4, 4, 4, 3]
    assert first == again != other
    assert sorted(chain(*first)) == sorted(chain(*other)) == every != list(chain(*first))
    assert all(len({i for i, _ in part}) > 1 for part in first)
    assert list(chain(*read(ShuffledBatches(ds, shuffle=False, **settings)))) == every
    shares = [read(ShuffledBatches(ds, rank=rank, world_size=2, drop_last=True, **settings)) for rank in range(2)]
    assert [[len(part) for part in share] for share in shares] == [[4], [4]]
    begun = ShuffledBatches(ds, seed=3, **settings)
    iterator = iter(begun)
    next(iterator)
    state = pickle.loads(pickle.dumps(begun.state_dict()))
    iterator.close()
    rest = ShuffledBatches(ds, seed=3, **settings)
    rest.load_state_dict(state)
    assert read(rest) == first[1:]


def test_tokens_carry_the_fields_of_their_examples(ds):
    fields = ds.with_fields("t", "length", "norms")
    for batch in ShuffledBatches(fields, batch_size=4, block_rows=2, input_ids=True):
        ids = batch["id"].tolist()
        assert batch["length"].tolist() == [LENGTHS[i] for i in ids]
        assert torch.equal(batch["norm:t"], ds.norms("t")[ids])
        assert [len(tokens) for tokens in batch["input_ids"]] == [LENGTHS[i] for i in ids]


VIEWS = {
    "some": (lambda ds: ds.select([6, 1, 0, 0]), [6, 1, 0, 0]),
    "filtered": (lambda ds: ds.filter("length > 1"), [0, 2, 4, 6]),
    "several": (lambda ds: concat_datasets([ds, ds]), [*range(N), *range(N)]),
    "some of several": (
        lambda ds: concat_datasets([ds.select([4]), ds, ds.select([2, 5])]).select([7, 0, 9, 8, 5]),
        [6, 4, 5, 2, 4],
    ),
    "joined": (lambda ds: join_datasets(ds, ds.select([5, 3, 2])).left.view, [2, 3, 5]),
    "without tokens": (lambda ds: ds.select([5, 1]), [5, 1]),
    "empty": (lambda ds: ds.select([]), []),
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_the_flat_rows_of_a_view_and_whose_they_are(ds, view):
    """Tokens count on over the view's own rows, one taken twice too."""
    (made, examples), codes = VIEWS[view], ds.raw("tq")
    view = pickle.loads(pickle.dumps(made(ds)))
    whose = [(row, k) for row, i in enumerate(examples) for k in range(LENGTHS[i])]
    for point in ("t", "tq"):
        column = view[point]
        whole = torch.cat([ds[point].flat[[]], *(ds[point][i] for i in examples)])
        assert column.flat.shape == whole.shape
        assert same_bits(column.flat[:], whole)
        assert list(zip(*(part.tolist() for part in column.where()), strict=True)) == whose
        assert column.lengths().tolist() == [LENGTHS[i] for i in examples]
        if whose:
            some = torch.arange(len(whose)).flip(0)[::2]
            assert same_bits(column.flat[some], whole[some])
            assert column.where(-1) == whose[-1]
            assert [part.tolist() for part in column.where(some[None])] == [
                [list(p)] for p in zip(*(whose[i] for i in some), strict=True)
            ]
        with pytest.raises(IndexError, match="row must be in"):
            column.where(len(whose))
    raw = [codes.codes.flat[[]], *(codes[i].codes for i in examples)]
    assert torch.equal(view.raw("tq").codes.flat[:], torch.cat(raw))


@pytest.mark.filterwarnings("ignore:lance is not fork-safe")  # it says so once another test has imported it
@pytest.mark.parametrize("view", VIEWS)
def test_shuffled_batches_of_the_tokens_of_a_view(ds, view):
    made, examples = VIEWS[view]
    view = made(ds)
    every = sorted((i, k) for i in examples for k in range(LENGTHS[i]))
    for more in ({}, {"shuffle": False}, {"rank": 0, "world_size": 1}):
        found = []
        for batch in ShuffledBatches(view, 4, points=["t", "tq"], block_rows=2, mixed_blocks=3, **more):
            here = list(zip(batch["id"].tolist(), batch["position"].tolist(), strict=True))
            for point in ("t", "tq"):
                assert same_bits(batch[point], torch.stack([ds[point][i][k] for i, k in here]))
            found += here
        assert sorted(found) == every
    if every:
        loaded = list(DataLoader(ShuffledBatches(view, 3, points=["t"], block_rows=2), batch_size=None, num_workers=2))
        assert (
            sorted(
                zip(
                    torch.cat([b["id"] for b in loaded]).tolist(),
                    torch.cat([b["position"] for b in loaded]).tolist(),
                    strict=True,
                )
            )
            == every
        )


def test_the_tokens_of_merged_datasets(ds, out, tmp_path):
    write_units(make_writer(tmp_path / "more"))
    merge_datasets(tmp_path / "m", [out, tmp_path / "more"])
    merged = open_dataset(tmp_path / "m")
    assert same_bits(merged["t"].flat[:], torch.cat([ds["t"].flat[:]] * 2))
    examples, positions = merged["t"].where([15, 29, 0])
    assert (merged.ids_of(examples).tolist(), positions.tolist()) == ([7, 13, 0], [0, 4, 0])
    assert [len(batch["t"]) for batch in ShuffledBatches(merged, 16, points="t")] == [16, 14]


def test_tokens_that_no_batch_has(tmp_path, ds):
    columns = {"position": COLUMNS["t"], "t": COLUMNS["t"]}
    write_units(make_writer(tmp_path / "d", columns=columns))
    text = "ShuffledBatches: points must not include the name of a token's position, got 'position'. Leave it out, and"
    with pytest.raises(ValueError, match=re.escape(text)):
        ShuffledBatches(open_dataset(tmp_path / "d"), batch_size=2)
    assert len(list(ShuffledBatches(open_dataset(tmp_path / "d"), batch_size=15, points="t"))) == 1


def test_joins_and_pickles(ds, out):
    other = pickle.loads(pickle.dumps(ds))
    assert same_bits(other["t"][6], ds["t"][6])
    joined = join_datasets(ds, other)
    assert same_bits(joined.left["t"][4], ds["t"][4])
    assert [len(part) for part in joined.right["tq"][[0, 2]]] == [2, 3]


def test_tokens_that_are_not_the_same_are_not_joined(tmp_path):
    columns = {"t": Column(torch.float32, (), per="token")}
    for name, lengths in (("a", [2, 1]), ("b", [1, 2])):  # of one's own loop: the masks differ, nobody has tokens
        writer = DatasetWriter(tmp_path / name, header={}, columns=columns, plan=Plan(2, 2))
        examples = [Example(i, [], "", 0, n) for i, n in enumerate(lengths)]
        writer.write_unit(writer.plan.unit(0), {"t": torch.arange(3.0)}, examples)
    a, b = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    with pytest.raises(DatasetError, match="example 0 must have as many tokens in both datasets, got 2 and 1"):
        join_datasets(a, b)
    assert len(join_datasets(a, a)) == 2


def test_a_dataset_without_a_token(tmp_path):
    columns = {"t": Column(torch.float32, (3,), per="token", encoding="int8")}
    writer = DatasetWriter(tmp_path / "d", header={}, columns=columns, plan=Plan(2, 2))
    writer.write_unit(writer.plan.unit(0), {"t": torch.empty(0, 3)}, [Example(i, [], "", 0, 0) for i in range(2)])
    ds = open_dataset(tmp_path / "d")
    assert ds.verify().ok
    assert (ds["t"].flat.shape, ds["t"][1].shape, ds["t"].lengths().tolist()) == ((0, 3), (0, 3), [0, 0])
    assert list(ShuffledBatches(ds, batch_size=2)) == []
    assert ds.search(torch.ones(1, 3), 2).indices.shape == (1, 0)
    assert ds.norms("t").tolist() == [0.0, 0.0]


def test_what_it_says_of_itself(ds):
    assert ds.info()["points"]["tq"] == {
        "dtype": "F32", "shape": [2, 3], "of": "act", "per": "token", "encoding": "int8",
    }  # fmt: skip
    assert ds.info()["points"]["h"] == {"dtype": "BF16", "shape": [3]}
    assert "float32, act, per token, as int8" in ds._repr_html_()
    assert [n_rows("t", i) for i in range(N)] == LENGTHS
    assert "tokens" not in ds.examples[0]


def test_what_only_other_columns_have_is_an_error_with_a_hint(ds):
    joined = join_datasets(ds, ds)
    assert joined.left["h"].shape == (N, 3)
    message = "TokenColumn: shape must be asked of a column per example, got 't', per token. See column.flat.shape and"
    with pytest.raises(AttributeError, match=re.escape(message)):
        ds["t"].shape  # noqa: B018 (it raises)
    assert joined.left["t"].flat.shape == (sum(LENGTHS), 5)


def test_a_loader_of_them_makes_lists(ds):
    batches = list(DataLoader(RowDataset(ds, points=["t"], input_ids=True), batch_size=3, collate_fn=list))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert all(same_bits(item["t"], ds["t"][item["id"]]) for batch in batches for item in batch)
