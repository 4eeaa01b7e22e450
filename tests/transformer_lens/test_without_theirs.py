"""Right also where TransformerLens' own bridges cache no gradients or leave backward hooks behind: 3.0 to 3.7."""

from __future__ import annotations

import pytest
import torch
from lens_models import CACHING, LEAKING, MODELS, state, tokens

import tlfast.transformer_lens as lens

LACKING = sorted(MODELS.keys() - CACHING.keys())
lacking = pytest.mark.skipif(not LACKING, reason="every model of this TransformerLens caches gradients")
leaking = pytest.mark.skipif(not LEAKING, reason="no model of this TransformerLens leaves backward hooks behind")


def at_points(model):
    """The state of the hook points alone: what else a forward leaves in a bridge is its own affair."""
    return state(torch.nn.ModuleList(model.hook_dict.values()))[1:]


def resid(model):
    return next(name for name in model.hook_dict if name.endswith("0.hook_resid_post"))


def step(model):
    loss = model(tokens(), return_type="loss")
    loss.backward()
    return loss


def full_backward_hooks(model, names=None):
    """The gradients that hooks of TransformerLens see, by point; of several calls, the last."""
    points = {id(point): point for name, point in model.hook_dict.items() if names is None or name in names}
    seen = {}

    def keep(grad, hook):
        seen[id(hook)] = grad.clone()

    for point in points.values():
        point.add_hook(keep, dir="bwd")
    step(model)
    for point in points.values():
        point.remove_hooks("bwd")
    return seen


def differing(model, cache, seen):
    """Names whose gradient is another than the hooks saw, or isn't there."""
    expected = {name + "_grad": seen[id(point)] for name, point in model.hook_dict.items() if id(point) in seen}
    found = {name: grad for name, grad in cache.items() if name.endswith("_grad")}
    assert len(expected) >= 30
    return sorted(expected.keys() ^ found.keys()) + [
        name for name in expected.keys() & found.keys() if not torch.equal(expected[name], found[name])
    ]


def test_all_gradients_are_those_of_full_backward_hooks(model, backend):
    seen = full_backward_hooks(model)
    before = at_points(model)
    options = dict(return_type="loss", incl_bwd=True, calls="last", backend=backend)
    _, cache = lens.run_with_cache(model, tokens(), **options)
    assert differing(model, dict(cache.items()), seen) == []
    assert at_points(model) == before
    name = resid(model) + "_grad"
    assert differing(model, {**cache, name: 2 * cache[name]}, seen) == [name]


def test_gradients_of_the_residual_stream_are_those_of_autograd(model, backend):
    names = [name for name in model.hook_dict if name.endswith("hook_resid_post")]
    kept = {}

    def keep(value, hook):
        kept[id(hook)] = value * 1
        return kept[id(hook)]

    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        loss = model(tokens(), return_type="loss")
    grads = torch.autograd.grad(loss, [kept[id(model.hook_dict[name])] for name in names])
    with lens.capture(model, names, rows=2, backend=backend) as cap:
        step(model)
    metric = lens.cache_fwd_and_bwd(
        model, tokens(), lambda value: value, names, return_type="loss", backend=backend
    )[2]  # fmt: skip
    for name, grad in zip(names, grads, strict=True):
        assert torch.equal(cap[name], grad)
        assert torch.equal(metric[name], grad)


@pytest.mark.parametrize("pos_slice", [(1, 4), [0, 5]])
def test_a_slice_is_one_of_positions_at_heads_too(model, pos_slice):
    _, whole = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True)
    _, sliced = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, pos_slice=pos_slice)
    heads = {id(model.hook_dict[name]) for name in model.hook_dict if name.endswith(("hook_q", "hook_v", "hook_z"))}
    names = [name for name, point in model.hook_dict.items() if id(point) in heads and name in whole]
    assert len(names) >= 4
    wanted = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    for name in (*names, *(name + "_grad" for name in names)):
        assert torch.equal(sliced[name], whole[name][:, wanted])


def test_nothing_is_left_and_no_other_hook_is_lost(model, backend):
    name, seen = resid(model), []
    point = model.hook_dict[name]
    point.add_hook(lambda value, hook: seen.append("fwd"), dir="fwd")
    point.add_hook(lambda grad, hook: seen.append("bwd"), dir="bwd")
    before = at_points(model)
    lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, backend=backend)
    with lens.capture(model, name, rows=8, backend=backend) as cap:
        step(model)
    with lens.accelerate(model):
        model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter="hook_embed")
    assert at_points(model) == before
    seen.clear()
    step(model)
    assert seen == ["fwd", "bwd"]
    assert cap.rows == 2


@leaking
@pytest.mark.parametrize("kind", LEAKING)
def test_the_hooks_that_theirs_leave_behind(kind):
    model, calls = LEAKING[kind](), []
    with model.hooks(bwd_hooks=[(resid(model), lambda grad, hook: calls.append(1))]):
        step(model)
    model.reset_hooks()
    step(model)
    assert len(calls) == 2  # it outlived its context, and the reset
    seen = full_backward_hooks(model, [resid(model)])  # which takes the one left behind away
    with lens.capture(model, resid(model), rows=8) as cap:
        step(model)
    step(model)
    assert cap.rows == 2
    assert torch.equal(cap[resid(model)], seen[id(model.hook_dict[resid(model)])])
    assert not any(point.bwd_hooks for point in model.hook_dict.values())


@lacking
@pytest.mark.parametrize("kind", LACKING)
def test_the_gradients_that_theirs_lacks(kind):
    model = MODELS[kind]()
    seen = full_backward_hooks(model)
    before = at_points(model)
    model.zero_grad()
    _, cache = model.run_with_cache(tokens(), return_type="loss", incl_bwd=True)
    assert not [name for name in cache if name.endswith("_grad")]
    assert all(param.grad is None for param in model.parameters())
    plain = {name: kept for name, kept in cache.items() if isinstance(kept, torch.Tensor)}
    lens.install()
    try:
        _, cache = model.run_with_cache(tokens(), return_type="loss", incl_bwd=True)
    finally:
        lens.uninstall()
    with lens.accelerate(model):
        _, second = model.run_with_cache(tokens(), return_type="loss", incl_bwd=True)
        _, forward = model.run_with_cache(tokens(), return_type="loss")
        one = model.run_with_cache(tokens(batch=1), return_type="loss", incl_bwd=True, remove_batch_dim=True)[1]
        with pytest.raises(ValueError, match=r"reset_hooks_end must be left out with incl_bwd=True, got False"):
            model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, reset_hooks_end=False)
    assert differing(model, dict(cache.items()), seen) == differing(model, dict(second.items()), seen) == []
    assert all(param.grad is not None for name, param in model.named_parameters() if "blocks.0" in name)
    assert forward.keys() == plain.keys()
    assert one[resid(model) + "_grad"].shape == (7, 16)
    assert at_points(model) == before
