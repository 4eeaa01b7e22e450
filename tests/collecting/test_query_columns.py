"""Scores as the columns of a dataset: queries belong to its identity, and bad ones fail before an example is read."""

import pytest
import torch
from torch import nn

import tlfast
from tlfast import Spec

TEXTS = [[1, 2, 3], [4, 5], [7, 8, 6, 2]]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 9))


def spec(queries):
    return Spec("1", of="weight", bias=True, queries=queries)


def collected(out, queries, **settings):
    return tlfast.collect(model(), TEXTS, out, points=queries, progress=False, **settings)


def test_a_dataset_of_scores_is_resumed_with_the_same_queries_alone(tmp_path):
    query = torch.randn(2, 5, 5)
    settings = {"rows_per_unit": 1}
    collected(tmp_path / "rows", Spec("1", of="weight", bias=True))
    collected(tmp_path / "scores", spec({"1": query}), units="0:1", **settings)
    assert collected(tmp_path / "scores", spec({"1": query.clone()}), **settings).n_rows == 2
    rows = tlfast.open_dataset(tmp_path / "rows")["1:weight"][:]
    found = tlfast.open_dataset(tmp_path / "scores")["1:weight:scores"][:]
    assert torch.allclose(found, rows.flatten(1) @ query.flatten(1).T, atol=1e-5)
    with pytest.raises(ValueError, match="queries"):
        collected(tmp_path / "scores", spec({"1": query + 1}), **settings)


def test_tokens_have_scores_of_their_own(tmp_path):
    query = torch.randn(2, 5, 5)
    collected(
        tmp_path / "scores", [spec(query), Spec("1", of="weight", bias=True, queries=query, per="token", name="t")]
    )
    ds = tlfast.open_dataset(tmp_path / "scores")
    assert [list(ds["1:t"][k].shape) for k in range(3)] == [[3, 2], [2, 2], [4, 2]]
    for k in range(3):
        assert torch.allclose(ds["1:t"][k].sum(0), ds["1:weight:scores"][k], atol=1e-5)


def test_bad_queries_fail_before_an_example_is_read(tmp_path):
    def texts():
        raise AssertionError
        yield

    refused = [
        (torch.ones(2, 5, 4), r"collect at 1: queries must have the shape \[Q, 5, 5\]"),
        ({"2": torch.ones(1, 5, 5)}, "collect: queries must have an entry for each point"),
    ]
    for queries, text in refused:
        with pytest.raises(ValueError, match=text):
            tlfast.collect(model(), texts(), tmp_path / "none", points=spec(queries), progress=False)
    assert not (tmp_path / "none").exists()
