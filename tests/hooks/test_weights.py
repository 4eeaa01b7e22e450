"""Weight gradients of each example: every kind of layer against autograd's of the example alone, in float64."""

import functools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from weighted_models import (
    LAYERS,
    MODELS,
    B,
    D,
    P,
    RMSNorm,
    assert_near,
    captured,
    made,
    projected,
    score,
    truths,
)  # fmt: skip

import tlfast
from tlfast import Projection, Spec

COUNTED, HADAMARD = Projection(4, "count-sketch", nonzeros=2), Projection(3, "hadamard", seed=1)


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_against_each_example_alone(kind, bias, backend):
    model, x = made(kind)
    wanted, small, large = truths(kind, bias), Projection(4), Projection(64, "normal", seed=2)
    whole = [name for name in LAYERS[kind] if not isinstance(model.get_submodule(name), nn.Embedding)]
    specs = [
        Spec(whole, of="weight", bias=bias),
        Spec(LAYERS[kind], "norm", of="weight", bias=bias),
        Spec(LAYERS[kind], of="weight", bias=bias, project=small, name="small"),
        Spec(LAYERS[kind], of="weight", bias=bias, project=large, name="large"),  # more than the layer has inputs
        Spec(LAYERS[kind], "norm", of="weight", bias=bias, project=small, name="norm of small"),
        Spec(LAYERS[kind], of="weight", bias=bias, project=COUNTED, name="counted"),
        Spec(LAYERS[kind], of="weight", bias=bias, project=HADAMARD, name="hadamard"),
    ]
    cap = captured(model, specs, lambda: score(model(x)).backward(), backend)
    for name in LAYERS[kind]:
        full = wanted[name]
        if name in whole:
            assert_near(cap[f"{name}:weight"], full, 64)
        assert_near(cap[f"{name}:weight:norm"], full.flatten(1).norm(dim=1), 64)
        assert (cap[f"{name}:weight:norm"] >= 0).all()
        assert_near(cap[f"{name}:small"], projected(name, full, small), 256)
        assert_near(cap[f"{name}:counted"], projected(name, full, COUNTED), 256)
        assert_near(cap[f"{name}:hadamard"], projected(name, full, HADAMARD), 256)
        assert_near(cap[f"{name}:large"], projected(name, full, large), 256)
        assert_near(cap[f"{name}:norm of small"], projected(name, full, small).flatten(1).norm(dim=1), 256)


def test_both_backends_give_the_same_rows(native):
    for kind in MODELS:
        model, x = made(kind)
        spec = Spec(LAYERS[kind], of="weight", project=5, bias=True)
        ours, other = (
            captured(model, spec, lambda: score(model(x)).backward(), name)  # noqa: B023
            for name in (native, "python")
        )
        for name in ours.names:
            assert_near(ours[name], other[name].double(), 64)


def test_factors_of_each_token_multiply_to_its_gradient(backend):
    model, x = made("tokens")
    mask = torch.arange(P) < torch.tensor([6, 3, 4, 1])[:, None]
    names = ["0", "1", "4", "8"]
    projection = Projection(4)
    specs = [
        Spec(names[1:], of="weight", per="token", bias=True, name="tokens"),
        Spec(names, of="weight", per="token", bias=True, project=projection, name="small"),
        Spec(names, of="weight", bias=True, project=projection),
        Spec("3", of="weight", per="token", name="norm"),
        Spec("3", of="weight"),
    ]
    with tlfast.capture(model, specs, rows=B, backend=backend) as cap, cap.batch(mask=mask, grad_scale=0.5):
        (0.5 * score(model(x))).backward()
    example, _ = cap.where("1:tokens")
    assert len(example) == mask.sum()
    for name in names:
        rows, whole = cap[f"{name}:small"], cap[f"{name}:weight"]
        products = rows[:, :4, None] * rows[:, None, 4:]
        summed = torch.zeros(B, 4, 4).index_add(0, example, products)
        assert_near(summed, whole.double(), 64)
    for name in names[1:]:
        n = model.get_submodule(name).weight.shape[0]
        rows = cap[f"{name}:tokens"].double()
        full = torch.zeros(B, n, rows.shape[1] - n, dtype=torch.float64)
        full.index_add_(0, example, rows[:, :n, None] * rows[:, None, n:])
        assert_near(cap[f"{name}:weight"], projected(name, full, projection), 256)
    assert_near(torch.zeros(B, 10).index_add(0, example, cap["3:norm"]), cap["3:weight"].double(), 64)


def test_padding_batch_order_and_split_change_nothing(backend):
    model, x = made("tokens")
    spec = Spec(["0", "1", "3", "4", "8"], of="weight", project=4, bias=True)
    lengths = [6, 3, 4, 1]
    alone = {}
    for row, n in zip(x, lengths, strict=True):
        run = functools.partial(lambda given: score_of_tokens(model, given).backward(), row[None, :n])
        cap = captured(model, spec, run, backend, rows=1)
        for name in cap.names:
            alone.setdefault(name, []).append(cap[name][0].clone())
    for side, order in (("right", [0, 1, 2, 3]), ("left", [2, 0, 3, 1])):
        padded, mask = torch.full((B, P), 3), torch.zeros(B, P, dtype=torch.bool)
        for place, example in enumerate(order):
            n = lengths[example]
            span = slice(0, n) if side == "right" else slice(P - n, P)
            padded[place, span], mask[place, span] = x[example, :n], True
        with tlfast.capture(model, spec, rows=B, backend=backend) as cap, cap.batch(mask=mask):
            score_of_tokens(model, padded).backward()
        for name in cap.names:
            assert_near(cap[name], torch.stack(alone[name])[order].double(), 64)


def score_of_tokens(model, x):
    """Of each token by itself, also of padding, whose gradients the mask leaves out."""
    made = x
    for number in (0, 1, 2, 3, 4, 5):
        made = model[number](made)
    return (model[8](made[..., :6]).square() * torch.tensor([1.0, -2.0, 0.5])).sum()


def test_what_lies_at_padding_counts_for_nothing(backend):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    wrong = x.masked_fill(~mask[..., None], torch.nan)
    specs = [Spec("0", of="weight", project=2), Spec("0", of="weight", name="whole"), Spec("0", "norm", of="weight")]

    def run(given):
        return torch.where(mask[..., None], model(given), 0).square().sum().backward()

    with tlfast.capture(model, specs, rows=4, backend=backend) as cap:
        for given in (x, wrong):
            with cap.batch(mask=mask):
                run(given)
    for name in cap.names:
        assert cap[name].isfinite().all()
        assert torch.equal(cap[name][:2], cap[name][2:])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x):
        return self.inner(self.inner(x).tanh())


def test_a_module_called_twice_adds_up_or_raises(backend):
    torch.manual_seed(1)
    model, x = Twice(), torch.randn(B, P, D)
    wanted = []
    for one in x.split(1):
        (grad,) = torch.autograd.grad(score(model(one)), model.inner.weight)
        wanted.append(grad.double())
    spec = Spec("inner", of="weight")
    cap = captured(model, spec, lambda: score(model(x)).backward(), backend, calls="sum")
    assert_near(cap["inner:weight"], torch.stack(wanted), 64)
    with pytest.raises(
        RuntimeError, match=r'a point must fire once in a backward, got a second time\. Choose calls="sum"'
    ):
        captured(model, spec, lambda: score(model(x)).backward(), backend)
    stacked = captured(model, spec, lambda: score(model(x)).backward(), backend, calls="stack")["inner:weight"]
    assert_near(stacked.sum(1), torch.stack(wanted), 64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_several_backwards(reentrant, backend):
    torch.manual_seed(2)
    inner, x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), torch.randn(B, P, D, requires_grad=True)
    plain = captured(inner, Spec(["0", "2"], of="weight", project=4), lambda: score(inner(x)).backward(), backend)
    with tlfast.capture(inner, Spec(["0", "2"], of="weight", project=4), rows=3 * B, backend=backend) as cap:
        score(checkpoint(inner, x, use_reentrant=reentrant)).backward()
        kept = score(inner(x))
        kept.backward(retain_graph=True)
        kept.backward()
    for name in cap.names:
        for rows in cap[name].split(B):
            assert_near(rows, plain[name].double(), 64)


def test_autocast_and_a_scaler(backend):
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)), torch.randn(B, P, D)
    spec = Spec(["0", "2"], of="weight", project=4)
    plain = captured(model, spec, lambda: score(model(x)).backward(), backend)
    with tlfast.capture(model, spec, rows=B, backend=backend) as cap, cap.batch(grad_scale=1024.0):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = score(model(x).float())
        (1024 * loss).backward()
    for name in cap.names:
        assert cap[name].dtype == torch.float32
        near = plain[name].double()
        assert (cap[name] - near).norm() < 0.03 * near.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_models_are_summed_in_float32(dtype, backend):
    torch.manual_seed(4)
    model, x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)).to(dtype), torch.randn(B, P, D).to(dtype)
    inputs, grads = {}, {}
    for name in ("0", "2"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: (
                inputs.__setitem__(name, args[0].detach().double()),
                out.register_hook(lambda grad: grads.__setitem__(name, grad.double())),
            )[0]
        )
    cap = captured(model, Spec(["0", "2"], of="weight"), lambda: score(model(x)).backward(), backend)
    for name in ("0", "2"):
        assert cap[f"{name}:weight"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(cap[f"{name}:weight"], grads[name].transpose(1, 2) @ inputs[name], 64)


def test_heads_have_matrices_of_their_own(backend):
    torch.manual_seed(6)
    model, x = nn.Sequential(nn.Linear(D, 6)), torch.randn(B, P, D)
    projection = Projection(2)
    specs = [Spec("0", of="weight", heads=(3, 2), project=projection), Spec("0", of="weight", heads=(3, 2), name="w")]
    cap = captured(model, specs, lambda: score(model(x)).backward(), backend)
    whole = cap["0:w"]
    assert whole.shape == (B, 3, 2, D)
    right = projection.matrix("0", "right", D)
    for head in range(3):
        left = projection.matrix(f"0.head_{head}", "left", 2)
        assert_near(cap["0:weight"][:, head], (left @ whole[:, head] @ right.T / 2).double(), 64)


def test_inputs_by_name_and_hooks_that_change_outputs(backend):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(D, 3)

        def forward(self, x):
            return self.inner(input=x)

    torch.manual_seed(7)
    model, x = ByName(), torch.randn(B, P, D)
    specs = [Spec("inner", of="weight"), Spec("inner")]
    model.inner.register_forward_hook(lambda module, args, out: out * 2)
    with tlfast.capture(model, specs, rows=2 * B, backend=backend) as cap:
        score(model(x)).backward()
        model.inner.register_forward_hook(lambda module, args, out: out + 1, prepend=True)
        score(model(x)).backward()
    wanted = [torch.autograd.grad(score(model(one)), model.inner.weight)[0] for one in x.split(1)]
    # The gradient of a weight is made of that at the output of the layer itself, whatever hooks make of it then.
    assert_near(cap["inner:weight"][B:], torch.stack(wanted).double(), 64)
    at_output = torch.stack([cap["inner"][row].T @ x[row - B] for row in range(B, 2 * B)])
    assert_near(cap["inner:weight"][B:], 2 * at_output.double(), 64)


@pytest.mark.filterwarnings("ignore:capture. no backward reached the points")
def test_an_input_changed_in_place_is_torchs_error(backend):
    model, x = nn.Linear(D, 3), torch.randn(B, P, D)
    with tlfast.capture(model, Spec("", of="weight"), rows=B, backend=backend):
        given = x.clone()
        loss = score(model(given))
        given.add_(1)
        model.requires_grad_(False)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, in torch's own imports
def test_compiled_models(backend):
    torch.manual_seed(8)
    model, x = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)), torch.randn(B, P, D)
    specs = [Spec(["0", "2"], of="weight", project=4), Spec("0", of="weight", name="whole")]
    plain = captured(model, specs, lambda: score(model(x)).backward(), backend)
    with tlfast.capture(model, specs, rows=B, backend=backend) as cap:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        score(compiled(x)).backward()
    torch._dynamo.reset()
    for name in cap.names:
        assert_near(cap[name], plain[name].double(), 64)


def test_a_glob_means_modules_with_parameters_of_their_own():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.LayerNorm(3)), "b": nn.Linear(3, 2)})
    cap = tlfast.capture(model, "**", rows=1, of="weight")
    assert cap.names == ["a.0:weight", "a.2:weight", "b:weight"]
    for points in (["a.1"], ["a.1", "**"], model["a"][1]):  # what is named is meant, also beside a glob
        with pytest.raises(TypeError, match=r"points must be Linear, .*, got a\.1, a GELU"):
            tlfast.capture(model, points, rows=1, of="weight")


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class OddNorm(Odd):
    eps = 1e-5

    def forward(self, x):
        return x * self.weight


def tied():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    return model


OddLayerNorm = type("OddLayerNorm", (OddNorm,), {})


def of(points="0", **settings):
    return lambda: Spec(points, of="weight", **settings)


def at(model, points="0", **settings):
    return lambda: tlfast.capture(model(), points, rows=1, of="weight", **settings)


def linear():
    return nn.Sequential(nn.Linear(2, 6))


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def forward(self, tokens):
        return super().forward(tokens) * 3


class OfPlaces(nn.Embedding):
    """As BART has it."""

    def forward(self, tokens):
        return super().forward(torch.arange(tokens.shape[1]).expand(tokens.shape))


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (2, 0)))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Hidden(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class OtherEps(nn.Module):
    eps = 1e-5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


OtherEpsRMSNorm = type("OtherEpsRMSNorm", (OtherEps,), {})


def with_a_forward_of_its_own():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x @ layer.weight.T * 3
    return layer


def scaled(plain):
    def forward(self, x):
        return plain(self, x) * 3

    return forward


@pytest.mark.parametrize("hidden", [False, True])
def test_another_forward_in_a_class_of_torch_is_tried(hidden, monkeypatch):
    """Rules of relevance are put there, too: one that leaves the weight's gradient as it is will do."""
    model, plain = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(plain)(scaled(plain)) if hidden else scaled(plain))
    with pytest.raises(
        ValueError, match="have the weight gradient of their kind of layer, linear, got 0, a Linear with"
    ):
        tlfast.capture(model, Spec("0", of="weight"), rows=1)
    monkeypatch.undo()

    def held_still(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt().detach() * self.weight + self.bias

    monkeypatch.setattr(nn.LayerNorm, "forward", held_still)
    x = torch.randn(4, 3)
    with tlfast.capture(model, [Spec("0", of="weight"), Spec("1", of="weight")], rows=4) as cap:
        (model(x).square().sum()).backward()
    for name in ("0", "1"):
        torch.testing.assert_close(cap[f"{name}:weight"].sum(0), model[int(name)].weight.grad)


OTHERS = {
    "embedding, got 0, a Scaled": lambda: Scaled(300, 3),
    "embedding, got 0, a OfPlaces": lambda: OfPlaces(300, 3, padding_idx=299),
    "conv, got 0, a Causal": lambda: Causal(2, 2, 3),
    "conv, got 0, a Standardised": lambda: Standardised(2, 2, 3),
    "conv, got 0, a Hidden": lambda: Hidden(2, 2, 3),
    "linear, got 0, a Halved": lambda: Halved(20, 30),
    "rms_norm, got 0, a OtherEpsRMSNorm": OtherEpsRMSNorm,
    "linear, got 0, a Linear": with_a_forward_of_its_own,
}


@pytest.mark.parametrize("text, make", OTHERS.items())
def test_a_layer_that_does_another_thing_than_its_class_says_is_refused(make, text):
    model = nn.Sequential(make())
    kept, drawn = model[0].weight.detach().clone(), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"capture: points must have the weight gradient of their kind of .*{text}"):
        tlfast.capture(model, "0", rows=1, of="weight", project=2)
    assert torch.equal(model[0].weight, kept)
    assert torch.equal(torch.get_rng_state(), drawn)


class T5LayerNorm(nn.Module):
    """Which takes no mean off, and knows its eps by another name."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size) + 0.5), 1e-4

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Falcon(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("make, dtype", [
    (lambda: T5LayerNorm(D), torch.float32),
    (lambda: Falcon(D, 11), torch.float32),
    (lambda: nn.RMSNorm(D), torch.bfloat16),  # whose own eps is that of float32
], ids=["t5", "falcon", "rms of bfloat16"])  # fmt: skip
def test_other_names_and_dtypes_of_the_same_layer(make, dtype, backend):
    torch.manual_seed(9)
    model, x = make().to(dtype), (torch.randn(B, P, D) * 1e-3).to(dtype)
    cap = captured(model, Spec("", of="weight"), lambda: model(x).float().sum().backward(), backend)
    wide, wanted = make().double(), []
    wide.load_state_dict(model.state_dict())
    if getattr(wide, "eps", 1) is None:
        wide.eps = torch.finfo(torch.float32).eps
    wanted = [torch.autograd.grad(wide(one.double()).sum(), wide.weight)[0] for one in x.split(1)]
    assert_near(cap[":weight"], torch.stack(wanted), 64)


def test_an_embedding_starts_the_graph_of_a_frozen_model(backend):
    model, x = nn.Sequential(nn.Embedding(11, D), nn.Linear(D, 3)), torch.randint(0, 11, (B, P))
    spec = Spec(["0", "1"], of="weight", project=4)
    plain = captured(model, spec, lambda: score(model(x)).backward(), backend)
    with tlfast.capture(model, spec, rows=B, backend=backend) as cap, tlfast.freeze(model):
        score(model(x)).backward()
    for name in cap.names:
        assert torch.equal(cap[name], plain[name])


def tied_by_another_name():
    model = nn.Sequential(nn.Linear(3, 5), nn.Identity())
    model[1].kernel = model[0].weight
    return model


class OfOthers(nn.Linear):
    weight = property(lambda self: self.raw.exp(), lambda self, given: setattr(self, "raw", given))


def pruned():
    model = linear()
    prune.l1_unstructured(model[0], "weight", 2)
    return model


REFUSED = {
    "Spec: reduce must be none or norm of weight gradients, got 'mean'.": of(reduce="mean"),
    "Spec: over must be left out of weight gradients, got -1.": of(over=-1),
    "Spec: at must be left out of weight gradients, got 1.": of(at=1),
    "Spec: side must be left out of weight gradients, got 'input'.": of(side="input"),
    "Spec: output must be left out of weight gradients, got 1.": of(output=1),
    "Spec: bias must be True or False, got 1.": of(bias=1),
    "Spec: project must be left out unless of=\"weight\", got one with of='grad'.": lambda: Spec("0", project=4),
    "Spec: bias must be left out unless of=\"weight\", got one with of='grad'.": lambda: Spec("0", bias=True),
    'RMSNorm with of="weight", got 0, a ConvTranspose1d.': at(lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 2))),
    'capture: points must match a module with a weight of its own with of="weight", got none.': at(
        lambda: nn.Sequential(nn.GELU()), "*"
    ),
    "capture: the point 1 must have a weight of its own, got one that is shared by 0 and 1.": at(tied, "1"),
    "capture: the point 0 must have a weight of its own, got one that is shared by 0 and 1.": at(tied_by_another_name),
    "must have a weight that is a parameter, got the model, whose weight is made of others.": at(weight_normed, ""),
    "must have a weight that is a parameter, got 0, whose weight is made of others.": at(pruned),
    "got made, whose weight is made of others. Leave it out, or remove": at(
        lambda: nn.ModuleDict({"made": OfOthers(2, 2)}), "made"
    ),
    'RMSNorm with of="weight", got 0, a LazyLinear.': at(lambda: nn.Sequential(nn.LazyLinear(2))),
    "must be modules that are called, got 0.out_proj, whose weight a MultiheadAttention takes by itself. Leave": at(
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "0.out_proj"
    ),
    "got 0, a MyExperts whose parameters are of all experts in one. Leave it out: which": at(
        lambda: nn.Sequential(type("MyExperts", (Odd,), {})())
    ),
    "have the weight gradient of their kind of layer, layer_norm, got 0, a OddLayerNorm with another.": at(
        lambda: nn.Sequential(OddLayerNorm())
    ),
    "capture at 0: the weight gradient of an embedding must be projected, got one of [5, 3] for each example.": at(
        lambda: nn.Sequential(nn.Embedding(5, 3))
    ),
    "the point 0 must be an embedding whose gradient is that of each token by itself, got max_norm.": at(
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), project=2
    ),
    "capture at 0: project must be two-sided at an embedding, got 'one-sided'.": at(
        lambda: nn.Sequential(nn.Embedding(5, 3)), project=Projection(4, form="one-sided")
    ),
    "capture at 0: heads must be (n, d) of a linear layer with n * d outputs, 6 here, got (2, 2).": at(
        linear, heads=(2, 2)
    ),
    "where activations or inputs are read, got 'full' with of='weight', side='output'.": at(linear, attach="full"),
    'calls must be "raise" or "last" for norms of weight gradients, and for their factors, got \'sum\'.': at(
        linear, reduce="norm", calls="sum"
    ),
}


@pytest.mark.parametrize("text, make", REFUSED.items())
def test_refusals(make, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        make()


@pytest.mark.filterwarnings("ignore:capture. no backward reached the points")
def test_refusals_while_running(backend):
    model = nn.Sequential(nn.Conv1d(3, 3, 1))
    mask = torch.ones(2, 3, dtype=torch.bool)
    with tlfast.capture(model, "0", rows=2, of="weight", backend=backend) as cap:  # noqa: SIM117
        with pytest.raises(ValueError, match="mask must be left out at a convolution, got one"), cap.batch(mask=mask):
            model(torch.randn(2, 3, 3)).sum().backward()
    pooler, mask = nn.Linear(3, 4), torch.ones(2, 4, dtype=torch.bool)  # as many positions as the pooler has outputs
    text = r"mask must have fewer dimensions than a gradient of shape \[2, 4\], got"
    with tlfast.capture(pooler, "", rows=2, of="weight", backend=backend) as cap:  # noqa: SIM117
        with pytest.raises(ValueError, match=text), cap.batch(mask=mask):
            pooler(torch.randn(2, 3)).sum().backward()
    gated = type("GatedRMSNorm", (RMSNorm,), {"forward": lambda self, x, gate=None: RMSNorm.forward(self, x)})(3)
    with tlfast.capture(gated, "", rows=2, of="weight", backend=backend):  # noqa: SIM117
        with pytest.raises(TypeError, match="the module must be given one tensor, got 2"):
            gated(torch.randn(2, 3), gate=torch.randn(2, 3))
    layer = nn.Linear(3, 2)
    with tlfast.capture(layer, "", rows=2, of="weight", backend=backend):  # noqa: SIM117
        with pytest.raises(ValueError, match="the input must have the batch before its last dimension, got \\[3\\]"):
            layer(torch.randn(3)).sum().backward()
