"""What a user sees: exceptions, contexts, resets, permanent hooks, aliases, copies, moves, patches, gated points."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lens_models import MODELS, state, tokens

import tlfast
import tlfast.transformer_lens as lens


def resid(model, layer=0):
    return next(name for name in model.hook_dict if name.endswith(f"{layer}.hook_resid_post"))


def step(model):
    model(tokens(), return_type="loss").backward()


def test_an_exception_in_a_hook_comes_out_and_leaves_nothing(model, backend):
    points = torch.nn.ModuleList(model.hook_dict.values())  # an attention of a bridge leaves a hook of its own behind
    before = state(points)

    def broken(value, hook):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), model.hooks(fwd_hooks=[(resid(model), broken)]):
        lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, backend=backend)
    with pytest.raises(ZeroDivisionError):
        lens.cache_fwd_and_bwd(model, tokens(), lambda logits: logits.sum() * (1 / 0), backend=backend)
    assert state(points) == before


def test_an_exception_in_backward_comes_out(model, backend):
    def broken(grad, hook):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"), model.hooks(bwd_hooks=[(resid(model), broken)]):
        lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, backend=backend)


def test_a_patch_in_place_works_where_their_hook_raises(model, backend):
    name = resid(model)

    def patch(value, hook):
        value.mul_(2)
        return value

    with model.hooks(fwd_hooks=[(name, patch)]):
        _, cache = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, backend=backend)
    assert cache[name + "_grad"].abs().sum() > 0


def test_nested_contexts_and_a_reset_in_the_middle(model, backend):
    name = resid(model)
    with lens.capture(model, name, rows=8, backend=backend) as cap:
        step(model)
        with model.hooks(fwd_hooks=[(name, lambda value, hook: value * 1)]):
            step(model)
        model.reset_hooks()
        step(model)
    assert cap.rows == 6
    assert torch.equal(cap[name][:2], cap[name][4:])
    assert not model.hook_dict[name].bwd_hooks


def test_a_capture_removes_exactly_its_own_handle(model, backend):
    name = resid(model)
    point = model.hook_dict[name]
    point.add_hook(lambda grad, hook: None, dir="bwd")
    own = list(point.bwd_hooks)
    with lens.capture(model, name, rows=8, backend=backend):
        point.add_hook(lambda grad, hook: None, dir="bwd")
        added = point.bwd_hooks[-1]
        step(model)
    assert [id(handle) for handle in point.bwd_hooks] == [id(own[0]), id(added)]
    model.reset_hooks()


def test_names_in_every_form(model, backend):
    first, last = resid(model, 0), resid(model, 1)
    forms = (["blocks.*.hook_resid_post"], (first, last), lambda name: name in (first, last),
             [("resid_post", 0), ("resid_post", -1)], "blocks.*.hook_resid_post")  # fmt: skip
    for names_filter in forms:
        with lens.capture(model, names_filter, rows=2, reduce="mean", backend=backend) as cap:
            step(model)
        assert len(cap.names) == 2
        assert torch.equal(cap["resid_post", 1], cap["resid_post", -1])
        assert cap["resid_post", 0].shape == (2, 16)
        assert torch.equal(cap[last], cap["resid_post", 1])
    with pytest.raises(ValueError, match=r"match a hook point, got 'blocks.0.hook_resid_pst'. Nearest: blocks.0"):
        lens.capture(model, "blocks.0.hook_resid_pst", rows=2)
    with pytest.raises(KeyError, match="be one of"):
        cap["resid_pre", 0]


@pytest.mark.filterwarnings("ignore:capture. skipped points")
def test_a_filter_means_a_point_once_and_a_name_what_it_says(model, backend):
    known = model.hook_dict
    cap = lens.capture(model, lambda name: True, rows=2, backend=backend)
    assert len(cap.names) == len({id(known[name]) for name in cap.names})
    assert cap.names == lens.capture(model, None, rows=2, backend=backend).names
    names = [name for name, point in known.items() if point is known[resid(model)]]
    with lens.capture(model, names, rows=2, backend=backend) as cap:
        step(model)
    assert cap.names == names
    assert all(torch.equal(cap[name], cap[names[0]]) for name in names)


@pytest.mark.filterwarnings("ignore:capture. skipped points")
def test_gated_points_raise_by_name_and_are_skipped_by_a_filter(model):
    gated = next((name for name in model.hook_dict if name.endswith("attn.hook_result")), None)
    gated = gated or next(name for name in model.hook_dict if name.endswith("hook_mlp_in"))
    if not hasattr(model, "check_hooks_to_add"):  # a bridge before 3.8 doesn't tell: the capture finds out
        with pytest.raises(RuntimeError, match=gated), lens.capture(model, [gated, resid(model)], rows=2):
            step(model)
        return
    with pytest.raises(ValueError, match=r"be switched on"):
        lens.capture(model, gated, rows=2)
    with pytest.warns(UserWarning, match="skipped points that are switched off"):
        cap = lens.capture(model, lambda name: name in (gated, resid(model)), rows=2)
    assert cap.names == [resid(model)]


def test_conversions_are_applied(model, backend):
    converted = [name for name, point in model.hook_dict.items() if getattr(point, "hook_conversion", None)]
    for name in converted:
        _, cache = model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter=name)
        if name + "_grad" in cache:  # some are never called
            with lens.capture(model, name, rows=2, backend=backend) as cap:
                step(model)
            assert torch.equal(cap[name], cache[name + "_grad"])


def test_any_metric_and_two_caches_of_the_same_names(model, backend):
    def metric(logits):
        return logits[:, -1, 3].sum() - logits[:, -1, 4].sum()

    value, acts, grads = lens.cache_fwd_and_bwd(model, tokens(), metric, backend=backend)
    assert value == pytest.approx(metric(model(tokens())).item(), rel=1e-5)
    assert set(grads.keys()) <= set(acts.keys())
    for stack in ("accumulated_resid", "decompose_resid"):
        assert getattr(grads, stack)(-1).shape == getattr(acts, stack)(-1).shape
    assert grads.stack_activation("resid_post").shape == (2, 2, 7, 16)
    # The metric's slope along the residual stream, by the gradient and by a nudge.
    name = resid(model)
    nudge = 1e-3 * grads[name] / grads[name].norm()
    with model.hooks(fwd_hooks=[(name, lambda value, hook: value + nudge)]):
        moved = metric(model(tokens())).item() - value
    assert moved == pytest.approx((nudge * grads[name]).sum().item(), rel=0.05)


@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"native_bridge"}))  # whose attention has no hook_result
def test_stack_head_results_of_gradients(kind):
    model = MODELS[kind]()
    model.set_use_attn_result(True)
    _, acts, grads = lens.cache_fwd_and_bwd(model, tokens(), lambda logits: logits.sum())
    assert acts.stack_head_results(-1).shape[0] == grads.stack_head_results(-1).shape[0]


def test_a_value_must_be_one_number_with_a_gradient(model):
    with pytest.raises(ValueError, match=r"run_with_cache: the value must be one number, got a tensor of shape"):
        lens.run_with_cache(model, tokens(), return_type="logits", incl_bwd=True)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="gradient"):
        lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True)


def test_a_frozen_model(model):
    with tlfast.freeze(model):
        _, cache = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True)
    assert cache[resid(model) + "_grad"].abs().sum() > 0


def test_a_copy_and_a_move_carry_no_capture(model, backend):
    name = resid(model)
    with lens.capture(model, name, rows=8, backend=backend) as cap:
        other = copy.deepcopy(model)
        step(other)
        assert cap.rows == 0
        model.to(torch.float64).to(torch.float32)
        step(model)
        assert cap.rows == 2


def test_remove_batch_dim_and_device(model):
    given = tokens(batch=1)
    _, theirs = model.run_with_cache(given, return_type="loss", incl_bwd=True, remove_batch_dim=True)
    _, ours = lens.run_with_cache(
        model, given, return_type="loss", incl_bwd=True, remove_batch_dim=True, calls="last", device="cpu"
    )
    assert theirs.has_batch_dim is ours.has_batch_dim is False
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []


def test_a_cache_can_be_kept_on_disk(model):
    _, cache = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True)
    kept = pickle.loads(pickle.dumps(dict(cache.items())))
    assert all(torch.equal(kept[name], cache[name]) for name in kept)


def test_gradients_kept_do_not_change_when_training_goes_on(model):
    name = resid(model)
    _, cache = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, params=True)
    before = {key: cache[key].clone() for key in cache}
    for _ in range(2):
        step(model)
    model.zero_grad(set_to_none=False)
    assert [key for key in cache if not torch.equal(cache[key], before[key])] == []
    assert name + "_grad" in cache
