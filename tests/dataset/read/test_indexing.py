"""Indexing a column is indexing the tensor of its rows."""

import pickle

import numpy as np
import pytest
import torch
from dataset_cases import COLUMNS, check_rows, make_dataset, same_bits, truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INDICES = [
    0, -1, 10, np.int64(3), torch.tensor(4),
    slice(None), slice(2, 9), slice(3, 4), slice(5, 5), slice(9, 2), slice(-3, None), slice(None, None, 3),
    slice(1, None, 4), slice(3, 99, 5), slice(0, 11, 100),
    [], [0], [10, 0, -1, 5, 5], range(3, 8), np.array([1, 9]), torch.tensor([7, 3]), torch.tensor([[0, 4], [10, 8]]),
    torch.arange(11) % 3 == 0, torch.zeros(11, dtype=torch.bool), [True] * 11, np.arange(11) > 8,
    torch.zeros(0, dtype=torch.int64), torch.tensor([2], dtype=torch.int32),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_indexing_is_that_of_torch(tmp_path_factory, index, shared_dataset):
    for name, tensor in truth().items():
        like = index if not isinstance(index, (range, np.ndarray)) else torch.as_tensor(np.array(index))
        assert same_bits(shared_dataset[name][index], tensor[like])


@given(
    st.lists(st.integers(-11, 10), max_size=30),
    st.slices(11).filter(lambda s: s.step is None or s.step > 0),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_indices(shared_dataset, rows, part):
    for name, tensor in truth().items():
        assert same_bits(shared_dataset[name][rows], tensor[torch.tensor(rows, dtype=torch.int64)])
        assert same_bits(shared_dataset[name][part], tensor[part])


@pytest.fixture(scope="module")
def shared_dataset(tmp_path_factory):
    """One dataset for all indices."""
    return make_dataset(tmp_path_factory.mktemp("shared") / "d")


@pytest.mark.parametrize(
    "index, error",
    [
        (11, IndexError), (-12, IndexError), ([0, 11], IndexError), ([True] * 10, IndexError),
        (torch.ones(11, 1, dtype=torch.bool), IndexError), (1.0, TypeError), ([0.5], TypeError), (True, TypeError),
        (None, TypeError), ((0, 1), TypeError), ("a", TypeError), (torch.zeros(2, dtype=torch.uint8), TypeError),
        (slice(None, None, -1), ValueError),
    ],
)  # fmt: skip
def test_bad_indices(shared_dataset, index, error):
    with pytest.raises(error, match="GradientColumn: "):
        shared_dataset["loss"][index]


def test_rows_are_copies(shared_dataset):
    name = next(iter(COLUMNS))
    for index in (0, slice(0, 2), [0, 1]):
        shared_dataset[name][index].fill_(7)
    assert same_bits(shared_dataset[name][:], truth()[name])


def test_iteration_shape_and_repr(shared_dataset):
    column = shared_dataset["blocks.1.attn"]
    assert column.shape == (11, 2, 3)
    assert len(list(column)) == 11
    assert "11 rows, 3 of 3 units" in repr(shared_dataset)
    assert "blocks.1.attn" in repr(shared_dataset)
    with pytest.raises(KeyError, match=r"must be one of blocks.0.hook_resid_post, .* got 'nope'"):
        shared_dataset["nope"]
    with pytest.raises(IndexError, match=r"must be in 0\.\.10, got 11"):
        shared_dataset.examples[11]
    assert shared_dataset.examples[-1]["id"] == 10
    assert [e["id"] for e in shared_dataset.examples[3:9:2]] == [3, 5, 7]


def test_a_pickled_dataset_reads_the_same(shared_dataset):
    check_rows(pickle.loads(pickle.dumps(shared_dataset)), truth())
