"""A capture inside rules that TransformerLens' hooks impose on a model: gradients as the model then has them.

The rules are those of RelP (Jafari et al., 2025), which holds scales and patterns still and halves what a gate gets.
"""

from __future__ import annotations

import pytest
import torch
from lens_models import BUILDER, N_LAYERS, gpt2_bridge, tokens

import tlfast.transformer_lens
from tlfast.recipes import attribution_patching
from tlfast.recipes.native_forms import native_norms

EPS = torch.finfo(torch.float32).eps


class Kept(torch.autograd.Function):
    """What it is given, whose gradient is taken times a ratio: the identity rule, f(x) = x * (f(x) / x held still)."""

    @staticmethod
    def forward(ctx, x, ratio):
        ctx.save_for_backward(ratio)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def held_still(value, hook):
    return value.detach()


def weighed(value, hook):
    return Kept.apply(value, torch.linspace(0.5, 1.5, value.shape[-1], dtype=value.dtype))


def halved(grad, hook):
    return (grad / 2,)


def rules(model):
    """Forward hooks and backward hooks, as `model.hooks` takes them, of the points that this model has."""
    forward = [("ln1.hook_scale", held_still), ("ln2.hook_scale", held_still), ("attn.hook_pattern", held_still)]
    forward.append(("mlp.hook_post", weighed))
    there = [(f"blocks.{i}.{name}", rule) for i in range(N_LAYERS) for name, rule in forward]
    there = [(name, rule) for name, rule in there if name in model.hook_dict]
    return {"fwd_hooks": there, "bwd_hooks": [(f"blocks.{i}.hook_mlp_out", halved) for i in range(N_LAYERS)]}


NAMES = [f"blocks.{i}.{name}" for i in range(N_LAYERS) for name in ("hook_resid_post", "attn.hook_z", "hook_resid_pre")]


def right_gradients(model, given, loss, inside):
    """What autograd has of copies at the points, under the same rules."""
    kept = {}

    def copied(name):
        def copy(value, hook):
            kept[name] = value.clone()
            return kept[name]

        return copy

    copies = [(name, copied(name)) for name in NAMES]
    with model.hooks(fwd_hooks=inside["fwd_hooks"] + copies, bwd_hooks=inside["bwd_hooks"]):
        value = loss(model(given))
    return dict(zip(kept, torch.autograd.grad(value, list(kept.values())), strict=True))


def loss(logits):
    return (logits[:, -1] * torch.linspace(-1, 1, logits.shape[-1])).sum()


def assert_close(found, right):
    torch.testing.assert_close(found, right, rtol=0, atol=64 * EPS * float(right.abs().max()))


@pytest.mark.parametrize("accelerated", [False, True])
def test_gradients_are_those_that_the_rules_make(model, accelerated):
    given, inside = tokens(), rules(model)
    plain = right_gradients(model, given, loss, {"fwd_hooks": [], "bwd_hooks": []})
    right = right_gradients(model, given, loss, inside)
    assert not torch.allclose(plain["blocks.0.hook_resid_pre"], right["blocks.0.hook_resid_pre"], rtol=0.1)

    def check():
        with model.hooks(**inside):
            with tlfast.transformer_lens.capture(model, list(right), rows=len(given)) as cap:
                loss(model(given)).backward()
            for name, grad in right.items():
                assert_close(cap[name], grad)
            _, _, grads = tlfast.transformer_lens.cache_fwd_and_bwd(model, given, loss, list(right))
        for name, grad in right.items():
            assert_close(grads[name], grad)

    if accelerated:
        with tlfast.transformer_lens.accelerate(model):
            check()
    else:
        check()


def test_attribution_patching_is_that_of_the_rules(model):
    clean, corrupted, inside, name = tokens(), tokens(seed=2), rules(model), "blocks.0.hook_resid_post"
    kept = {}
    for key, given in (("clean", clean), ("corrupted", corrupted)):
        with model.hooks(fwd_hooks=[(name, lambda value, hook, key=key: kept.update({key: value.detach()}))]):
            model(given)
    grad = right_gradients(model, corrupted, loss, inside)[name]
    with model.hooks(**inside):
        found = attribution_patching(model, clean, corrupted, lambda logits, pairs: logits[:, -1] @ torch.linspace(
            -1, 1, logits.shape[-1]), name, "position")  # fmt: skip
    assert_close(found[name], (grad * (kept["clean"] - kept["corrupted"])).sum(-1))


@pytest.mark.skipif(BUILDER is None, reason="this TransformerLens makes no bridge of a model that is loaded")
def test_a_norm_with_a_rule_of_its_own_keeps_its_path():
    """Later versions than 4.3.0 count the rules that are in force on a component; its norms have paths without them."""
    bridge = gpt2_bridge()
    norms = [m for m in bridge.modules() if getattr(m, "use_native_layernorm_autograd", None) is False]
    for norm, count in zip(norms, (1, 0), strict=False):
        norm._relevance_rule_refcounts = {"normalization": count}
    with native_norms(bridge):
        switches = [norm.use_native_layernorm_autograd for norm in norms]
    assert switches == [False] + [True] * (len(norms) - 1) or not norms
