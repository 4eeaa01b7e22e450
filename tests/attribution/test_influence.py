"""Influence: scores by "ekfac", of stored rows and of examples that go through a model, against the inverse itself."""

import functools

import pytest
import torch
from torch import nn

import tlfast

TEXTS = [[1, 2, 3], [4, 5], [6, 7, 8, 2], [3, 3], [5, 1, 7]]


@functools.cache
def fitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 9)).double()
    return model, tlfast.factors(model, TEXTS, ["1", "3"], kinds=("kfac", "ekfac"))


def truth(rows, queries, damping):
    """By the matrix Q Lam Q^T of each layer as a whole."""
    _, factors = fitted()
    total = 0
    for name in rows:
        of = factors[name.removesuffix(":weight")]
        basis = torch.kron(of.output_basis, of.input_basis)
        values = of.eigenvalues.flatten() + damping * of.eigenvalues.mean()
        curvature = basis @ torch.diag(values) @ basis.T
        total = total + queries[name].flatten(1) @ torch.linalg.solve(curvature, rows[name].flatten(1).T)
    return total


@pytest.mark.parametrize("damping", [0.1, 0.01])
def test_influence_is_through_the_inverse_of_the_curvature(tmp_path, damping):
    model, factors = fitted()
    spec = tlfast.Spec(["1", "3"], of="weight")
    tlfast.collect(model, TEXTS, tmp_path / "rows", points=spec, progress=False)
    ds = tlfast.open_dataset(tmp_path / "rows")
    rows = {name: ds[name][:] for name in ds.points}
    wanted = truth(rows, {name: values[1:3] for name, values in rows.items()}, damping)
    factors.save(tmp_path / "f.npz")
    asked = {name: values[1:3] for name, values in rows.items()}
    for given in (factors, tmp_path / "f.npz"):
        found = tlfast.score(ds, asked, "ekfac", moments=given, damping=damping, k=None)
        torch.testing.assert_close(found.scores, wanted, rtol=1e-8, atol=1e-10)
    more = {"points": ["1", "3"], "moments": factors, "damping": damping, "k": None}
    on_the_fly = tlfast.score(model, TEXTS[1:3], "ekfac", examples=TEXTS, **more)
    torch.testing.assert_close(on_the_fly.scores, wanted, rtol=1e-8, atol=1e-10)


def test_factors_that_are_none_are_refused():
    model, factors = fitted()
    of_model = {"examples": TEXTS, "points": ["1"]}
    with pytest.raises(TypeError, match=r'^score: moments must be Factors with method="ekfac", got none\. Give mome'):
        tlfast.score(model, TEXTS[:1], "ekfac", **of_model)
    with pytest.raises(
        ValueError, match=r"^score: moments must be left out but with trackstar, ekfac, got it with dot\."
    ):
        tlfast.score(model, TEXTS[:1], "dot", moments=factors, **of_model)
    with pytest.raises(ValueError, match=r"^score: project must be left out with ekfac, got 4\."):
        tlfast.score(model, TEXTS[:1], "ekfac", moments=factors, project=4, **of_model)
