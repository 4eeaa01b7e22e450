"""A FAISS index of several columns answers as a scoring does."""

import doctest
import sys

import pytest
import torch
from dataset_cases import make_dataset, make_writer, truth, write_units

import tlfast
from tlfast.attribution import faiss_index, query_vectors
from tlfast.dataset import Column, Plan, open_dataset
from tlfast.dataset.read import converting

COLUMNS = {"a": (torch.bfloat16, (6,)), "b": (torch.float32, (2, 3)), "c": (torch.float32, (2,))}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A dataset, and one of queries."""
    folder, plan = tmp_path_factory.mktemp("faiss"), Plan(5, 5)
    ds = make_dataset(folder / "d", columns=COLUMNS, plan=Plan(60, 25))
    write_units(make_writer(folder / "q", columns=COLUMNS, plan=plan), truth(COLUMNS, plan, seed=4))
    return ds, open_dataset(folder / "q")


@pytest.mark.peers("faiss")
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("points", [None, ["c", "a"]])
def test_an_index_answers_as_a_scoring(both, metric, points, monkeypatch):
    monkeypatch.setattr(converting, "PART_BYTES", 7 * 56)
    ds, queries = both
    index = faiss_index(ds, points, metric=metric)
    scores, rows = index.search(query_vectors(ds, queries, points, metric=metric), 4)
    right = tlfast.score(ds, queries, metric, points=points, k=4)
    assert rows.tolist() == right.indices.tolist()
    assert torch.allclose(torch.from_numpy(scores), right.scores, rtol=0, atol=2e-5)


@pytest.mark.peers("faiss")
def test_the_example_runs():
    found = doctest.testmod(sys.modules[faiss_index.__module__])
    assert (found.failed, found.attempted > 5) == (0, True)


def test_what_an_index_can_not_be_made_of(both, monkeypatch, tmp_path):
    ds, queries = both
    columns = {"h": (torch.float32, (2,)), "h:act": Column(torch.float32, (2,), of="act")}
    acts = make_dataset(tmp_path / "acts", columns=columns, plan=Plan(4, 4))
    with pytest.raises(ValueError, match="faiss_index: points must be named where columns are of several kinds, got"):
        faiss_index(acts)
    with pytest.raises(ValueError, match="faiss_index: points must match a module, got 'nope'"):
        faiss_index(ds, "nope")
    with pytest.raises(
        ValueError, match=r"query_vectors: points must be of the queries too, got 'b'. Name points that both"
    ):
        query_vectors(ds, queries.with_fields("a", "c"))
    with pytest.raises(
        ValueError, match=r"to_faiss: point must name one at least, got none. Leave it out where there is"
    ):
        ds.to_faiss(point=[])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ImportError, match=r"to_faiss: faiss must be installed, got .* Run: pip install 'tlfast\[faiss\]'"
    ):
        faiss_index(ds)
