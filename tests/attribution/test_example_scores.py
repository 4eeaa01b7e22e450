"""Scores of examples that go through a model: against the gradient of each example alone, in float64."""

import functools
import re

import numpy as np
import pytest
import torch
from torch import nn

import tlfast
from tlfast.attribution import score_examples

POINTS = ["1", "3"]
TEXTS = [[1, 2, 3], [4, 5], [7, 8, 6, 2, 1], [2, 2, 9, 1], [3, 1]]
ASKED = [[4, 5], [9, 8, 7]]


class Narrow(nn.Sequential):
    """Linear layers between embeddings and logits, wide enough that a token's factors are smaller than a gradient."""

    def __init__(self):
        super().__init__(nn.Embedding(10, 12), nn.Linear(12, 14), nn.LayerNorm(14), nn.Linear(14, 10))


@functools.cache
def model():
    torch.manual_seed(0)
    return Narrow().eval()


@functools.cache
def truth(points, texts, bias=False):
    """The gradients of each example alone, by point: float64 [N, O, I] or [N, D]."""
    wide = Narrow().double()
    wide.load_state_dict(model().state_dict())
    found = {point: [] for point in points}
    for text in texts:
        wide.zero_grad()
        logits = wide(torch.tensor([text]))[0]
        nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="sum").backward()
        for point, rows in found.items():
            layer = wide.get_submodule(point)
            parts = [layer.weight.grad, layer.bias.grad[..., None] if layer.weight.dim() > 1 else layer.bias.grad]
            rows.append(torch.cat(parts, -1) if bias else parts[0].clone())
    return {point: torch.stack(rows) for point, rows in found.items()}


def texts_of(texts):
    return tuple(map(tuple, texts))


def exact(points, queries, bias=False, cosine=False):
    """[Q, N], of queries [Q, ...] by point."""
    full = truth(tuple(points), texts_of(TEXTS), bias)
    rows = torch.cat([full[point].flatten(1) for point in points], 1)
    asked = torch.cat([queries[point].double().flatten(1) for point in points], 1)
    if cosine:
        rows, asked = nn.functional.normalize(rows), nn.functional.normalize(asked)
    return asked @ rows.T


def near(found, wanted):
    return (found.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_query_examples_against_each_example_alone(bias, cosine):
    """The norm's queries are whole, and those of the linear layers factors, where an example has few tokens."""
    points = (*POINTS, "2")
    asked = truth(points, texts_of(ASKED), bias)
    method, settings = "cosine" if cosine else "dot", {"points": points, "bias": bias, "batch_tokens": 8}
    found = score_examples(model(), TEXTS, ASKED, method, k=None, **settings)
    wanted = exact(points, asked, bias, cosine)
    assert near(found.scores, wanted)
    best = score_examples(model(), TEXTS, ASKED, method, k=2, **settings)
    assert torch.equal(best.indices, wanted.topk(2).indices)
    assert (best.points, best.queries) == (found.points, [0, 1])
    mean = {point: rows.mean(0, keepdim=True) for point, rows in asked.items()}
    found = score_examples(model(), TEXTS, ASKED, method, k=None, mean=True, **settings)
    assert near(found.scores, exact(points, mean, bias, cosine))


def test_each_examples_own_query_finds_it_and_scores_are_symmetric():
    found = tlfast.score(model(), TEXTS, "cosine", examples=TEXTS, points=POINTS, k=1)
    assert found.indices.flatten().tolist() == list(range(len(TEXTS)))
    assert torch.allclose(found.scores, torch.ones(5, 1))
    every = tlfast.score(model(), TEXTS, examples=TEXTS, points=POINTS, k=None).scores
    assert near(every, every.T.double())


def test_tensors_by_point_whole_or_in_factors(tmp_path):
    draw = torch.Generator().manual_seed(1)
    left, right = torch.randn(3, 14, 2, generator=draw), torch.randn(3, 2, 12, generator=draw)
    whole = {"1": left @ right, "3": torch.randn(3, 10, 14, generator=draw)}
    seen = []
    found = score_examples(
        model(), TEXTS, whole | {"1": (left, right)}, k=2, out=tmp_path / "all.npy", progress=seen.append
    )
    wanted = exact(POINTS, whole)
    assert near(torch.from_numpy(np.load(tmp_path / "all.npy")), wanted)
    assert torch.equal(found.indices, wanted.topk(2).indices)
    assert (sum(seen), found.queries) == (len(TEXTS), None)


def test_a_projection_is_scored_by_projected_queries():
    projection = tlfast.Projection(4)
    kept = tlfast.running(model(), [TEXTS[0]], tlfast.Spec("1", of="weight", project=projection), stats="sum")
    found = score_examples(model(), TEXTS, [TEXTS[0]], points="1", project=projection, k=None)
    assert near(found.scores[0, 0], kept["1:weight"].sum.square().sum())


def test_what_was_found_is_read_as_of_a_dataset():
    found = score_examples(model(), [[3], *TEXTS], ASKED, points="1", k=2)  # the first has no next token
    best = int(found.indices[0, 0])
    assert found[0][0]["input_ids"].tolist() == TEXTS[best]
    assert found.to_dict(texts=True)["text"][0] == " ".join(map(str, TEXTS[best]))
    assert "dot with 1" in repr(found)
    assert int(found.ids[0, 0]) == found[0][0]["id"]


def test_examples_that_are_not_finite():
    wild = Narrow().eval()
    wild.load_state_dict(model().state_dict())
    with torch.no_grad():
        wild[0].weight[9] = torch.nan
    found = score_examples(wild, TEXTS, ASKED[:1], points="1", k=5)
    assert found.n_skipped == 1
    assert found.indices[0, -1] == -1
    assert 3 not in found.indices
    with pytest.raises(FloatingPointError, match="scores must be finite, got NaN or infinity for example 3"):
        score_examples(wild, TEXTS, ASKED[:1], points="1", non_finite="stop")


def whitened(rows, moments, damping=0.1):
    """Rows by point times the inverse root of their second moments, by way of eigenvalues; columns side by side."""
    made = []
    for point, part in rows.items():
        values, vectors = torch.linalg.eigh(moments[point])
        made.append(part @ vectors @ torch.diag((values + damping * values.mean()) ** -0.5) @ vectors.T)
    return torch.cat(made, 1)


@pytest.mark.parametrize("mix", [0.0, 0.25])
def test_trackstar_against_each_example_alone(mix, monkeypatch):
    """Of projected gradients, by the second moments of the examples themselves and by given ones."""
    projection = tlfast.Projection(3, seed=5)
    points = (*POINTS, "2")

    def rows_of(texts):
        found = {}
        for point, rows in truth(points, texts_of(texts)).items():
            right = projection.matrix(point, "right", rows.shape[-1]).double()
            left = projection.matrix(point, "left", rows.shape[1]).double() if rows.dim() > 2 else None
            found[point] = projection.scale * rows @ right.T if left is None else (left @ rows @ right.T).flatten(1) / 3
        return found

    rows, asked = rows_of(TEXTS), rows_of(ASKED)
    moments = {
        point: (1 - mix) * part.T @ part / len(part) + mix * asked[point].T @ asked[point] / len(asked[point])
        for point, part in rows.items()
    }
    both = [nn.functional.normalize(whitened(some, moments)) for some in (asked, rows)]
    settings = {"points": points, "project": projection, "k": None, "mix": mix, "batch_tokens": 8}
    found = score_examples(model(), TEXTS, ASKED, "trackstar", **settings)
    assert (found.scores.double() - both[0] @ both[1].T).abs().max() < 1e-5
    spec = tlfast.Spec(points, of="weight", project=projection)
    given = tlfast.running(model(), TEXTS, spec, stats="moment2_full")
    again = tlfast.score(model(), ASKED, "trackstar", examples=TEXTS, moments=given, **settings)
    assert torch.allclose(again.scores, found.scores, rtol=0, atol=1e-6)
    if not mix:
        doubled = tlfast.score(model(), [*ASKED, TEXTS[2]], "trackstar", examples=TEXTS, **settings | {"k": 1})
        assert (doubled.indices[2].tolist(), round(float(doubled.scores[2, 0]), 5)) == ([2], 1.0)
        monkeypatch.setattr("tlfast.attribution.moments.MOST_VALUES", 8)
        with pytest.raises(ValueError, match="points must have at most 8 values a row for their second moments, got"):
            score_examples(model(), TEXTS, ASKED, "trackstar", **settings)


def test_the_best_tokens():
    draw = torch.Generator().manual_seed(1)
    queries = {"1": torch.randn(2, 14, 12, generator=draw), "3": torch.randn(2, 10, 14, generator=draw)}
    wide, of_tokens = Narrow().double(), []
    wide.load_state_dict(model().state_dict())
    for number, text in enumerate(TEXTS):
        seen = {}
        handles = [
            wide.get_submodule(point).register_forward_hook(
                lambda m, a, out, s=seen, p=point: s.update({p: (a[0], out)})
            )
            for point in POINTS
        ]
        logits = wide(torch.tensor([text]))[0]
        for handle in handles:
            handle.remove()
        loss = nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="sum")
        grads = dict(zip(POINTS, torch.autograd.grad(loss, [seen[point][1] for point in POINTS]), strict=True))
        for token in range(len(text)):
            full = [grads[p][0, token, :, None] * seen[p][0][0, token] for p in POINTS]
            dots = [sum((g * queries[p][q]).sum() for p, g in zip(POINTS, full, strict=True)) for q in range(2)]
            norm = torch.stack([one.square().sum() for one in full]).sum().sqrt()
            of_tokens.append((number, token, torch.stack(dots).detach(), norm.detach()))
    scores = torch.stack([one[2] for one in of_tokens], 1)
    size = torch.stack([queries[p].double().flatten(1).square().sum(1) for p in POINTS]).sum(0).sqrt()
    cosines = scores / (size[:, None] * torch.stack([one[3] for one in of_tokens])).clamp_min(1e-300)
    for method, wanted in (("dot", scores), ("cosine", cosines)):
        for settings in ({}, {"padding_side": "left", "batch_tokens": 12}):
            found = score_examples(model(), TEXTS, queries, method, k=3, per="token", **settings)
            best = wanted.topk(3)
            assert near(found.scores, best.values)
            places = torch.tensor([one[:2] for one in of_tokens])[best.indices]  # [2, 3, (example, token)]
            assert torch.equal(torch.stack([found.indices, found.positions], 2), places)
    assert found.to_dict()["position"] == found.positions.flatten().tolist()
    assert found[0][0]["position"] == int(places[0, 0, 1])
    assert "token" in repr(found)
    assert torch.equal(found.best(2).positions, found.positions[:, :2])
    every = score_examples(model(), TEXTS, queries, k=100, per="token")
    assert every.indices.shape == (2, sum(map(len, TEXTS)))
    assert near(every.scores[0].nansum(), score_examples(model(), TEXTS, queries, k=None).scores[0].double().sum())


@pytest.mark.parametrize("factor", [1e-25, 1e-15, 1e25])
def test_cosines_of_tiny_and_huge_gradients_are_right_or_left_out(factor):
    def loss(model, batch):
        logits, labels = model(batch.input_ids)[:, :-1], batch.input_ids[:, 1:]
        lost = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        return factor * (lost if batch.mask is None else lost * batch.mask[:, 1:]).sum()

    settings = {"points": POINTS, "loss": loss, "k": None}
    found = score_examples(model(), TEXTS, ASKED, "cosine", **settings)
    wanted = exact(POINTS, truth(tuple(POINTS), texts_of(ASKED)), cosine=True)
    left_out = found.scores.isnan()
    assert found.n_skipped == int(left_out[0].sum()) == (5 if factor in (1e-25, 1e25) else 0)
    assert torch.allclose(found.scores[~left_out].double(), wanted[~left_out], rtol=0, atol=1e-5)
    whole = score_examples(model(), TEXTS, ASKED, "trackstar", project=3, **settings).scores
    plain = score_examples(model(), TEXTS, ASKED, "trackstar", project=3, points=POINTS, k=None).scores
    assert torch.allclose(whole, plain, rtol=0, atol=1e-5)


ONE = torch.ones(1, 14, 12)
TOKENS = {"per": "token"}
REFUSED = {
    "score: method must be one of dot, cosine, trackstar, ekfac, got 'l2'.": lambda: (TEXTS, {"1": ONE}, "l2"),
    "score: per must be one of example, token, got 'tokens'.": lambda: (TEXTS, {"1": ONE}, "dot", {"per": "tokens"}),
    'score: per must be "example" with trackstar, got \'token\'.': lambda: (TEXTS, {"1": ONE}, "trackstar", TOKENS),
    'score: k must be a number with per="token", got None.': lambda: (TEXTS, {"1": ONE}, "dot", TOKENS | {"k": None}),
    'score: out must be left out with per="token", got \'x.npy\'.': lambda: (
        TEXTS, {"1": ONE}, "dot", TOKENS | {"out": "x.npy"}
    ),
    "score: mix must be left out but with trackstar, got it with dot.": lambda: (
        TEXTS, {"1": ONE}, "dot", {"mix": 0.5}
    ),
    "score: queries must have a direction, got zeros alone in query 0. ": lambda: (TEXTS, {"1": ONE * 0}, "trackstar"),
    "score: queries must be finite, got NaN or infinity in query 0.": lambda: (
        TEXTS, {"1": ONE * torch.nan}, "cosine"
    ),
    "score: queries must have the shape [Q, 2, 2] at '1', got ['Q', 14, 12].": lambda: (
        TEXTS, {"1": ONE}, "trackstar", {"project": 2}
    ),
    "score: queries must be of the points that are scored, got none at '3'.": lambda: (
        TEXTS, {"1": ONE}, "trackstar", {"points": ["1", "3"]}
    ),
    "score: points must be given where queries are examples, got None.": lambda: (TEXTS, ASKED),
    "score: queries must be examples, or a mapping from points to tensors, got Tensor.": lambda: (TEXTS, ONE),
    "score: queries must name a point at least, got an empty dict.": lambda: (TEXTS, {}),
    "score: queries must be equally many for all points, got {'1': 1, '3': 2}.": lambda: (
        TEXTS, {"1": ONE, "3": torch.ones(2, 10, 14)}
    ),
    "queries must have the shape [Q, 14, 12], got [1, 12, 14].": lambda: (TEXTS, {"1": ONE.mT}),
    "score: queries must have a direction, got zeros alone in query 0.": lambda: (TEXTS, {"1": ONE * 0}, "cosine"),
    "example 0": lambda: (TEXTS, [[3]], "dot", {"points": "1"}),
    "score: k must be an int of at least 1, or None, got 0.": lambda: (TEXTS, {"1": ONE}, "dot", {"k": 0}),
    "score: queries must be examples for mean=True, got tensors.": lambda: (TEXTS, {"1": ONE}, "dot", {"mean": True}),
    "score: settings must be among embedding, ": lambda: (TEXTS, {"1": ONE}, "dot", {"units": "0:1"}),
}  # fmt: skip


@pytest.mark.parametrize("text, make", REFUSED.items())
def test_refusals(make, text):
    examples, queries, method, settings = (*make(), "dot", {})[:4] if len(make()) == 2 else (*make(), {})[:4]
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        score_examples(model(), examples, queries, method, **settings)


def test_layers_without_such_rows_are_refused_before_queries_are_made():
    net = torch.nn.Sequential(torch.nn.Embedding(9, 4), Turned(4, 3, 1), torch.nn.Linear(3, 9))
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    texts, more = [[1, 2], [3, 4]], {"batch_tokens": 1}
    with pytest.raises(ValueError, match=r'^score at 1.conv: per="token" must be left out at a convolution, got one\.'):
        score_examples(net, texts, texts, "dot", points=["1.conv"], per="token", **more)
    with pytest.raises(ValueError, match=r"^score at 0: the weight gradient of an embedding must be projected, got"):
        score_examples(net, texts, texts, "dot", points=["0"], **more)
    assert not calls


class Turned(torch.nn.Module):
    """A convolution over positions."""

    def __init__(self, *sizes):
        super().__init__()
        self.conv = torch.nn.Conv1d(*sizes)

    def forward(self, x):
        return self.conv(x.mT).mT


def test_refusals_of_score():
    with pytest.raises(TypeError, match="examples must be given where a model is scored"):
        tlfast.score(model(), ASKED)
    with pytest.raises(ValueError, match="where must be left out where a model is scored"):
        tlfast.score(model(), ASKED, examples=TEXTS, where="length > 2")
    with pytest.raises(TypeError, match="settings of a model must be left out where a dataset is scored, got bias"):
        tlfast.score("there", "none", bias=True)
