"""Edges: exact on a linear model, as in a split stream, adding up to their nodes; and what isn't additive."""

from __future__ import annotations

import re

import pytest
import torch
from stream_model import HEADS, LAYERS, WIDTH, Stream, difference, pairs
from torch import nn

from tlfast.recipes import attribution_patching, eap, norms


def layer_norm():
    return nn.LayerNorm(WIDTH, eps=1e-3)


def rms_norm():
    return nn.RMSNorm(WIDTH, eps=1e-3)


class Odd(nn.Module):
    """A norm that no formula is known of."""

    def forward(self, x):
        return x / (1 + x.abs().sum(-1, keepdim=True))


MODELS = {
    "layer norm": dict(norm=layer_norm),
    "rms norm": dict(norm=rms_norm),
    "shared keys": dict(norm=layer_norm, n_kv=1),
    "unknown norm": dict(norm=Odd),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("parallel", [False, True])
def test_edges_of_a_node_add_up_to_its_score(kind, parallel):
    model, (clean, corrupted) = Stream(linear=False, **MODELS[kind]), pairs()
    for block in model.blocks:
        block.parallel = model.cfg.parallel_attn_mlp = parallel
    found = eap(model, clean, corrupted, difference, batch_size=2)
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)]
    nodes = attribution_patching(model, clean, corrupted, difference, ["blocks.0.hook_resid_pre", *names]).mean()
    heads = attribution_patching(model, clean, corrupted, difference, "blocks.*.attn.hook_z", "head").mean()
    truth = {"input": nodes["blocks.0.hook_resid_pre"]}
    truth |= {f"m{layer}": nodes[name] for layer, name in enumerate(names)}
    truth |= {
        f"a{layer}.h{head}": heads[f"blocks.{layer}.attn.hook_z"][head]
        for layer in range(LAYERS)
        for head in range(HEADS)
    }
    assert found.nodes().keys() == truth.keys()
    size = float(found.scores.abs().max())
    assert all(abs(float(score - truth[name])) <= 1e-5 * size for name, score in found.nodes().items())
    assert (found.scores[~found.exists] == 0).all()
    assert bool(found.exists[found.writers.index("a0.h0"), found.readers.index("m0")]) is not parallel
    n_kv = model.cfg.n_key_value_heads
    assert len(found.readers) == LAYERS * (HEADS + 2 * n_kv + 1) + 1


@pytest.mark.parametrize("norm", [layer_norm, rms_norm, Odd])
def test_each_edge_is_the_product_with_the_gradient_at_its_own_copy_of_the_stream(norm, monkeypatch):
    if norm is not Odd:  # which has no formula; the others must not need autograd again
        pulled = norms.Norm.pulled_back
        calls = []
        monkeypatch.setattr(norms.Norm, "pulled_back", lambda self, *given: calls.append(1) or pulled(self, *given))
    model, (clean, corrupted) = Stream(linear=False, norm=norm), pairs(3)
    found = eap(model, clean, corrupted, difference, per_position=True, batch_size=1)
    if norm is not Odd:
        assert len(calls) == 3 * LAYERS  # in the first pass, to learn the formula
    block, attention = model.blocks[1], model.blocks[1].attn
    kept = {}
    handles = [
        model.blocks[0].hook_mlp_out.register_forward_hook(
            lambda m, a, out: kept.setdefault("m0", []).append(out.detach())
        ),
        block.hook_resid_pre.register_forward_hook(lambda m, a, out: kept.setdefault("x", []).append(out.detach())),
    ]
    for tokens in (clean, corrupted):
        model(tokens)
    for handle in handles:
        handle.remove()
    # The second block once more, with a copy of the stream for the queries of each head.
    x = kept["x"][1]
    copies = [x.clone().requires_grad_() for _ in range(HEADS)]
    normed = block.ln1(x)
    queries = torch.stack([block.ln1(copy) @ attention.W_Q[head] for head, copy in enumerate(copies)], 2)
    handle = attention.hook_q.register_forward_hook(lambda m, a, out: queries)
    y = x + attention(normed)
    handle.remove()
    logits = model.unembed(model.ln_final(block.hook_resid_post(y + block.mlp(block.ln2(y)))))
    grads = torch.autograd.grad(difference(logits).sum(), copies)
    delta = kept["m0"][0] - kept["m0"][1]
    for head, grad in enumerate(grads):
        truth = (delta * grad).sum((0, 2)) / len(clean)
        assert torch.allclose(
            found["m0", f"a1.h{head}<q>"], truth, rtol=1e-4, atol=1e-5 * float(found.scores.abs().max())
        )


def test_a_linear_model_is_patched_exactly_and_positions_add_up():
    model, (clean, corrupted) = Stream(), pairs()
    found = eap(model, clean, corrupted, difference, batch_size=None)
    with torch.no_grad():
        whole = (difference(model(clean)) - difference(model(corrupted))).mean()
    assert torch.allclose(found.nodes()["input"], whole, rtol=1e-4)  # patching what the first block is given is all
    # The edge from the first MLP to the logits: its difference past the second block, at the last position.
    kept = []
    with model.blocks[0].hook_mlp_out.register_forward_hook(lambda m, a, out: kept.append(out.detach())):
        model(clean), model(corrupted)
    direct = ((kept[0] - kept[1])[:, -1] @ (model.unembed.weight[0] - model.unembed.weight[1])).mean()
    assert torch.allclose(found["m0", "logits"], direct, rtol=1e-4)
    by_position = eap(model, clean, corrupted, difference, per_position=True, batch_size=3)
    assert by_position.scores.shape == (clean.shape[1], *found.scores.shape)
    assert torch.allclose(by_position.scores.sum(0), found.scores, atol=1e-5 * float(found.scores.abs().max()))
    mean = eap(model, clean, corrupted, lambda logits, pairs: difference(logits).mean(), batch_size=None)
    assert torch.allclose(mean.scores, found.scores, rtol=1e-4, atol=1e-6)
    assert found.top(3) == [(w, r, float(found[w, r])) for w, r, _ in found.top(3)]
    assert len(found.top(10**6)) == int(found.exists.sum())
    with pytest.raises(KeyError):
        found["m1", "m0"]


def test_integrated_gradients_of_the_input_add_up_to_the_metrics_difference():
    model, (clean, corrupted) = Stream(linear=False, norm=layer_norm), pairs()
    with torch.no_grad():
        whole = float((difference(model(clean)) - difference(model(corrupted))).mean())
    apart = [
        abs(float(eap(model, clean, corrupted, difference, steps).nodes()["input"]) - whole) for steps in (1, 8, 64)
    ]
    assert apart[0] > 0.1 * abs(whole)  # or there is nothing to integrate
    assert apart[2] < 0.02 * abs(whole)
    assert apart[1] < apart[0]


def test_what_is_not_additive_is_an_error():
    clean, corrupted = pairs()
    cases = [
        (Stream(scaled=0.5), "what heads and MLPs write must add up to the residual stream"),
    ]
    model = Stream(linear=False, norm=layer_norm)
    model.blocks[1].attn.W_Q = nn.Parameter(2 * model.blocks[1].attn.W_Q.data)
    hook = model.blocks[1].attn.hook_q.register_forward_hook(lambda m, args, out: out * 0.5)
    cases.append((model, "the gradients of its readers must add up to that of the norm"))
    split = Stream()
    split.cfg.use_split_qkv_input = True
    cases.append((split, "cfg.use_split_qkv_input must be off"))
    for wrong, text in cases:
        with pytest.raises(ValueError, match=re.escape(text)):
            eap(wrong, clean, corrupted, difference)
        assert not any(m._forward_pre_hooks for m in wrong.modules())
    hook.remove()
    with pytest.raises(ValueError, match="ig_steps must be 1 or more, got 0"):
        eap(Stream(), clean, corrupted, difference, 0)
