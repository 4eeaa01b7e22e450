"""Factors of the curvature against float64 of each example alone; the same for any split, exact where that is known."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import tlfast
from tlfast import Factors
from tlfast.attribution import write_bergson_factors
from tlfast.backends.choice import pick_backend

KINDS = ("kfac", "ekfac", "adam")
VOCAB, WIDE = 11, 150  # wider than a panel of the sums


def refuses(text, kind=ValueError):
    return pytest.raises(kind, match="^" + re.escape(text))


def language_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(VOCAB, 6), nn.Linear(6, WIDE), nn.GELU(), nn.Linear(WIDE, VOCAB, bias=False))


def texts(n=9, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (2 + 3 * k % 7,), generator=draw).tolist() for k in range(n)]


def alone(model, examples, name, bias):
    """Of each example its inputs [T, I], its gradients [T, O] and its weight gradient [O, I], in float64."""
    wide, layer, found = language_model().double(), None, []
    wide.load_state_dict(model.state_dict())
    layer = wide.get_submodule(name)
    for ids in examples:
        seen = {}
        handle = layer.register_forward_hook(lambda m, given, out, seen=seen: seen.update(a=given[0], out=out))
        logits = wide(torch.tensor([ids]))
        handle.remove()
        loss = nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
        (g,) = torch.autograd.grad(loss, seen["out"])
        a = seen["a"][0].detach()
        a = torch.cat([a, torch.ones(len(a), 1)], 1) if bias and layer.bias is not None else a
        found.append((a, g[0], g[0].T @ a))
    return found


def assert_near(found, wanted, most=2e-6):
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= most * wanted.abs().max()


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
def test_sums_are_those_of_each_example_alone(bias, backend):
    model, examples = language_model(), texts()
    found = tlfast.factors(
        model, examples, kinds=KINDS, bias=bias, batch_tokens=24, padding_side="left" if bias else "right",
        grad_scale=4.0 if bias else 1.0, backend=backend,
    )  # fmt: skip
    assert found.names == ["1", "3"]
    for name in found:
        of, truth = found[name], alone(model, examples, name, bias)
        assert (of.n_examples, of.n_tokens, of.bias) == (9, sum(map(len, examples)), bias and name == "1")
        assert_near(of.inputs, sum(a.T @ a for a, _, _ in truth))
        assert_near(of.outputs, sum(g.T @ g for _, g, _ in truth))
        assert torch.equal(of.outputs, of.outputs.T)
        full = torch.stack([weight for _, _, weight in truth])
        assert_near(of.second_moment, full.square().mean(0))
        rotated = of.output_basis.T @ full @ of.input_basis
        assert_near(of.eigenvalues, rotated.square().mean(0), 2e-5)  # of the example's, whose eigenvectors are rounded
        torch.testing.assert_close(of.eigenvalues.sum(), full.square().sum() / 9, rtol=1e-5, atol=0)
        size = of.inputs.diagonal().sum()
        assert_near(of.input_basis.T @ of.input_basis, torch.eye(of.n_inputs, dtype=torch.float64), 1e-12)
        turned = of.input_basis.T @ of.inputs @ of.input_basis
        assert (turned - turned.diagonal().diag()).abs().max() <= 1e-12 * size
        assert_near(of.kfac_eigenvalues.sum(), of.outputs.trace() * size / (9 * of.n_tokens), 1e-6)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_batches_and_merged_parts_are_one_run(tmp_path):
    model, examples = language_model(), texts(12)
    whole = tlfast.factors(model, examples, kinds=("kfac", "adam"), bias=True)
    one_by_one = tlfast.factors(model, examples, kinds=("kfac", "adam"), bias=True, batch_tokens=1)
    shares = (examples[:5], examples[5:6], examples[6:])
    parts = [tlfast.factors(model, share, kinds=("kfac", "adam"), bias=True) for share in shares]
    for k, part in enumerate(parts):
        part.save(tmp_path / f"{k}.npz")
    loaded = [Factors.load(tmp_path / f"{k}.npz") for k in range(3)]
    assert [repr(part) for part in loaded] == [repr(part) for part in parts]
    assert all(torch.equal(loaded[0]["1"].sums[name], parts[0]["1"].sums[name]) for name in parts[0]["1"].sums)
    merged = loaded[0].merge(loaded[1]).merge(loaded[2])
    other = parts[2].merge(parts[1].merge(parts[0]))
    for name in whole:
        assert (merged[name].n_examples, merged[name].n_tokens) == (12, whole[name].n_tokens)
        for total in ("inputs", "outputs", "squares"):
            assert_near(merged[name].sums[total], whole[name].sums[total])
            assert_near(one_by_one[name].sums[total], whole[name].sums[total])
            assert_near(other[name].sums[total], merged[name].sums[total], 1e-15)
    basis = merged.eigen()
    basis.save(tmp_path / "basis.npz")
    basis = Factors.load(tmp_path / "basis.npz")
    shares = [tlfast.factors(model, share, kinds="ekfac", bias=True, basis=basis) for share in shares]
    eigen = shares[0].merge(shares[1]).merge(shares[2])
    at_once = tlfast.factors(model, examples, kinds="ekfac", bias=True, basis=basis, batch_tokens=5)
    for name in whole:
        assert eigen[name].n_examples == 12
        assert_near(eigen[name].eigenvalues, at_once[name].eigenvalues)
        assert torch.equal(eigen[name].input_basis, basis[name].input_basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_rows_than_a_block(dtype, backend):
    model, data = linear(3, 2, dtype, bias=True), 1 + torch.rand(2, 9_001, 3, dtype=dtype)

    def loss(model, batch):
        return model(batch["x"]).square().sum()

    examples = [{"x": one} for one in data]
    found = run(model, examples, loss, kinds=("kfac", "adam"), backend=backend, batch_examples=2)["1"]
    x = data.double()
    g = 2 * model.double()(x).detach()
    exact = 1e-13 if dtype == torch.float64 else 3e-6
    assert_near(found.inputs, x.flatten(0, 1).T @ x.flatten(0, 1), exact)
    assert_near(found.outputs, g.flatten(0, 1).T @ g.flatten(0, 1), exact)
    assert_near(found.second_moment, torch.bmm(g.transpose(1, 2), x).square().mean(0), exact)


def linear(n_inputs, n_outputs, dtype=torch.float64, bias=False):
    """A single layer, behind a place at which gradients start."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Linear(n_inputs, n_outputs, bias=bias)).to(dtype)


def run(model, examples, loss, **settings):
    return tlfast.factors(model, examples, "1", loss=loss, embedding=model[0], **settings)


def linear_loss(model, batch):
    return (model(batch["x"]) * batch["g"]).sum()


def crossed():
    """Each input with each gradient: these don't depend on each other, and the Fisher matrix is a Kronecker product."""
    torch.manual_seed(3)
    inputs, outputs = torch.randn(7, 4).double(), torch.randn(5, 3).double()
    return [{"x": a, "g": g} for a in inputs for g in outputs]


def fisher(examples):
    rows = torch.stack([torch.outer(one["g"], one["x"]).flatten() for one in examples])
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_influence_is_that_of_the_exact_inverse(kind, backend):
    examples, model = crossed(), linear(4, 3)
    found = run(model, examples, linear_loss, kinds=("kfac", "ekfac"), backend=backend)
    exact, queries = fisher(examples), torch.randn(2, 3, 4, dtype=torch.float64)
    for damping in (0.0, 0.3):
        inverse = torch.linalg.inv(exact + damping * torch.eye(12, dtype=torch.float64))
        ready = found.precondition({"1:weight": queries}, damping=damping, kind=kind)["1:weight"]
        torch.testing.assert_close(ready.flatten(1), queries.flatten(1) @ inverse, rtol=1e-8, atol=1e-10)
        rows = torch.stack([torch.outer(one["g"], one["x"]) for one in examples])
        influence = torch.einsum("qoi,noi->qn", ready, rows)
        wanted = queries.flatten(1) @ inverse @ rows.flatten(1).T
        torch.testing.assert_close(influence, wanted, rtol=1e-8, atol=1e-8)
    usual = found.precondition({"1": queries.float()})["1"]
    mean = exact.diagonal().mean()
    assert usual.dtype == torch.float32
    inverse = torch.linalg.inv(exact + 0.1 * mean * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(usual.double().flatten(1), queries.flatten(1) @ inverse, rtol=1e-4, atol=1e-5)


def test_eigenvalues_are_the_best_in_their_basis():
    """Also where the Fisher matrix is no Kronecker product: Lam is its diagonal in the basis, and K-FAC's isn't."""
    examples, model = crossed()[::3], linear(4, 3)
    of = run(model, examples, linear_loss, kinds=("kfac", "ekfac"))["1"]
    both = torch.kron(of.output_basis, of.input_basis)
    exact = fisher(examples)
    diagonal = (both.T @ exact @ both).diagonal().view(3, 4)
    assert_near(of.eigenvalues, diagonal, 1e-10)
    assert_near(of.eigenvalues.sum(), exact.trace(), 1e-10)

    def off(values):
        return (both @ values.flatten().diag() @ both.T - exact).norm()

    assert off(of.eigenvalues) < 0.99 * off(of.kfac_eigenvalues)


class Gated(nn.Module):
    """Token 0 goes through a layer that no other one reaches."""

    def __init__(self):
        super().__init__()
        self.embed, self.rare, self.out = nn.Embedding(VOCAB, 6), nn.Linear(6, 6), nn.Linear(6, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(x + self.rare(x) if ids[0, 0] == 0 else x)


def test_a_layer_that_some_batches_do_not_reach():
    torch.manual_seed(0)
    model = Gated()
    found = tlfast.factors(model, [[0, 3, 4], [1, 2, 3]], batch_tokens=1, missing="nan")
    assert (found["rare"].n_examples, found["rare"].n_tokens) == (1, 3)
    assert (found["out"].n_examples, found["out"].n_tokens) == (2, 6)


def test_globs_mean_linear_layers_with_a_weight_of_their_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=VOCAB)
    model = transformers.GPT2LMHeadModel(config).eval()
    found = tlfast.factors(model, [[1, 2, 3], [4, 5, 6]], bias=True)
    assert [name.split(".", 3)[-1] for name in found] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    of = found["transformer.h.0.mlp.c_fc"]
    assert (of.n_outputs, of.n_inputs) == (32, 9)
    assert of.inputs[-1, -1] == 6
    norms = [f"transformer.{name}" for name in ("h.0.ln_1", "h.0.ln_2", "ln_f")]
    shared = ["transformer.wte", "lm_head"]
    assert list(found.left_out) == ["transformer.wte", "transformer.wpe", *norms, "lm_head"]
    assert {found.left_out[name] for name in norms} == {"LayerNorm"}
    assert [found.left_out[name] for name in shared] == ["Embedding", "a shared weight"]
    assert repr(found).endswith("transformer.ln_f (LayerNorm), lm_head (a shared weight)")
    with refuses("factors: the point lm_head must have a weight of its own"):
        tlfast.factors(model, [[1, 2, 3]], ["transformer.h.*.mlp.c_*", "lm_head"])


@pytest.mark.parametrize("bias", [False, True])
def test_windows_of_a_convolution_are_its_tokens(bias, backend, tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, (2, 3), stride=2, padding=1, dilation=(1, 2))
    model = nn.Sequential(nn.Identity(), conv, nn.Conv2d(4, 4, 2, groups=2)).double()
    data = torch.randn(5, 3, 6, 7, dtype=torch.float64)

    def loss(model, batch):
        return (model(batch["x"]) ** 2).sum()

    settings = {"loss": loss, "embedding": model[0], "bias": bias, "backend": backend, "batch_examples": 2}
    found = tlfast.factors(model, [{"x": x} for x in data], kinds=("kfac", "ekfac", "adam"), **settings)
    assert found.names == ["1"]
    assert found.left_out == {"2": "Conv2d with groups"}
    of = found["1"]
    windows = nn.functional.unfold(data, (2, 3), dilation=(1, 2), padding=1, stride=2).mT  # [N, T, 18]
    windows = torch.cat([windows, torch.ones_like(windows[..., :1])], 2) if bias else windows
    made = conv(data).detach().requires_grad_()
    (grad,) = torch.autograd.grad((model[2](made) ** 2).sum(), made)
    grad = grad.flatten(2).mT  # [N, T, 4]
    gradients = grad.mT @ windows
    assert (of.n_examples, of.n_tokens) == (5, windows.shape[0] * windows.shape[1])
    assert_near(of.inputs, windows.flatten(0, 1).T @ windows.flatten(0, 1), 1e-12)
    assert_near(of.outputs, grad.flatten(0, 1).T @ grad.flatten(0, 1), 1e-12)
    assert_near(of.second_moment, gradients.square().mean(0), 1e-12)
    rotated = of.output_basis.T @ gradients @ of.input_basis
    assert_near(of.eigenvalues, rotated.square().mean(0), 1e-10)
    (loss(model, {"x": data})).backward()
    assert_near(gradients.sum(0)[:, :18], conv.weight.grad.flatten(1), 1e-12)
    assert found.normalizers()["1"](gradients).shape == gradients.shape
    with refuses("write_bergson_factors: factors must be of linear layers, got 1 (Conv2d). bergson has none of others"):
        write_bergson_factors(found, tmp_path, model)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_glob_leaves_convolutions_out_that_are_none_and_a_name_raises():
    made_of_others = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 1))
    model = nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 2), Doubled(3, 3, 1), made_of_others)
    examples = [{"x": torch.randn(2, 4, 4)} for _ in range(2)]
    settings = {"loss": lambda model, batch: model(batch["x"]).square().sum(), "embedding": model[0]}
    found = tlfast.factors(model, examples, **settings)
    assert found.names == ["1"]
    assert found.left_out["2"] == "Doubled with another gradient than its kind"
    assert found.left_out["3"] == "a weight that is made of others"
    for name, text in (
        ("2", "have the weight gradient of their kind of layer, conv"),
        ("3", "have a weight that is a"),
    ):
        with refuses(f"factors: points must {text}"):
            tlfast.factors(model, examples, ["1", name], **settings)


class Convolved(nn.Module):
    """A text model with a convolution, whose positions are the last dimension."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.out = nn.Embedding(VOCAB, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, VOCAB)

    def forward(self, ids):
        return self.out(self.conv(self.embed(ids).mT).mT)


def test_a_glob_leaves_out_a_convolution_over_padded_tokens():
    torch.manual_seed(0)
    model, examples = Convolved(), texts()
    found = tlfast.factors(model, examples, kinds=("kfac", "ekfac"))
    assert found.names == ["out"]
    assert found.left_out == {"embed": "Embedding", "conv": "Conv1d, whose windows lie over padding"}
    assert found["out"].n_tokens == sum(map(len, examples))
    assert tlfast.factors(model, examples, kinds="ekfac", basis=found).names == ["out"]
    with refuses("factors at conv: a gradient must have the positions, as many as the batch has, as dimension 1 alone"):
        tlfast.factors(model, examples, ["conv", "o*"])
    assert tlfast.factors(model, examples, batch_tokens=1).names == ["conv", "out"]


def test_sounds_of_several_lengths_are_not_padded():
    model = nn.Sequential(nn.Identity(), nn.Conv1d(1, 3, 2, stride=2, bias=False))
    sounds = [{"input_values": torch.randn(n)} for n in (8, 8, 4, 4)]

    def loss(model, batch):
        return model(batch["input_values"][:, None]).square().sum()

    text = (
        "factors: a field must have one length in each batch, or that of input_ids, got [8] and [4] in 'input_values'"
    )
    with refuses(text):
        run(model, sounds, loss)
    alone, pairs = (run(model, sounds, loss, batch_examples=n)["1"] for n in (1, 2))
    assert alone.n_tokens == pairs.n_tokens == 12
    assert_near(pairs.inputs, alone.inputs)


class Hearing(nn.Module):
    """Texts beside sounds, each with a layer of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.read = nn.Embedding(9, 3), nn.Linear(3, 2)
        self.begin, self.hear = nn.Identity(), nn.Linear(1, 2)

    def forward(self, batch):
        return self.read(self.embed(batch.input_ids + batch["token_type_ids"])), self.hear(
            self.begin(batch["input_values"][..., None])
        )


def heard(model, batch):
    text, sound = model(batch)
    if batch.mask is not None:
        text = text * batch.mask[..., None]
    kept = torch.arange(sound.shape[1]) < batch["n"][:, None]  # what a model's own mask does
    return (text.sum((1, 2)) * (sound * kept[..., None]).square().sum((1, 2))).sum()


@pytest.mark.parametrize("lengths", [(3, 3, 3, 3), (3, 2, 3, 2)], ids=["of one length", "padded"])
def test_sounds_beside_texts_are_not_padded_either(lengths):
    """Whether texts are padded has nothing to do with it."""
    examples = [
        {"input_ids": [1 + k] * n, "token_type_ids": [0] * n, "input_values": torch.randn(m), "n": m}
        for k, (n, m) in enumerate(zip(lengths, (8, 8, 4, 4), strict=True))
    ]
    model = Hearing()
    with refuses("factors: a field must have one length in each batch, or that of input_ids, got [8] and [4] in 'inp"):
        tlfast.factors(model, examples, ["hear"], loss=heard, embedding="begin")
    alone = tlfast.factors(model, examples, ["hear"], loss=heard, embedding="begin", batch_examples=1)["hear"]
    sounds = torch.cat([example["input_values"] for example in examples]).double()
    assert alone.n_tokens == len(sounds) == 24
    assert_near(alone.inputs, sounds.square().sum().view(1, 1))
    alike = [{**one, "input_values": torch.ones(4), "n": 4} for one in examples]
    of_text = tlfast.factors(model, alike, ["read"], loss=heard)
    assert of_text["read"].n_tokens == sum(lengths)


def test_sums_are_of_layers_with_factors(backend):
    engine = pick_backend("capture", backend, {"cpu"})
    more = (None, torch.ones(2, 3), 1.0, 0, -1, (1, 0.0), None, (None, None, None), ())
    sums = engine.FactorSums("products")
    with refuses(
        "capture: sums must be there, of a linear layer without heads or a convolution without groups, got another."
    ):
        engine.Weight("embedding", sums, False, *more)
    with refuses("capture: kind must be one of products, squares, got 'rows'."):
        engine.FactorSums("rows")


def broken():
    def loss(model, batch):
        return model(batch["x"]).sum() * torch.tensor(3e38)

    return loss


LAYERS_ONLY = "factors: points must be linear layers, or convolutions without groups, got "


def test_what_is_refused():
    model, examples = language_model(), texts(3)
    made = tlfast.factors(model, examples, "1")
    for points, given, text, kind in (
        ("1", {"kinds": ()}, "factors: kinds must name some of kfac, ekfac, adam, got none.", ValueError),
        ("1", {"kinds": "shampoo"}, "factors: kinds must be one of kfac, ekfac, adam", ValueError),
        ("1", {"kinds": "ekfac"}, 'factors: kinds must have "kfac" beside "ekfac" without a basis', ValueError),
        ("1", {"basis": made}, 'factors: basis must be left out unless kinds has "ekfac"', ValueError),
        ("1", {"kinds": "ekfac", "basis": made}, "factors: basis must have eigenvectors, got none.", ValueError),
        ("1", {"kinds": "ekfac", "basis": 3}, "factors: basis must be Factors, got int.", TypeError),
        ("1", {"kinds": "ekfac", "basis": made.eigen(), "bias": True},
         "factors: basis must be of [150, 7] at 1, got [150, 6].", ValueError),
        ("3", {"kinds": "ekfac", "basis": made.eigen()}, "factors: basis must have the layer 3, got 1.", ValueError),
        ("0", {}, LAYERS_ONLY + "0 (Embedding). Name", ValueError),
        (["0", "1*", "2"], {}, LAYERS_ONLY + "0 (Embedding), 2 (GELU). Name", ValueError),
        (lambda name: name in "02", {}, LAYERS_ONLY + "0 (Embedding). Name", ValueError),
        (tlfast.Spec("1"), {}, "factors: points must be names, a glob or modules, got a Spec.", TypeError),
        ("1", {"calls": "sum"}, "factors: settings must be among bias, ", TypeError),
    ):  # fmt: skip
        with refuses(text, kind):
            tlfast.factors(model, examples, points, **given)
    with refuses("factors: sums at 1 must be finite, got NaN or infinity.", FloatingPointError):
        run(linear(2, 2, torch.float32), [{"x": torch.ones(2)}], broken())


def test_what_factors_refuse(tmp_path):
    model, examples = language_model(), texts(3)
    kfac = tlfast.factors(model, examples, "1")
    eigen, bias = kfac.eigen(), tlfast.factors(model, examples, "1", bias=True)
    query = torch.zeros(WIDE, 6)
    with refuses("Factors.precondition: the factors must have eigenvectors, got none."):
        kfac.precondition({"1": query})
    with refuses("Factors.precondition at 1: a gradient must be [..., 150, 6], got [6, 150]."):
        eigen.precondition({"1": query.T})
    with refuses("Factors.precondition: damping must be a number that isn't negative, got -1."):
        eigen.precondition({"1": query}, damping=-1)
    with refuses("Factors.precondition at 1: damping must make each eigenvalue positive, got a zero."):
        Factors(eigen.kinds, {"1": eigen["1"].merged(eigen["1"])}).precondition({"1": query}, damping=0)
    with refuses('"Factors: a name must be one of 1, got ', KeyError):
        eigen.precondition({"2": query})
    with refuses("Factors: eigenvalues of '1' must be of the kinds that were asked for", AttributeError):
        _ = kfac["1"].eigenvalues
    with refuses("Factors: the basis of '1' must have been made, got none.", AttributeError):
        _ = kfac["1"].kfac_eigenvalues
    with refuses("Factors: the factors must have no eigenvectors yet, got some."):
        eigen.eigen()
    with refuses('Factors: the factors must have the kind "kfac" for eigenvectors, got adam.'):
        tlfast.factors(model, examples, "1", kinds="adam").eigen()
    before = kfac["1"].inputs.clone()
    with refuses("Factors: identity must be "):
        kfac.merge(bias)
    with refuses("Factors: kinds must be ('kfac',) in both parts, got ('adam',)."):
        kfac.merge(tlfast.factors(model, examples, "1", kinds="adam"))
    with refuses("Factors: the eigenvectors of 1 must be the same in both parts, got others."):
        kfac.merge(eigen)
    with refuses("Factors: the factors must have no eigenvectors where sums of products are merged, got some."):
        eigen.merge(eigen)
    bias.identity = kfac.identity
    with refuses("Factors: modules must be the same in both parts"):
        kfac.merge(bias)
    assert torch.equal(kfac["1"].inputs, before)
    kfac.save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    middle = len(whole) // 2
    for damaged in (b"PK", whole[:middle], whole[:middle] + b"damaged" + whole[middle + 7 :]):
        (tmp_path / "other.npz").write_bytes(damaged)
        with refuses("Factors: path must be a file that Factors.save wrote"):
            Factors.load(tmp_path / "other.npz")
