"""Influence: scores by "ekfac", of stored rows and of examples that go through a model, against the inverse itself."""

import functools
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import tlfast
from tlfast.hooks.factors import Factors

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


def test_columns_by_a_name_of_ones_own_are_those_of_their_modules(tmp_path):
    """Whatever a spec calls them; several of one module, too, and a view of a merged dataset."""
    model, factors = fitted()
    specs = [tlfast.Spec("1", of="weight", name="mine"), tlfast.Spec(["1", "3"], of="weight", name="again")]
    for part in ("a", "b"):
        tlfast.collect(model, TEXTS, tmp_path / part, points=specs, progress=False)
    ds = tlfast.open_dataset(tmp_path / "a")
    assert ds.points == ["1:mine", "1:again", "3:again"]
    modules = {point: point[0] for point in ds.points}
    assert {point: ds.module_of(point) for point in ds.points} == modules
    rows = {point: ds[point][:] for point in ds.points}
    wanted = sum(
        truth({modules[point]: rows[point]}, {modules[point]: rows[point][1:3]}, 0.1) for point in rows
    )  # fmt: skip
    asked = {point: values[1:3] for point, values in rows.items()}
    found = tlfast.score(ds, asked, "ekfac", moments=factors, k=None)
    torch.testing.assert_close(found.scores, wanted, rtol=1e-8, atol=1e-10)
    both = tlfast.dataset.concat_datasets([ds, tlfast.open_dataset(tmp_path / "b")])
    found = tlfast.score(both.filter("length > 1"), asked, "ekfac", moments=factors, k=None)
    torch.testing.assert_close(found.scores, wanted.repeat(1, 2), rtol=1e-8, atol=1e-10)


def test_modules_whose_names_have_colons(tmp_path):
    """A name that is a module's is that module, whatever it ends in; one that is another's column too is nobody's."""
    torch.manual_seed(0)
    names = {"emb": nn.Embedding(9, 4), "a:b": nn.Linear(4, 4), "b:weight": nn.Linear(4, 9)}
    model = nn.Sequential(OrderedDict(names)).double()
    scored = ["a:b", "b:weight"]
    factors = tlfast.factors(model, TEXTS, scored, kinds=("kfac", "ekfac"))
    specs = [tlfast.Spec(scored, of="weight"), tlfast.Spec("b:weight", of="weight", name="c:d")]
    tlfast.collect(model, TEXTS, tmp_path / "rows", points=specs, progress=False)
    ds = tlfast.open_dataset(tmp_path / "rows")
    modules = {"a:b:weight": "a:b", "b:weight:weight": "b:weight", "b:weight:c:d": "b:weight"}
    assert {point: ds.module_of(point) for point in ds.points} == modules
    queries, wanted = {point: ds[point][:2] for point in ds.points}, 0
    for point, module in modules.items():
        of = factors[module]
        rotated = of.output_basis.T @ queries[point] @ of.input_basis
        damped = of.eigenvalues + 0.1 * of.eigenvalues.mean()
        ready = of.output_basis @ (rotated / damped) @ of.input_basis.T
        wanted = wanted + ready.flatten(1) @ ds[point][:].flatten(1).T
        torch.testing.assert_close(factors.precondition({module: queries[point]})[module], ready)
    found = tlfast.score(ds, queries, "ekfac", moments=factors, k=None)
    torch.testing.assert_close(found.scores, wanted, rtol=1e-8, atol=1e-10)
    tlfast.score(model, TEXTS[:1], "ekfac", examples=TEXTS, points=scored, moments=factors)
    both = Factors(factors.kinds, {"b": factors["a:b"], "b:weight": factors["b:weight"]})
    with pytest.raises(ValueError, match=r"must name one module, got 'b:weight', .* Say 'b', or 'b:weight:weight'"):
        both.precondition({"b:weight": queries["b:weight:weight"]})
    ready = both.precondition({"b:weight:weight": queries["b:weight:weight"], "b": queries["a:b:weight"]})
    assert list(ready) == ["b:weight:weight", "b"]


def test_a_module_that_no_gradient_has_reached_is_told():
    """As an expert that gets no token: no part of its mean eigenvalue is more than zero."""
    of = fitted()[1]["1"]
    none = replace(of, n_tokens=0, sums={name: 0 * total for name, total in of.sums.items()})
    factors, ones = Factors(["kfac", "ekfac"], {"1": none}), torch.ones(5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"at 1: damping must .*, got a zero\. No gradient has reached it"):
        factors.precondition({"1": ones}, damping_factor=9.0)
    torch.testing.assert_close(factors.precondition({"1": ones}, damping=0.5)["1"], 2 * ones)


def test_factors_of_other_modules_are_refused_before_anything_runs(tmp_path):
    model, _ = fitted()
    some = tlfast.factors(model, TEXTS, "1", kinds=("kfac", "ekfac"))
    with_bias = tlfast.factors(model, TEXTS, "1", kinds="kfac", bias=True).eigen()
    tlfast.collect(model, TEXTS, tmp_path / "x", points=tlfast.Spec(["1", "3"], of="weight", name="w"), progress=False)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for given, text in (
        (some, r"moments must have factors of each module that is scored, got none of '3'\. They have '1': name"),
        (with_bias, r"moments must be of gradients \[5, 4\] at '1', got \[5, 5\]\. Say bias= alike"),
        (tlfast.factors(model, TEXTS, ["1", "3"]), "moments must have eigenvectors, got none"),
    ):
        calls.clear()
        with pytest.raises(ValueError, match=f"^score: {text}"):
            tlfast.score(tmp_path / "x", tmp_path / "x", "ekfac", moments=given)
        with pytest.raises(ValueError, match=f"^score: {text}"):
            tlfast.score(model, TEXTS[:1], "ekfac", examples=TEXTS, points=["1", "3"], moments=given)
        assert not calls
    handle.remove()


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


def test_rows_and_factors_that_do_not_belong_together_are_refused(tmp_path):
    """Shapes alone don't tell: a projected row may be as large as a gradient, and a later checkpoint as the first."""
    torch.manual_seed(1)
    other = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    others = tlfast.factors(other, TEXTS, ["1"], kinds=("kfac", "ekfac", "adam"))
    odd = {
        "project": {"project": 4},
        "normalizer": {"normalizer": others.normalizers()},
        "heads": {"heads": (1, 4)},
        "rows of grad": {"of": "grad", "reduce": "sum"},
    }
    for number, (got, settings) in enumerate(odd.items()):
        out = tmp_path / str(number)
        tlfast.collect(other, TEXTS, out, points=["1"], progress=False, **({"of": "weight"} | settings))
        with pytest.raises(
            ValueError, match=rf"^score: points must be whole weight gradients with ekfac, got {got} at"
        ):
            tlfast.score(out, out, "ekfac", moments=others)
    rows = tmp_path / "rows"
    tlfast.collect(other, TEXTS, rows, points=["1"], of="weight", progress=False)
    assert tlfast.score(rows, rows, "ekfac", moments=others, k=1).scores.shape == (5, 1)
    others.save(tmp_path / "f.npz")
    with torch.no_grad():
        other[1].weight += 0.5  # the next checkpoint of a training run
    later = tlfast.factors(other, TEXTS, ["1"], kinds=("kfac", "ekfac"))
    text = r"^score: moments must be of the model of the rows, got another\. Make them"
    with pytest.raises(ValueError, match=text):
        tlfast.score(rows, rows, "ekfac", moments=later)
    with pytest.raises(ValueError, match=text):
        tlfast.score(other, TEXTS[:1], "ekfac", examples=TEXTS, points=["1"], moments=tmp_path / "f.npz")
    with pytest.raises(ValueError, match=r"^factors: basis must be of this model, got one of another\. Its eigenvect"):
        tlfast.factors(other, TEXTS, ["1"], kinds="ekfac", basis=others)
    later.about.clear()
    assert tlfast.score(rows, rows, "ekfac", moments=later, k=1).scores.shape == (5, 1)


def test_second_moments_of_other_rows_are_refused(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    spec, rows = tlfast.Spec("1", of="weight", project=2), tmp_path / "rows"
    tlfast.collect(model, TEXTS, rows, points=spec, progress=False)
    sums = tlfast.running(model, TEXTS, spec, stats="moment2_full")
    halves = [tlfast.running(model, half, spec, stats="moment2_full") for half in (TEXTS[:2], TEXTS[2:])]
    halves[0].merge(halves[1]).save(tmp_path / "sums.npz")
    of_model = {"examples": TEXTS, "points": ["1"], "project": 2}
    for given in (sums, tmp_path / "sums.npz"):
        assert tlfast.score(rows, rows, "trackstar", moments=given, k=1).scores.shape == (5, 1)
        assert tlfast.score(model, TEXTS, "trackstar", moments=given, k=1, **of_model).scores.shape == (5, 1)
    seeded = tlfast.Spec("1", of="weight", project=tlfast.Projection(2, seed=1))
    sums = tlfast.running(model, TEXTS, seeded, stats="moment2_full")
    text = r"^score: moments must be made as the rows at '1:weight', got another project\. Make them of the same"
    with pytest.raises(ValueError, match=text):
        tlfast.score(rows, rows, "trackstar", moments=sums)
    with pytest.raises(ValueError, match=text):
        tlfast.score(model, TEXTS, "trackstar", moments=sums, **of_model)
    coded = tmp_path / "coded"  # sums know nothing of the encoding of rows
    encoded = tlfast.Spec("1", of="weight", project=2, encoding="int8")
    tlfast.collect(model, TEXTS, coded, points=encoded, progress=False)
    assert tlfast.score(coded, coded, "trackstar", moments=tmp_path / "sums.npz", k=1).scores.shape == (5, 1)
    with pytest.raises(ValueError, match=text):
        tlfast.score(coded, coded, "trackstar", moments=sums)
    tlfast.collect(model, TEXTS, tmp_path / "sums", points="0", reduce="sum", encoding="int8", progress=False)
    tokens = tlfast.running(model, TEXTS, "0", per="token", stats="moment2_full")
    with pytest.raises(ValueError, match=r"^score: moments must be made as the rows at '0', got another per\. Make"):
        tlfast.score(tmp_path / "sums", tmp_path / "sums", "trackstar", moments=tokens)
