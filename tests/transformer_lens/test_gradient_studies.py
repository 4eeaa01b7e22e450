"""Saliency, integrated gradients and the factors of MLPs on TransformerLens' models; the factors are its own."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch
from lens_models import BUILDER, N_LAYERS, gpt2_bridge, tokens

from tlfast.recipes import backward_lens, integrated_gradients, saliency


def last(logits, batch):
    return logits[:, -1, 3]


def test_saliency_and_integrated_gradients(model):
    given = tokens()
    found = saliency(model, given, last)
    embed = model.embed
    seen = []
    hook = embed.register_forward_hook(lambda module, args, out: seen.append(out.detach().requires_grad_()) or seen[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = model(given)[:, -1, 3]
    hook.remove()
    (grad,) = torch.autograd.grad(value.sum(), seen[0])
    terms = seen[0].detach() * grad
    bound = 64 * torch.finfo(torch.float32).eps * terms.abs().sum(2)
    assert ((torch.stack(found.scores) - terms.sum(2)).abs() <= bound + 1e-7).all()
    paths = integrated_gradients(model, given, last, 5, 24)
    assert paths.delta.abs().max() < 1e-4 * paths.values.abs().max()


try:
    theirs = import_module("transformer_lens.tools.analysis.backward_lens")
except ImportError:
    theirs = None


@pytest.mark.skipif(BUILDER is None, reason="this TransformerLens has no bridge of 3.3 or later")
def test_factors_of_a_bridge(monkeypatch):
    bridge, given = gpt2_bridge(), tokens(1)
    target = 4

    def loss(logits, batch):
        return torch.nn.functional.cross_entropy(logits[:, -1], torch.tensor([target]), reduction="none")

    found = backward_lens(bridge, given, loss)
    assert len(found.factors) == 2 * N_LAYERS
    modules = dict(bridge.named_modules())
    logits = bridge(given)
    loss(logits, None).sum().backward()
    for name, factors in found.factors.items():
        truth = modules[name].original_component.weight.grad.T  # of a Conv1D
        assert torch.allclose(factors.weight_gradient(0), truth, rtol=1e-3, atol=1e-6)
    if theirs is None:
        return
    bridge.zero_grad()
    capture = theirs._capture_gpt2_mlp_gradient_factors
    monkeypatch.setattr(bridge, "tokenizer", object())
    monkeypatch.setattr(bridge, "to_tokens", lambda text, **more: torch.tensor([[target]]) if text == "t" else given)
    result = capture(bridge, "prompt", "t", list(range(N_LAYERS)))
    ours = iter(found.factors.values())
    for layer in result.layers:
        for part in (layer.input_projection, layer.output_projection):
            factors = next(ours)
            assert torch.allclose(factors.inputs[0], part.forward_inputs, atol=1e-6)
            assert torch.allclose(factors.output_gradients[0], part.output_gradients, atol=1e-6)
