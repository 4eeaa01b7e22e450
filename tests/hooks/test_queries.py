"""Dot products of weight gradients with queries: against the gradient of each example alone, in float64."""

import re

import pytest
import torch
from torch import nn
from weighted_models import LAYERS, B, D, P, assert_near, captured, made, projected, score, truths

import tlfast
from tlfast import Projection, Spec
from tlfast.backends.queries import Queries


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def scores_of(full, queries):
    """<G, Q> in float64: [B, Q]."""
    return full.flatten(1) @ queries.double().flatten(1).T


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_against_each_example_alone(kind, n, backend):
    """With a single query, which is multiplied first, and with several, for which G is made; in a projection, too."""
    model, x = made(kind)
    wanted, small = truths(kind, True), Projection(4)
    whole = {name: drawn(n, *full.shape[1:]) for name, full in wanted.items()}
    pairs = {
        name: (drawn(n, full.shape[1], 2), drawn(n, 2, full.shape[2]))
        for name, full in wanted.items()
        if full.dim() > 2
    }
    few = {name: drawn(n, *(4,) * (full.dim() - 1)) for name, full in wanted.items()}
    specs = [
        Spec(list(whole), of="weight", bias=True, queries=whole),
        Spec(list(pairs), of="weight", bias=True, queries=pairs, name="pairs"),
        Spec(list(few), of="weight", bias=True, project=small, queries=few, name="few"),
    ]
    cap = captured(model, specs, lambda: score(model(x)).backward(), backend)
    for name, full in wanted.items():
        assert_near(cap[f"{name}:weight:scores"], scores_of(full, whole[name]), 1024)
        assert_near(cap[f"{name}:few"], scores_of(projected(name, full, small), few[name]), 1024)
    for name, (left, right) in pairs.items():
        assert_near(cap[f"{name}:pairs"], scores_of(wanted[name], left @ right), 1024)


def test_scores_of_tokens_add_up_to_those_of_examples(backend):
    model, x = made("tokens")
    names = ["0", "1", "3", "4", "8"]
    truth = truths("tokens", True)
    whole = {name: drawn(3, *truth[name].shape[1:]) for name in names}
    pairs = {name: (drawn(2, truth[name].shape[1], 2), drawn(2, 2, truth[name].shape[2])) for name in ("0", "1")}
    few = {name: drawn(2, *(4,) * (truth[name].dim() - 1)) for name in names}
    given = {"queries": (names, whole, {}), "pairs": (["0", "1"], pairs, {}), "few": (names, few, {"project": 4})}
    specs = [
        Spec(points, of="weight", per=per, bias=True, queries=queries, name=f"{word}:{per}", **more)
        for word, (points, queries, more) in given.items()
        for per in ("example", "token")
    ]
    specs += [
        Spec(names, "norm", of="weight", per="token", bias=True),
        Spec(["1"], of="weight", per="token", bias=True),
    ]
    mask = torch.arange(P) < torch.tensor([6, 3, 4, 1])[:, None]
    with tlfast.capture(model, specs, rows=B, backend=backend) as cap, cap.batch(mask=mask, grad_scale=0.5):
        (0.5 * score(model(x))).backward()
    example, _ = cap.where("1:queries:token")
    for word, (points, _, _) in given.items():
        for name in points:
            whole_rows = cap[f"{name}:{word}:example"]
            added = torch.zeros_like(whole_rows).index_add(0, example, cap[f"{name}:{word}:token"])
            assert_near(added, whole_rows.double(), 256)
    left, right = cap["1:weight"].split([10, D + 1], 1)
    assert_near(cap["1:weight:norm"], left.double().norm(dim=1) * right.double().norm(dim=1), 64)
    assert all(cap[f"{name}:weight:norm"].shape == (len(example),) for name in names)


def test_a_query_is_dotted_with_the_gradient_and_not_with_sums_of_its_factors(backend):
    """Of two tokens (g, a) the sums of g and of a, multiplied, are another matrix: 24.5 in place of 2.2."""
    layer, x = nn.Linear(2, 2, bias=False), torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    grad = torch.tensor([[[2.0, 1.0], [-1.0, 4.0]]])
    query = torch.tensor([[[1.5, 0.5], [0.4, 2.0]]])
    exact = torch.einsum("bto,oi,bti->b", grad, query[0], x)
    apart = torch.einsum("bo,oi,bi->b", grad.sum(1), query[0], x.sum(1))
    assert torch.allclose(torch.cat([exact, apart]), torch.tensor([2.2, 24.5]))
    for queries in (query, query.expand(3, 2, 2), (query, torch.eye(2)[None]), (torch.eye(2)[None], query)):
        cap = captured(layer, Spec("", of="weight", queries=queries), lambda: layer(x).backward(grad), backend, rows=1)
        assert torch.allclose(cap[":weight:scores"], exact.expand(1, cap[":weight:scores"].shape[1]))


def test_scores_of_examples_with_each_other_are_symmetric(backend):
    """Whether the queries are whole gradients or the factors of their tokens."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(B, P, D)

    def run():
        return score(model(x)).backward()

    kept = [Spec("0", of="weight", bias=True), Spec("0", of="weight", bias=True, per="token", name="tokens")]
    cap = captured(model, kept, run, backend)
    factors = cap["0:tokens"].view(B, P, -1)
    pair = factors[..., :5].transpose(1, 2), factors[..., 5:]
    specs = [Spec("0", of="weight", bias=True, queries=q, name=n) for q, n in ((cap["0:weight"], "w"), (pair, "p"))]
    found = captured(model, specs, run, backend)
    for name in ("0:w", "0:p"):
        assert_near(found[name], scores_of(cap["0:weight"].double(), cap["0:weight"]), 256)
        assert_near(found[name].T, found[name].double(), 256)


def test_the_form_with_the_fewest_multiplications_is_taken():
    def wants(n_positions, *given):
        return Queries(given, lambda matrix, _: matrix).want_gradients(n_positions)

    assert not wants(64, torch.ones(1, 768, 768))  # T O I, with and without G
    assert wants(64, torch.ones(8, 768, 768))
    assert not wants(1, torch.ones(8, 768, 768))
    assert not wants(64, torch.ones(8, 768, 4), torch.ones(8, 4, 768))  # 4 * 8 * 2 < 768 / 2
    assert wants(64, torch.ones(8, 8, 16), torch.ones(8, 16, 8))


def test_a_large_gradient_is_made_in_parts(backend):
    torch.manual_seed(2)
    layer, x, grad = nn.Linear(2100, 130), torch.randn(8, 3, 2100), torch.randn(8, 3, 130)
    query = drawn(2, 130, 2101)
    spec = Spec("", of="weight", bias=True, queries=query)
    cap = captured(layer, spec, lambda: layer(x).backward(grad), backend, rows=8)
    full = grad.double().mT @ torch.cat([x, torch.ones(8, 3, 1)], -1).double()
    assert_near(cap[":weight:scores"], scores_of(full, query), 1024)


def test_heads_calls_and_low_precision(backend):
    torch.manual_seed(6)
    model, x = nn.Sequential(nn.Linear(D, 6)), torch.randn(B, P, D)
    query, twice = drawn(2, 3, 2, D), nn.Linear(D, D)
    specs = [Spec("0", of="weight", heads=(3, 2)), Spec("0", of="weight", heads=(3, 2), queries=query)]
    cap = captured(model, specs, lambda: score(model(x)).backward(), backend)
    assert_near(cap["0:weight:scores"], scores_of(cap["0:weight"].double(), query), 256)

    again = Spec("", of="weight", queries=drawn(2, D, D))
    specs = [Spec("", of="weight"), again]
    cap = captured(twice, specs, lambda: score(twice(twice(x).tanh())).backward(), backend, calls="sum")
    assert_near(cap[":weight:scores"], scores_of(cap[":weight"].double(), again.queries), 256)

    half = model.to(torch.bfloat16)
    specs = [Spec("0", of="weight"), Spec("0", of="weight", queries=drawn(2, 6, D).double())]
    cap = captured(half, specs, lambda: score(half(x.bfloat16())).backward(), backend)
    assert cap["0:weight:scores"].dtype == torch.float32
    assert_near(cap["0:weight:scores"], scores_of(cap["0:weight"].double(), specs[1].queries.float()), 256)


def test_autocast_changes_no_dtype(backend):
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)), torch.randn(B, P, D)
    specs = [Spec("2", of="weight"), Spec("2", of="weight", queries=drawn(2, 3, D))]

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            score(model(x).float()).backward()

    cap = captured(model, specs, run, backend)
    assert_near(cap["2:weight:scores"], scores_of(cap["2:weight"].double(), specs[1].queries), 256)


def at(queries, points="0", **settings):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    return lambda: tlfast.capture(model, Spec(points, of="weight", queries=queries, **settings), rows=1)


ONE = torch.ones(1, 2, 3)
REFUSED = {
    "capture at 0: queries must have the shape [Q, 2, 3], got [1, 3, 2]. A query has the shape": at(ONE.mT),
    "capture at 0: queries must have the shape [Q, 2, 4], got [1, 2, 3].": at(ONE, bias=True),
    "capture at 0: queries must have the shape [Q, 2, 3], got [0, 2, 3].": at(ONE[:0]),
    "capture at 0: queries must have the shape [Q, 5, 5], got [1, 2, 3].": at(ONE, project=5),
    "capture at 2: queries must be whole where a row has the shape [2], got a pair": at((ONE, ONE), "2"),
    "capture at 0: queries must be factors [Q, 2, r] and [Q, r, 3], got [1, 2, 3] and [1, 2, 3].": at((ONE, ONE)),
    "capture at 0: queries must be factors of one dtype, on one device": at((ONE, torch.ones(1, 3, 3).double())),
    "capture at 0: queries must be finite, got NaN or infinity.": at(ONE * torch.nan),
    "capture: queries must be a mapping from points to tensors where there are several points, got one for 3.": at(
        ONE, "*"
    ),
    "capture: queries must have an entry for each point, and for these alone, got none for '1'.": at(
        {"0": ONE}, ["0", "1"]
    ),
    "capture: queries must have an entry for each point, and for these alone, got one for '1'.": at(
        {"0": ONE, "1": ONE}
    ),
    'Spec: queries must be left out unless of="weight", reduce="none", got some with': at(ONE, reduce="norm"),
    "Spec: queries must be tensors of floats, or pairs of them, got torch.int64.": at(ONE.long()),
    "Spec: queries must be tensors of floats, or pairs of them, got tuple.": at((ONE,)),
    "Spec: queries must have the names of points, got [].": at({}),
    'calls must be "raise" or "last" for norms of weight gradients, and for their factors, got \'sum\'.': lambda: (
        tlfast.capture(nn.Linear(2, 2), Spec("", of="weight", per="token"), rows=1, calls="sum")
    ),
}


@pytest.mark.parametrize("text, make", REFUSED.items())
def test_refusals(make, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        make()
