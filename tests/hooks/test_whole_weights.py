"""Rows that need whole weight gradients: one-sided projections, sums over modules, normalizers."""

import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from weighted_models import LAYERS, B, D, P, assert_near, captured, made, projected, score, truths

import tlfast
from tlfast import Projection, Spec
from tlfast.hooks.normalizers import AdafactorNormalizer, AdamNormalizer

ONE_SIDED = {
    "signs": Projection(5, form="one-sided"),
    "normal": Projection(7, "normal", seed=2, scheme="bergson-2", form="one-sided"),
    "counted": Projection(6, "count-sketch", nonzeros=2, form="one-sided"),
    "hadamard": Projection(5, "hadamard", form="one-sided"),
}
# Of each kind of model the layers whose whole gradient is formed, or is a vector.
WHOLE = {"tokens": ["1", "3", "4", "6.inner", "7", "8"], "images": LAYERS["images"]}


def single(name, full, projection):
    """R vec(G) of each example, in float64."""
    flat = full.flatten(1)
    return flat @ projection.matrix(name, "single", flat.shape[1]).double().T * projection.scale


def normalizers(kind, bias, of=AdamNormalizer):
    """Drawn second moments of the linear layers and convolutions of a model."""
    draw, found = torch.Generator().manual_seed(7), {}
    for name, full in truths(kind, bias).items():
        if full.dim() == 3 and name != "0" * (kind == "tokens"):
            v = torch.rand(full.shape[1:], generator=draw, dtype=torch.float64) + 0.01
            layer = made(kind)[0].get_submodule(name)
            has_bias = bias and layer.bias is not None
            weight, last = (v[:, :-1], v[:, -1]) if has_bias else (v, None)
            found[name] = AdamNormalizer(v) if of is AdamNormalizer else of(weight.mean(1), weight.mean(0), last)
    return found


def run(kind):
    model, x = made(kind)
    return lambda: score(model(x)).backward()


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("kind", WHOLE)
def test_one_sided_rows_and_their_sums(kind, bias, backend):
    model, wanted, points = made(kind)[0], truths(kind, bias), WHOLE[kind]
    specs = []
    for label, projection in ONE_SIDED.items():
        settings = {"of": "weight", "bias": bias, "project": projection}
        specs += [Spec(points, name=label, **settings), Spec(points, summed=True, name=label, **settings)]
    specs.append(Spec(points, "norm", of="weight", bias=bias, project=ONE_SIDED["signs"], name="norm"))
    cap = captured(model, specs, run(kind), backend)
    for label, projection in ONE_SIDED.items():
        rows = {name: single(name, wanted[name], projection) for name in points}
        for name in points:
            assert_near(cap[f"{name}:{label}"], rows[name], 256)
        assert_near(cap[f"gradients:{label}"], torch.stack(list(rows.values())).sum(0), 256)
        # The sum is that of the rows, in their order, to the bit.
        total = cap[f"{points[0]}:{label}"].clone()
        for name in points[1:]:
            total += cap[f"{name}:{label}"]
        assert torch.equal(cap[f"gradients:{label}"], total)
    for name in points:
        assert_near(cap[f"{name}:norm"], single(name, wanted[name], ONE_SIDED["signs"]).norm(dim=1), 256)


@pytest.mark.parametrize("of", [AdamNormalizer, AdafactorNormalizer])
@pytest.mark.parametrize("kind, bias", [("tokens", False), ("tokens", True), ("images", True)])
def test_normalized_gradients(kind, bias, of, backend):
    model, wanted, held = made(kind)[0], truths(kind, bias), normalizers(kind, bias, of)
    settings = {"of": "weight", "bias": bias, "normalizer": held}
    small, one, points = Projection(4), ONE_SIDED["signs"], list(held)
    counted = Projection(6, "count-sketch")
    query = {name: torch.randn(3, *wanted[name].shape[1:], generator=torch.Generator().manual_seed(1)) for name in held}
    specs = [
        Spec(points, **settings),
        Spec(points, "norm", **settings),
        Spec(points, project=small, name="small", **settings),
        Spec(points, "norm", project=small, name="norm of small", **settings),
        Spec(points, project=counted, name="counted", **settings),
        Spec(points, project=one, name="one", **settings),
        Spec(points, project=one, name="all", summed=True, **settings),
        Spec(points, queries=query, **settings),
    ]
    cap = captured(model, specs, run(kind), backend)
    total = 0
    for name in points:
        full = held[name](wanted[name])
        assert_near(cap[f"{name}:weight"], full, 64)
        assert_near(cap[f"{name}:weight:norm"], full.flatten(1).norm(dim=1), 64)
        assert_near(cap[f"{name}:small"], projected(name, full, small), 256)
        assert_near(cap[f"{name}:norm of small"], projected(name, full, small).flatten(1).norm(dim=1), 256)
        assert_near(cap[f"{name}:counted"], projected(name, full, counted), 256)
        assert_near(cap[f"{name}:one"], single(name, full, one), 256)
        assert_near(cap[f"{name}:weight:scores"], full.flatten(1) @ query[name].double().flatten(1).T, 256)
        total = total + single(name, full, one)
    assert_near(cap["gradients:all"], total, 256)


def test_both_backends_give_the_same_rows(native):
    model = made("tokens")[0]
    specs = [
        Spec(["1", "8"], of="weight", project=ONE_SIDED["counted"], summed=True),
        Spec(["1", "8"], of="weight", project=ONE_SIDED["counted"], name="each"),
        Spec(["1", "8"], of="weight", bias=True, normalizer=normalizers("tokens", True), project=4, name="adam"),
    ]
    ours, other = (captured(model, specs, run("tokens"), name) for name in (native, "python"))
    for name in ours.names:
        assert_near(ours[name], other[name].double(), 16)


def linear(*, bias=True):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D, 6, bias=bias), nn.Tanh(), nn.Linear(6, D))


def alone(model, x, name, bias=False):
    """G of each example alone, in float64."""
    wide, found = linear().double(), []
    wide.load_state_dict(model.state_dict())
    for one in x.double().split(1):
        wide.zero_grad()
        score(wide(one)).backward()
        layer = wide.get_submodule(name)
        found.append(torch.cat([layer.weight.grad, layer.bias.grad[:, None]][: 1 + bias], 1).clone())
    return torch.stack(found)


@pytest.mark.parametrize("side", ["right", "left"])
def test_masks_and_padding(side, backend):
    """Each example alone and without padding; what lies at padding is NaN in the input of the layers."""
    model, lengths = linear(), [6, 3, 4, 1]
    x, real = torch.randn(B, P, D), torch.arange(P) < torch.tensor(lengths)[:, None]
    mask = real if side == "right" else real.flip(1)
    v = torch.rand(6, D) + 0.1
    specs = [
        Spec("0", of="weight", project=ONE_SIDED["counted"]),
        Spec(["0", "2"], of="weight", project=ONE_SIDED["signs"], summed=True),
        Spec("0", of="weight", project=3, normalizer=AdamNormalizer(v), name="adam"),
    ]

    def loss(given, at):
        return torch.where(at[..., None], model(given), 0).square().sum()

    wanted = []
    for row, n, at in zip(x, lengths, mask, strict=True):
        cap = captured(model, specs, lambda: loss(row[at][None], at[at][None]).backward(), backend, rows=1)  # noqa: B023
        wanted.append({name: cap[name][0].double() for name in cap.names})
        assert n == int(at.sum())
    with tlfast.capture(model, specs, rows=B, backend=backend) as cap, cap.batch(mask=mask):
        loss(x.masked_fill(~mask[..., None], torch.nan), mask).backward()
    for name in cap.names:
        assert_near(cap[name], torch.stack([row[name] for row in wanted]), 64)


def test_checkpoints_scalers_and_autocast(backend):
    model, x = linear(), torch.randn(B, P, D, requires_grad=True)
    wanted = [alone(model, x.detach(), name) for name in ("0", "2")]
    adam = AdamNormalizer(torch.rand(6, D) + 0.1)
    specs = [
        Spec(["0", "2"], of="weight", project=ONE_SIDED["signs"], summed=True),
        Spec("0", of="weight", normalizer=adam),
    ]
    total = sum(single(name, full, ONE_SIDED["signs"]) for name, full in zip(("0", "2"), wanted, strict=True))
    with tlfast.capture(model, specs, rows=4 * B, backend=backend) as cap:
        for reentrant in (False, True):
            score(checkpoint(model, x, use_reentrant=reentrant)).backward()
        with cap.batch(grad_scale=512.0):
            (512 * score(model(x))).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made_low = model(x)
        score(made_low.float()).backward()
    *same, low = cap["gradients:weight"].split(B)
    for rows in same:
        assert_near(rows, total, 256)
    assert (low.double() - total).norm() < 0.05 * total.norm()
    for rows in cap["0:weight"].split(B)[:3]:
        assert_near(rows, adam(wanted[0]), 64)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.other = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, both=True):
        made = self.inner(self.inner(x).tanh())
        return self.other(made) if both else made


def test_sums_over_calls_and_points_that_do_not_fire(backend):
    torch.manual_seed(4)
    model, x = Twice(), torch.randn(B, P, D)
    spec = Spec(["inner", "other"], of="weight", project=ONE_SIDED["signs"], summed=True)
    total = 0
    for name in ("inner", "other"):
        grads = [torch.autograd.grad(score(model(one)), model.get_submodule(name).weight)[0] for one in x.split(1)]
        total = total + single(name, torch.stack(grads).double(), ONE_SIDED["signs"])
    cap = captured(model, spec, lambda: score(model(x)).backward(), backend, calls="sum")
    assert_near(cap["gradients:weight"], total, 256)
    with pytest.raises(RuntimeError, match="a point must fire once in a backward, got a second time"):
        captured(model, spec, lambda: score(model(x)).backward(), backend)
    with tlfast.capture(model, spec, rows=2 * B, backend=backend, calls="sum", missing="nan") as cap:
        score(model(x, both=False)).backward()
        score(model(x)).backward()
    assert cap["gradients:weight"][:B].isnan().all()
    assert cap.missing["gradients:weight"].tolist() == [True] * B + [False] * B
    assert_near(cap["gradients:weight"][B:], total, 256)


def test_a_sum_is_stored_in_its_dtype_and_counted(backend):
    model, x = linear(), torch.randn(B, P, D)
    project = ONE_SIDED["signs"]
    specs = [
        Spec(["0", "2"], of="weight", project=project, summed=True),
        Spec(["0", "2"], of="weight", project=project, summed=True, dtype="float16", name="half"),
    ]
    with tlfast.capture(model, specs, rows=2 * B, backend=backend) as cap:
        score(model(x)).backward()
        (1e6 * score(model(x))).backward()
    assert torch.equal(cap["gradients:half"], cap["gradients:weight"].half())
    large = int((cap["gradients:weight"].abs() >= 65520).sum())
    assert large
    assert cap.counts["gradients:half"] == {"nonfinite": large, "saturated": large}


def test_second_moments_of_factors_and_of_a_checkpoint(tmp_path, backend):
    model = nn.Sequential(nn.Embedding(9, D), nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 9))
    texts = [[1, 2, 3, 4], [5, 6, 7], [8, 1]]
    found = tlfast.factors(model, texts, "*", kinds="adam", bias=True)
    v = found["1"].second_moment
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = tlfast.read_optimizer(tmp_path, model, bias=True)
    for held in (found.normalizers(), found.normalizers("adafactor"), saved):
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        specs = [Spec("1", of="weight", bias=True, name="plain"), Spec("1", of="weight", bias=True, normalizer=held)]
        cap = captured(model, specs, lambda: score(model(ids)).backward(), backend, rows=2)  # noqa: B023
        assert_near(cap["1:weight"], held["1"](cap["1:plain"].double()), 64)
    assert v.shape == (6, D + 1)


def at(settings, points="0"):
    return lambda: tlfast.capture(linear(), Spec(points, of="weight", **settings), rows=1)


def beside_points(**settings):
    return lambda: tlfast.capture(linear(), "0", rows=1, **settings)


ADAM, SQUARE = AdamNormalizer(torch.ones(6, D)), AdamNormalizer(torch.ones(3, 3))
ONE = Projection(4, form="one-sided")
REFUSED = {
    "Spec: normalizer must be left out unless of=\"weight\", got one with of='grad'.": lambda: Spec(
        "0", normalizer=ADAM
    ),
    "Spec: summed must be left out unless rows are one-sided projections": at({"summed": True, "project": 4}),
    "Spec: summed must be True or False, got 1.": at({"summed": 1}),
    "capture: normalizer must be left out unless of=\"weight\", got one with of='grad, act'.": beside_points(
        of=("grad", "act"), normalizer=ADAM
    ),
    "capture: summed must be left out unless of=\"weight\", got one with of='grad'.": beside_points(summed=True),
    "capture: summed must be left out unless rows are one-sided projections, of whole examples, got True with proj": (
        beside_points(of=("act", "weight"), summed=True, project=4)
    ),
    "capture: normalizer must be a normalizer, or a mapping from points to such, got one for 2 points.": at(
        {"normalizer": ADAM}, "*"
    ),
    "capture: normalizer must have an entry for each point, got none for '2'. It has '0': name": at(
        {"normalizer": {"0": ADAM}}, "*"
    ),
    "capture: normalizer must be a normalizer, or a mapping from points to such, got Tensor.": at(
        {"normalizer": torch.ones(6, D)}
    ),
    "capture at 0: normalizer must be of gradients [6, 9], got [6, 8]. Say bias=": at(
        {"normalizer": ADAM, "bias": True}
    ),
    "capture at 0: normalizer must hold means of squares, got a negative number, NaN or infinity.": at(
        {"normalizer": AdamNormalizer(-torch.ones(6, D))}
    ),
    'capture at 0: normalizer must be left out with per="token", but an AdafactorNormalizer where': at(
        {"normalizer": ADAM, "per": "token"}
    ),
    'capture at 0: project must be two-sided with heads= or per="token", got \'one-sided\'.': at(
        {"project": ONE, "per": "token"}
    ),
    "capture: calls must not be \"stack\" with summed=True, got 'stack'.": lambda: tlfast.capture(
        linear(), Spec("*", of="weight", project=ONE, summed=True), rows=1, calls="stack"
    ),
    "capture at 0: normalizer must be left out but at linear layers and convolutions, got layer_norm.": lambda: (
        tlfast.capture(nn.Sequential(nn.LayerNorm(3)), Spec("0", of="weight", normalizer=SQUARE), rows=1)
    ),
    "capture: specs must have columns of different names, got gradients:weight.": lambda: tlfast.capture(
        linear(), [Spec(name, of="weight", project=ONE, summed=True) for name in ("0", "2")], rows=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, make", REFUSED.items())
def test_refusals(make, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        make()


def test_tokens_of_an_adafactor_normalizer_multiply_to_the_row(backend):
    model, x = linear(), torch.randn(B, P, D)
    held = AdafactorNormalizer(torch.rand(6) + 0.1, torch.rand(D) + 0.1)
    settings = {"of": "weight", "project": 4, "normalizer": held}
    specs = [Spec("0", **settings), Spec("0", per="token", name="tokens", **settings)]
    cap = captured(model, specs, lambda: score(model(x)).backward(), backend)
    rows = cap["0:tokens"].double()
    products = (rows[:, :4, None] * rows[:, None, 4:]).view(B, P, 4, 4).sum(1)
    assert_near(cap["0:weight"], products, 64)
    assert_near(cap["0:weight"], projected("0", held(alone(model, x, "0")), Projection(4)), 256)
