"""TransformerLens with the adapter of docs/hosts.md computes what it computed before."""

from __future__ import annotations

import pytest
import torch
from host_adapter import adapter, adopt, counting
from lens_models import tokens

import tlfast
from tlfast.transformer_lens.compatibility import registered_hooks
from tlfast.transformer_lens.library import hook_point_type

pytestmark = pytest.mark.skipif(
    registered_hooks() != "full" or not tlfast.backend().startswith("native"),
    reason="hooks that PyTorch or native code doesn't call natively",
)


def hooked_run(model):
    """What hooks on some points see, and the gradients of the parameters."""
    seen = {}

    def keep(grad, hook):
        seen[hook.name] = grad.clone()

    names = [name for name in model.hook_dict if name.endswith(("hook_resid_post", "hook_attn_out"))]
    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        model.zero_grad()
        model(tokens(), return_type="loss").backward()
    return seen, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    for got, wanted in zip(one, other, strict=True):
        assert got.keys() == wanted.keys()
        assert got
        assert all(torch.equal(got[name], wanted[name]) for name in got)


def test_transformer_lens(model, monkeypatch):
    wanted, made = hooked_run(model), adapter()
    hooked = counting(made)
    adopt(monkeypatch, "transformer_lens", made)
    same(hooked_run(model), wanted)
    assert len(hooked) >= 2
    point, x = hook_point_type()(), torch.ones(2, requires_grad=True)
    point.name = "point"
    point.add_hook(lambda grad, hook: None, dir="bwd")
    node = point(x).grad_fn
    assert node.name() == "BackwardHookFunctionBackward" != type(node).__name__
    monkeypatch.setattr(made, "native_hooks", lambda: None)
    same(hooked_run(model), wanted)
