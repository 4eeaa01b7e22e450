"""Attribution patching: products of autograd's gradients in float64, patches of a linear model, what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from stream_model import HEADS, WIDTH, Stream, difference, pairs
from tiny_models import N_TOKENS, tiny_model
from torch import nn

from tlfast.recipes import attribution_patching, native_forms

POINTS = {
    "gpt2": ("transformer.h.*", "transformer.h.*.attn.c_proj", 2),
    "llama": ("model.layers.*", "model.layers.*.self_attn.o_proj", 4),
}


def prompts(n=5, length=7):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(N_TOKENS, (n, length), generator=draw) for _ in range(2)]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def seen(model, names, side, inputs, metric=None):
    """Of each module the activation, and its gradient where there is a metric, as autograd has them."""
    acts = {}

    def keep(name, tensor):
        acts[name] = tensor
        if metric is not None:
            tensor.retain_grad()

    handles = []
    for name in names:
        module = model.get_submodule(name)
        if side == "input":
            hook = module.register_forward_pre_hook(lambda module, args, name=name: keep(name, args[0]))
        else:
            hook = module.register_forward_hook(lambda module, args, output, name=name: keep(name, first(output)))
        handles.append(hook)
    output = model(**inputs).logits
    for handle in handles:
        handle.remove()
    if metric is None:
        return {name: (act.detach(), None) for name, act in acts.items()}
    metric(output).sum().backward()
    model.zero_grad()
    return {name: (act.detach(), act.grad) for name, act in acts.items()}


def products(model, names, side, clean, corrupted, metric):
    """(gradient of the corrupted run) x (clean - corrupted), elementwise in float64."""
    one, other = seen(model, names, side, clean), seen(model, names, side, corrupted, metric)
    return {name: other[name][1].double() * (one[name][0].double() - other[name][0].double()) for name in other}


def close(got, terms, dims, model_dtype=torch.float32):
    """Within what sums of so many terms in float32 may be off, and gradients of batches of another size."""
    truth, size = terms.sum(dims), terms.abs().sum(dims)
    eps = torch.finfo(torch.float32).eps * terms.shape[-1] + 64 * torch.finfo(model_dtype).eps
    return got.shape == truth.shape and bool(((got.double() - truth).abs() <= eps * size.max()).all())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scores_are_the_plain_formula_on_hugging_face_models(kind):
    model, (clean, corrupted) = tiny_model(kind), prompts()
    model.eval()
    residual, projection, heads = POINTS[kind]
    given = ({"input_ids": clean}, {"input_ids": corrupted})
    for points, side, granularity, options, dims in (
        (residual, "output", "node", {}, (1, 2)),
        (residual, "output", "position", {"batch_size": None}, (2,)),
        (projection, "input", "head", {"batch_size": 2}, (1, 3)),
        (projection, "input", "head", {"per_position": True}, (3,)),
    ):
        found = attribution_patching(model, *given, difference, points, granularity, **options)
        truth = products(model, found.scores, side, *given, difference)
        for name, scores in found.scores.items():
            terms = truth[name].unflatten(2, (heads, -1)) if granularity == "head" else truth[name]
            assert close(scores, terms, dims), (name, granularity)
    assert torch.allclose(found.metric, difference(model(corrupted).logits).detach(), rtol=1e-4, atol=1e-6)
    if kind == "llama":  # two heads of keys, shared by four of queries
        keys = attribution_patching(model, *given, difference, "model.layers.*.self_attn.k_proj", "head", side="output")
        assert {scores.shape for scores in keys.scores.values()} == {(5, 2)}


@pytest.mark.parametrize("padded", ["left", "right"])
def test_padding_is_left_out_of_all_sums(padded):
    model, (clean, corrupted) = tiny_model().eval(), prompts(3, 6)
    mask = torch.ones(3, 8, dtype=torch.long)
    cut = slice(0, 2) if padded == "left" else slice(6, 8)
    mask[:, cut] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)

    def batch(tokens, pad):
        full = torch.full((3, 8), pad)
        full[mask.bool()] = tokens.flatten()
        return {"input_ids": full, "attention_mask": mask, "position_ids": position}

    def metric(logits, pairs):
        last = logits[torch.arange(len(pairs)), pairs.mask.cumsum(1).argmax(1)]
        return last[:, 0] - last[:, 1]

    alone = attribution_patching(model, clean, corrupted, difference, "transformer.h.*")
    for options in ({}, {"batch_size": 1}, None):
        given = [batch(clean, 5), batch(corrupted, 9)]
        if options is None:  # a tokenizer gives no positions; GPT-2 by itself would count the padding
            given = [{key: value for key, value in side.items() if key != "position_ids"} for side in given]
        found = attribution_patching(model, *given, metric, "transformer.h.*", **(options or {}))
        for name in alone.scores:
            assert torch.allclose(found[name], alone[name], rtol=1e-4, atol=1e-6), name
    positions = attribution_patching(model, batch(clean, 5), batch(corrupted, 9), metric, "transformer.h.0", "position")
    assert (positions["transformer.h.0"][:, cut] == 0).all()
    other = dict(batch(corrupted, 9), attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="attention_mask must be the same in clean and corrupted"):
        attribution_patching(model, batch(clean, 5), other, metric, "transformer.h.0")


def test_a_linear_model_is_patched_exactly():
    model, (clean, corrupted) = Stream(), pairs()
    place = model.blocks[0].hook_mlp_out
    found = attribution_patching(model, clean, corrupted, difference, "blocks.0.hook_mlp_out", "position")
    kept = []
    handle = place.register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        model(clean)
        handle.remove()
        base = difference(model(corrupted))
        for position in range(clean.shape[1]):

            def patch(module, args, output, position=position):
                output = output.clone()
                output[:, position] = kept[0][:, position]
                return output

            with place.register_forward_hook(patch):
                effect = difference(model(corrupted)) - base
            assert torch.allclose(found["blocks.0.hook_mlp_out"][:, position], effect, atol=2e-5)
    heads = attribution_patching(model, clean, corrupted, difference, "blocks.*.attn.hook_z", "head")
    assert {scores.shape for scores in heads.scores.values()} == {(5, HEADS)}


def norm():
    return nn.LayerNorm(WIDTH)


class Sae(nn.Module):
    """More latents than dimensions; encodes with a ReLU."""

    def __init__(self, width, n_latents):
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.up, self.down = (
            nn.Parameter(torch.randn(*s, generator=draw)) for s in ((width, n_latents), (n_latents, width))
        )

    def encode(self, x):
        return torch.relu(x @ self.up)

    def decode(self, codes):
        return codes @ self.down + 1.0


def test_latents_and_what_they_do_not_explain_add_up_to_the_node():
    model, (clean, corrupted), name = tiny_model().eval(), prompts(), "transformer.h.0"
    sae = Sae(16, 40)
    found = attribution_patching(
        model, clean, corrupted, difference, {name: sae}, "latent", batch_size=2, per_position=True
    )
    node = attribution_patching(model, clean, corrupted, difference, name, "position")[name]
    assert found[name].shape == (5, 7, 40)
    assert found[f"{name}:error"].shape == (5, 7)
    assert torch.allclose(
        found[name].sum(2) + found[f"{name}:error"], node, rtol=1e-3, atol=1e-5 * float(node.abs().max())
    )
    runs = [
        seen(model, [name], "output", {"input_ids": tokens}, metric)
        for tokens, metric in ((clean, None), (corrupted, difference))
    ]
    delta = sae.encode(runs[0][name][0]) - sae.encode(runs[1][name][0])
    truth = (delta * (runs[1][name][1] @ sae.down.T)).detach()
    assert torch.allclose(found[name], truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max()))
    summed = attribution_patching(model, clean, corrupted, difference, {name: sae}, "latent")[name]
    assert torch.allclose(summed, truth.sum(1), rtol=1e-3, atol=1e-4 * float(truth.abs().max()))
    assert all(parameter.grad is None for parameter in [*sae.parameters(), *model.parameters()])


def test_sixteen_bits_are_summed_in_float32():
    model, (clean, corrupted) = tiny_model(dtype=torch.bfloat16).eval(), prompts(2, 60)
    found = attribution_patching(model, clean, corrupted, difference, "transformer.h.0", batch_size=None)
    given = ({"input_ids": clean}, {"input_ids": corrupted})
    terms = products(model, ["transformer.h.0"], "output", *given, difference)["transformer.h.0"]
    assert found["transformer.h.0"].dtype == torch.float32
    # The same gradients, so only the sums are off: a sum in bfloat16 would be off by a thousand times as much.
    bound = terms[0].numel() * torch.finfo(torch.float32).eps * terms.abs().sum((1, 2))
    assert ((found["transformer.h.0"].double() - terms.sum((1, 2))).abs() <= bound).all()


def test_the_model_is_as_before():
    model, (clean, corrupted) = tiny_model().train(), prompts()
    with pytest.raises(ZeroDivisionError):
        attribution_patching(model, clean, corrupted, lambda logits, pairs: 1 / 0, "transformer.h.*.mlp")
    attribution_patching(model, clean, corrupted, difference, "transformer.h.*.mlp")
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_change_nothing(reentrant):
    model, (clean, corrupted) = Stream(linear=False, norm=norm), pairs()
    plain = attribution_patching(model, clean, corrupted, difference, "blocks.*.hook_*")
    model.reentrant = reentrant
    again = attribution_patching(model, clean, corrupted, difference, "blocks.*.hook_*")
    assert plain.scores.keys() == again.scores.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain.scores)


def test_one_number_in_one_pass_and_the_indices_of_pairs_in_several():
    model, (clean, corrupted) = tiny_model().eval(), prompts()
    answers, seen_by_metric = torch.arange(5), []

    def metric(logits, pairs):
        seen_by_metric.append(pairs.index.tolist())
        return logits[torch.arange(len(pairs)), -1, answers[pairs.index]]

    rows = attribution_patching(model, clean, corrupted, metric, "transformer.h.0", batch_size=2)
    assert seen_by_metric == [[0, 1], [2, 3], [4]]
    mean = attribution_patching(
        model, clean, corrupted, lambda logits, pairs: metric(logits, pairs).mean(), "transformer.h.0"
    )
    assert mean.metric.shape == ()
    assert torch.allclose(mean["transformer.h.0"] * 5, rows["transformer.h.0"], rtol=1e-4, atol=1e-6)
    ((name, index, score),) = rows.top(1)
    assert (name, index) == ("transformer.h.0", ())
    assert score == pytest.approx(float(rows[name].mean()), rel=1e-5)


def first_logit(logits, pairs):
    return logits[:, 0, 0]


TOKENS, LATENT = torch.zeros(5, 7, dtype=torch.long), dict(granularity="latent")
TWICE = nn.Sequential(nn.Embedding(N_TOKENS, 4), *[nn.Linear(4, 4)] * 2)
THREE_HEADS = dict(points="transformer.h.*.attn.c_proj", granularity="head", heads=3)
# What is changed of a call that is right, and what is then said.
WRONG = {
    "lengths": (dict(corrupted=TOKENS[:, :5]), "corrupted must have the shapes of clean"),
    "numbers": (dict(clean={"ids": TOKENS, "more": TOKENS[:2]}), "clean must hold one or more examples, as many"),
    "text": (dict(clean="text"), "clean must be a tensor, or a mapping of tensors, got str"),
    "granularity": (dict(granularity="neuron"), "granularity must be one of node, head, position, latent"),
    "positions of nodes": (dict(per_position=True), 'per_position must go with "head" or "latent"'),
    "heads of nodes": (dict(heads=3), 'heads must go with granularity="head"'),
    "heads that don't fit": (THREE_HEADS, "must be [pairs, P, 3 heads, d], or flat [pairs, P, 3 x d]"),
    "no SAE": (LATENT, "points must be a mapping of names to SAEs"),
    "not an SAE": (dict(points={"transformer.h.0": 3}, **LATENT), "must have encode and decode, got int"),
    "batch_size": (dict(batch_size=0), "batch_size must be a positive number of pairs, or None"),
    "side": (dict(side="nowhere"), "side must be one of output, input"),
    "mean of a part": (
        dict(metric=lambda logits, pairs: logits.mean(), batch_size=2),
        "metric must return one value for each pair where pairs go in several passes",
    ),
    "its shape": (dict(metric=lambda logits, pairs: logits[0]), "metric must return one value for each of the 5 pairs"),
    "a float": (dict(metric=lambda logits, pairs: 1.0), "metric must return a floating-point tensor, got float"),
    "no graph": (dict(metric=lambda logits, pairs: logits[:, 0, 0].detach()), "metric must have a gradient"),
    "called twice": (
        dict(model=TWICE, points="1", metric=first_logit),
        "a point must be called once in a forward, got 1, 2 times",
    ),
    "no heads there": (
        dict(points="transformer.h.0.attn", granularity="head"),
        "what an output projection is given, or queries, keys and values, got transformer.h.0.attn (input)",
    ),
    "a stream": (dict(points="transformer.h.0", granularity="head", side="output"), "points must be a point of heads"),
    "an MLP": (dict(points="transformer.h.0.mlp.c_proj", granularity="head"), "points must be a point of heads"),
    "no heads": (dict(points="transformer.h.0.attn.c_proj", granularity="head", heads=0), "heads must be a positive"),
    "one prompt": (
        dict(clean=TOKENS[0], corrupted=TOKENS[0]),
        "clean must be [pairs, P], of a position or more, got [7]",
    ),
    "no tokens": (
        dict(clean=TOKENS[:, :0], corrupted=TOKENS[:, :0]),
        "clean must be [pairs, P], of a position or more",
    ),
    "a name": (dict(model="gpt2"), "model must be an nn.Module, got str"),
    "no point": (dict(points="transformer.z"), "points must match a module, got 'transformer.z'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_an_error(case):
    given = dict(model=tiny_model(), clean=TOKENS, corrupted=TOKENS, metric=difference, points="transformer.h.0")
    changed, text = WRONG[case]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(text)) as error:
        attribution_patching(**{**given, **changed})
    assert str(error.value).startswith("attribution_patching: ")


def test_activations_that_are_written_out_run_as_torchs_own():
    """But not one that somebody has put a rule in the place of, nor in 16 bits, where each operation rounds."""
    model, x = tiny_model(), torch.linspace(-4, 4, 101)
    first, second = (block.mlp.act for block in model.transformer.h)
    written, narrow = first(x), first(x.bfloat16())
    second.forward = lambda x: 2 * x
    with native_forms.native_forms(model, []):
        assert type(first(x.clone().requires_grad_()).grad_fn).__name__ == "GeluBackward0"
        assert torch.allclose(first(x), written, atol=1e-6)
        assert torch.equal(first(x.bfloat16()), narrow)
        assert torch.equal(second(x), 2 * x)
    assert "forward" not in vars(first)
    assert torch.equal(first(x), written)
    kind, before = type(first), type(first).forward
    try:
        kind.forward = lambda self, x: 3 * x  # as rules of relevance do
        with native_forms.native_forms(model, []):
            assert torch.equal(first(x), 3 * x)
    finally:
        kind.forward = before


def test_a_recipe_is_not_called_in_inference_mode():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"must be made outside of torch\.inference_mode"):
        attribution_patching(tiny_model(), TOKENS, TOKENS, difference, "transformer.h.0")


def test_a_point_that_the_metric_does_not_reach_is_an_error():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.used, self.aside = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, tokens):
            x = self.embed(tokens)
            self.aside(x)
            return self.used(x)

    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="every point must be reached by the metric's gradient, got aside"):
        attribution_patching(Aside(), tokens, tokens, first_logit, ["aside", "used"])
