"""Datasets as torch's own two kinds: every row exactly once, in an order that can be gone on with."""

import pickle
import re
from itertools import islice

import pytest
import torch
from dataset_cases import COLUMNS, PLAN, examples, make_dataset, make_writer, rows_of, same_bits, truth, write_units
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tlfast.dataset import DatasetError, Plan, RowDataset, ShuffledBatches, open_dataset

N = 103
POINTS = ["blocks.0.hook_resid_post", "loss"]

# Another test may have imported lance, whose warning at any fork is about its own use in the child.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    """103 rows in units of 10."""
    return make_dataset(tmp_path_factory.mktemp("torch") / "d", plan=Plan(N, 10))


def check_batches(batches, n=N, points=POINTS):
    """Fail unless the batches hold each of ``n`` rows once, each with its own values; return the ids in their order."""
    tensors = truth(plan=Plan(N, 10))
    ids = [i for batch in batches for i in batch["id"].tolist()]
    assert sorted(ids) == list(range(n))
    for batch in batches:
        assert set(batch) >= {"id", *points}
        for point in points:
            assert same_bits(batch[point], tensors[point][batch["id"]])
    return ids


def test_the_order_of_an_epoch(ds):
    def ids(epoch=0, **changes):
        batches = ShuffledBatches(
            ds, **({"batch_size": 10, "points": POINTS, "block_rows": 4, "mixed_blocks": 3} | changes)
        )
        batches.set_epoch(epoch)
        return check_batches(list(batches))

    assert ids() == ids()
    orders = [ids(), ids(1), ids(2), ids(seed=1), ids(seed=1, epoch=1), ids(rank=0, world_size=1, block_rows=3)]
    assert len(set(map(tuple, orders))) == len(orders)
    assert ids(shuffle=False) == list(range(N))
    assert ids(batch_size=1) == ids(batch_size=1000) == ids()
    near = sum(abs(a - b) == 1 for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert near < N // 3, "rows of a block must be mixed with those of others"


def test_batches_are_of_the_size_that_was_asked_for(ds):
    batches = ShuffledBatches(ds, 10, block_rows=3, mixed_blocks=2)
    assert [len(batch["id"]) for batch in batches] == [10] * 10 + [3]
    assert len(list(ShuffledBatches(ds, 10, drop_last=True))) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_workers_and_ranks(ds, workers):
    batches = []
    for rank in range(2):
        rows = ShuffledBatches(ds, 8, points=POINTS, rank=rank, world_size=2, block_rows=4)
        rows.set_epoch(3)
        batches += DataLoader(rows, batch_size=None, num_workers=workers)
    check_batches(batches)


def test_workers_that_outlive_an_epoch_see_the_next(ds):
    rows = ShuffledBatches(ds, 8, points=POINTS, block_rows=4)
    loader = DataLoader(rows, batch_size=None, num_workers=1, persistent_workers=True)
    first = check_batches(list(loader))
    rows.set_epoch(1)
    assert check_batches(list(loader)) != first


@pytest.mark.parametrize("drop_last", [False, True])
def test_drop_last_gives_every_worker_as_much(ds, drop_last):
    sizes = set()
    for rank in range(3):
        rows = ShuffledBatches(ds, 4, points=["loss"], rank=rank, world_size=3, drop_last=drop_last)
        sizes.add(tuple(len(batch["id"]) for batch in rows))
    assert (sizes == {(4,) * 8}) is drop_last


def test_ranks_as_torchrun_says(ds, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    rows = ShuffledBatches(ds, 50)
    assert (rows.rank, rows.world_size) == (3, 4)
    assert sum(len(batch["id"]) for batch in rows) == N - N * 3 // 4
    assert ShuffledBatches(ds, 50, rank=0, world_size=1).world_size == 1


@given(st.integers(0, 14), st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.booleans())
@settings(max_examples=20)
def test_going_on_gives_exactly_the_rest(ds, taken, batch_size, block_rows, mixed, shuffle):
    def make():
        return ShuffledBatches(
            ds, batch_size, points=POINTS, block_rows=block_rows, mixed_blocks=mixed, shuffle=shuffle, seed=5
        )

    whole = make()
    whole.set_epoch(2)
    everything = list(whole)
    begun = make()
    begun.set_epoch(2)
    iterator = iter(begun)
    first = list(islice(iterator, taken))
    state = pickle.loads(pickle.dumps(begun.state_dict()))
    iterator.close()
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    rest = list(resumed)
    assert [b["id"].tolist() for b in first + rest] == [b["id"].tolist() for b in everything]
    check_batches(first + rest)
    assert len(list(resumed)) == len(everything), "the iteration after that is a whole one"


def with_state(rows):
    """What a stateful loader does in each worker: its dataset's state after each batch."""

    class Stateful(torch.utils.data.IterableDataset):
        def __iter__(self):
            if (state := torch.utils.data.get_worker_info().id) in self.states:
                rows.load_state_dict(self.states[state])
            for batch in rows:
                yield batch | {"state": rows.state_dict()}

        states = {}  # noqa: RUF012

    return Stateful()


def test_every_worker_goes_on_where_it_was(ds):
    def loader(stateful):
        return DataLoader(stateful, batch_size=None, num_workers=2)

    first, states = [], {}
    for batch in loader(with_state(ShuffledBatches(ds, 8, points=POINTS))):
        first.append(batch)
        states[batch["state"]["order"]["worker"]] = batch["state"]
        if len(first) == 5:
            break
    rest = with_state(ShuffledBatches(ds, 8, points=POINTS))
    rest.states = states
    check_batches(first + list(loader(rest)))


@pytest.mark.parametrize(
    "change, key", [({"seed": 1}, "seed"), ({"batch_size": 9}, "batch_size"), ({"world_size": 2}, "world_size")]
)
def test_a_state_of_another_order_is_refused(ds, change, key):
    same = {"batch_size": 8, "rank": 0, "world_size": 1}
    state = ShuffledBatches(ds, **same).state_dict()
    other = ShuffledBatches(ds, **same | change)
    other.load_state_dict(state)
    with pytest.raises(
        ValueError, match=f"ShuffledBatches: {key} of the state must be the same, got .* there, .* here"
    ):
        iter(other)


def test_a_state_of_something_else(ds):
    rows = ShuffledBatches(ds, 8)
    for state in ({}, {"epoch": 0, "done": 3}, None):
        with pytest.raises(ValueError, match="ShuffledBatches: state must be what state_dict returned, got"):
            rows.load_state_dict(state)


def test_another_epoch_begins_at_its_start(ds):
    rows = ShuffledBatches(ds, 8, points=POINTS)
    iterator = iter(rows)
    next(iterator)
    rows.load_state_dict(rows.state_dict())
    rows.set_epoch(1)
    check_batches(list(rows))


def test_tokens_come_with_their_rows(ds):
    for batch in ShuffledBatches(ds, 10, points=["loss"], input_ids=True, block_rows=4):
        for i, tokens in zip(batch["id"].tolist(), batch["input_ids"], strict=True):
            assert tokens.tolist() == [i, *range(i % 5), 2**31 - 1]
            assert tokens.dtype == torch.int64


def test_missing_units_are_never_filled(tmp_path):
    writer, tensors = make_writer(tmp_path), truth()
    for unit in (PLAN.unit(0), PLAN.unit(2)):
        writer.write_unit(unit, rows_of(unit, tensors), examples(unit))
    with pytest.raises(DatasetError, match="must hold all 3 units"):
        ShuffledBatches(open_dataset(tmp_path), 4)
    ds, there = open_dataset(tmp_path, partial=True), [0, 1, 2, 3, 8, 9, 10]
    rows = ShuffledBatches(ds, 2, input_ids=True)
    write_units(writer)
    batches = list(rows)
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == there
    for batch in batches:
        assert same_bits(batch["double"], tensors["double"][batch["id"]])
        assert [tokens[0].item() for tokens in batch["input_ids"]] == batch["id"].tolist()
    assert [RowDataset(ds)[k]["id"] for k in range(len(ds))] == there


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"batch_size": 4, "block_rows": 0}, "block_rows must be an int of at least 1, got 0"),
        ({"batch_size": 4, "mixed_blocks": True}, "mixed_blocks must be an int of at least 1, got True"),
        ({"batch_size": 4, "rank": 1}, "rank must be given with world_size, got rank 1 and world_size None"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank must be in 0..1, got 2"),
    ],
)
def test_bad_arguments(ds, arguments, message):
    with pytest.raises(ValueError, match=f"ShuffledBatches: {message}"):
        ShuffledBatches(ds, **arguments)


def test_points_that_have_no_place_in_a_batch(tmp_path, ds):
    named = make_dataset(tmp_path, columns={"id": COLUMNS["loss"], "input_ids": COLUMNS["loss"]})
    with pytest.raises(ValueError, match="RowDataset: points must not include the name of another entry, got 'id'"):
        RowDataset(named)
    assert len(RowDataset(named, "input_ids")) == 11
    with pytest.raises(ValueError, match="got 'input_ids'"):
        ShuffledBatches(named, 4, points=["input_ids"], input_ids=True)
    with pytest.raises(KeyError, match="point must be one of"):
        ShuffledBatches(ds, 4, points="nope")


def test_an_error_of_the_background_comes_out(tmp_path):
    ds = make_dataset(tmp_path)
    rows = ShuffledBatches(ds, 2, block_rows=2, mixed_blocks=1, shuffle=False)
    (tmp_path / "data" / "u000002.safetensors").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"u000002.safetensors must have \d+ bytes, got 1"):
        list(rows)


@pytest.mark.parametrize("seed", [2**70, 2**63, -(2**63) - 1])
def test_a_seed_that_would_give_the_order_of_another_is_refused(ds, seed):
    text = re.escape(f"ShuffledBatches: seed must be in -2**63..2**63-1, got {seed}. Give one of 64 bits.")
    with pytest.raises(ValueError, match=text):
        ShuffledBatches(ds, 2, seed=seed)
    with pytest.raises(TypeError, match=r"^ShuffledBatches: seed must be an int, got 0\.5\. Give a whole number\.$"):
        ShuffledBatches(ds, 2, seed=0.5)
    orders = [[i for b in ShuffledBatches(ds, 2, seed=s) for i in b["id"].tolist()] for s in (-(2**63), 2**63 - 1, 0)]
    assert len(set(map(tuple, orders))) == 3
