"""Datasets as map-style torch datasets: one row, many rows, and what a DataLoader makes of them."""

import pytest
from dataset_cases import COLUMNS, make_dataset, same_bits, truth
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tlfast.dataset import Plan, RowDataset

N = 103
POINTS = ["blocks.0.hook_resid_post", "loss"]
IDS_OF_5 = [5, 2**31 - 1]

# Another test may have imported lance, whose warning at any fork is about its own use in the child.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    """103 rows in units of 10."""
    return make_dataset(tmp_path_factory.mktemp("rows") / "d", plan=Plan(N, 10))


def check_batches(batches):
    """Fail unless the batches hold each row once, each with its own values."""
    tensors = truth(plan=Plan(N, 10))
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(N))
    assert all(same_bits(batch[point], tensors[point][batch["id"]]) for batch in batches for point in POINTS)


def test_rows_by_number(ds):
    rows, tensors = RowDataset(ds, POINTS, input_ids=True), truth(plan=Plan(N, 10))
    assert len(rows) == N
    assert rows[5]["id"] == 5
    assert rows[-98]["input_ids"].tolist() == IDS_OF_5
    assert same_bits(rows[5]["loss"], tensors["loss"][5])
    assert same_bits(rows[2:9]["loss"], tensors["loss"][2:9])
    many = RowDataset(ds, POINTS).__getitems__([7, 0, 7])
    assert [item["id"] for item in many] == [7, 0, 7]
    assert all(same_bits(item[p], tensors[p][item["id"]]) for item in many for p in POINTS)
    with pytest.raises(IndexError, match=r"row must be in -103\.\.102, got 103"):
        rows[103]
    assert set(RowDataset(ds)[0]) == {"id", *COLUMNS}


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_in_a_loader(ds, workers):
    rows = RowDataset(ds, POINTS)
    check_batches(list(DataLoader(rows, batch_size=16, shuffle=True, num_workers=workers)))
    sampler = BatchSampler(RandomSampler(rows), 16, drop_last=False)
    check_batches(list(DataLoader(rows, sampler=sampler, batch_size=None, num_workers=workers)))
