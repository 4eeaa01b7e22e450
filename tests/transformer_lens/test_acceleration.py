"""accelerate and install: TransformerLens' own caching gives the same to the bit, and nothing stays behind."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
import torch
from lens_models import CACHING, root_module, state, tokens
from torch import nn

import tlfast.transformer_lens as lens
from tlfast.transformer_lens import acceleration
from tlfast.transformer_lens.library import hook_point_type


@pytest.fixture(params=CACHING)
def model(request):
    """Each kind of model whose own cache has gradients to compare with."""
    return CACHING[request.param]()


@pytest.fixture
def installed():
    lens.install()
    yield
    lens.uninstall()


def caches(model):
    """What each of TransformerLens' ways to cache gradients gives."""
    given, found = tokens(), []
    for options in ({}, {"names_filter": "blocks.0.hook_resid_post"}, {"names_filter": lambda n: "resid" in n},
                    {"pos_slice": (1, 3)}, {"reset_hooks_end": False}):  # fmt: skip
        model.zero_grad()
        loss, cache = model.run_with_cache(given, return_type="loss", incl_bwd=True, **options)
        model.reset_hooks()
        found.append({"loss": loss.detach(), **dict(cache.items())})
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    cache, fwd, bwd = model.get_caching_hooks(incl_bwd=True) if hasattr(model, "get_caching_hooks") else ({}, [], [])
    with model.hooks(fwd, bwd):
        model(given, return_type="loss").backward()
    found.append(cache)
    if hasattr(model, "add_caching_hooks"):
        cache = model.add_caching_hooks(names_filter=lambda name: "resid" in name, incl_bwd=True)
        model(given, return_type="loss").backward()
        model.reset_hooks()
        found.append(cache)
    return found


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_accelerate_changes_no_bit_and_leaves_nothing(model):
    plain = caches(model)
    before = state(model)
    with lens.accelerate(model):
        assert state(model) == before  # nothing is written into the model
        assert_same(plain, caches(model))
    assert state(model) == before
    assert "run_with_cache" not in vars(model)


def test_install_changes_no_bit_and_uninstall_restores_the_classes(model):
    point, hosts = hook_point_type(), acceleration._hosts()
    plain = caches(model)
    before = [dict(vars(cls)) for cls in (point, nn.Module, *hosts)]
    lens.install()
    lens.install()
    try:
        assert lens.installed()
        assert vars(point)["add_hook"] is before[0]["add_hook"]
        assert_same(plain, caches(model))
        lens.uninstall()
        assert lens.installed()  # two users of it don't undo each other
        assert_same(plain, caches(model))
    finally:
        lens.uninstall()
    assert [dict(vars(cls)) for cls in (point, nn.Module, *hosts)] == before
    assert not lens.installed()


def test_their_caching_hooks_take_no_full_backward_hook(model):
    name = next(name for name in model.hook_dict if name.endswith("hook_resid_post"))
    with lens.accelerate(model):
        model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter=name, reset_hooks_end=False)
        point = model.hook_dict[name]
        assert point.bwd_hooks  # two on a bridge, which takes the alias and the name behind it
        assert not point._backward_hooks
        model.reset_hooks()
        assert not point.bwd_hooks
        assert not point._forward_hooks


def test_hooks_of_users_are_left_alone(model, installed):
    name = next(name for name in model.hook_dict if name.endswith("hook_resid_post"))
    point, seen = model.hook_dict[name], []
    point.add_hook(lambda grad, hook: seen.append(grad.clone()), dir="bwd", is_permanent=True)
    assert len(point._backward_hooks) == 1  # a full backward hook of PyTorch, as ever
    _, cache = model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter=name)
    assert torch.equal(seen[0], cache[name + "_grad"])
    assert len(point.bwd_hooks) == 1
    model.reset_hooks()
    assert len(point.bwd_hooks) == 1
    model.reset_hooks(including_permanent=True)
    assert not point.bwd_hooks


def test_a_users_hook_that_changes_the_gradient_still_does(model):
    given = tokens()
    name = next(name for name in model.hook_dict if name.endswith("1.hook_resid_post"))
    below = next(name for name in model.hook_dict if name.endswith("0.hook_resid_post"))

    def grads():
        with model.hooks(bwd_hooks=[(name, lambda grad, hook: (grad * 3,))]):
            return model.run_with_cache(given, return_type="loss", incl_bwd=True, names_filter=[name, below])[1]

    plain = grads()
    with lens.accelerate(model):
        fast = grads()
    assert_same([dict(plain.items())], [dict(fast.items())])
    without = model.run_with_cache(given, return_type="loss", incl_bwd=True, names_filter=[name, below])[1]
    # Three times as much, up to the rounding of sums of seven and sixteen terms.
    assert torch.allclose(fast[below + "_grad"], 3 * without[below + "_grad"], rtol=1e-4, atol=1e-6)


def test_a_function_of_the_users_is_never_taken_for_a_caching_hook():
    def run_with_cache():
        def hook(grad, hook):
            return (grad * 2,)

        return hook

    point = hook_point_type()()
    lens.install()
    try:
        point.add_hook(run_with_cache(), dir="bwd")
    finally:
        lens.uninstall()
    assert len(point._backward_hooks) == 1


def test_two_models_at_once(model):
    other = copy.deepcopy(model)
    given = tokens()
    with lens.accelerate(model), lens.accelerate(other):
        _, first = model.run_with_cache(given, return_type="loss", incl_bwd=True)
        _, second = other.run_with_cache(given, return_type="loss", incl_bwd=True)
    assert_same([dict(first.items())], [dict(second.items())])


def test_a_root_module(installed):
    model, x = root_module(), torch.randn(2, 3, 16)
    with_tlfast = model.run_with_cache(x, incl_bwd=True)[1]
    lens.uninstall()
    assert_same([model.run_with_cache(x, incl_bwd=True)[1]], [with_tlfast])


def test_the_check_tries_it():
    wrong = tuple(map(int, version("transformer-lens").split(".")[:3])) < (2, 2, 2)
    assert lens.check().startswith("deprecated" if wrong else "full backward hooks; a hook may return None")
