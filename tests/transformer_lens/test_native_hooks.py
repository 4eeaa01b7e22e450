"""Backward hooks that users put on hook points: called by native code inside `install`, and the same to the bit."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from lens_models import tokens

import tlfast
import tlfast.transformer_lens as lens
from tlfast.transformer_lens import acceleration
from tlfast.transformer_lens.compatibility import accepts, registered_hooks
from tlfast.transformer_lens.library import hook_point_type

pytestmark = pytest.mark.skipif(
    registered_hooks() != "full" or not tlfast.backend().startswith("native"),
    reason="hooks that PyTorch or native code doesn't call natively",
)


def hooked_run(model):
    """What hooks of several kinds see in one backward, and the gradients of the parameters."""
    seen = []

    def told(name, grad):
        seen.append((name, tuple(grad.shape), grad.detach().clone()))

    names = sorted(name for name in model.hook_dict if name.endswith(("hook_resid_post", "mlp.hook_post")))
    doubles = "(grad,)" if accepts("(grad,)") else "grad"

    def doubling(grad, hook):
        told("doubling " + hook.name, grad)
        return (2 * grad,) if doubles == "(grad,)" else 2 * grad

    model.add_hook(names[0], lambda grad, hook: told("permanent", grad), dir="bwd", is_permanent=True)
    model.zero_grad()
    with model.hooks(
        bwd_hooks=[(names[-1], doubling), (lambda name: name in names, lambda grad, hook: told(hook.name, grad))]
    ):
        model(tokens(), return_type="loss").backward()
    model.reset_hooks(including_permanent=True)
    return seen, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def is_native(node):
    return node.name() == "BackwardHookFunctionBackward" and type(node).__name__ != node.name()


def same(one, other):
    assert [(name, shape) for name, shape, _ in one[0]] == [(name, shape) for name, shape, _ in other[0]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one[0], other[0], strict=True))
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def test_hooks_of_users_are_the_same(model):
    plain = hooked_run(model)
    assert len(plain[0]) >= 3
    with lens.accelerate(model):
        same(plain, hooked_run(model))
    lens.install()
    try:
        same(plain, hooked_run(model))
    finally:
        lens.uninstall()
    same(plain, hooked_run(model))


def test_they_are_native_inside_alone(model):
    point, x = hook_point_type()(), torch.ones(3, requires_grad=True)
    point.name = "point"
    point.add_hook(lambda grad, hook: None, dir="bwd")
    assert not is_native(point(x).grad_fn)
    lens.install()
    try:
        assert is_native(point(x).grad_fn)
        copied = copy.deepcopy(point)
    finally:
        lens.uninstall()
    assert not is_native(point(x).grad_fn)
    assert not is_native(copied(x).grad_fn)


class Tripled:
    """A conversion between what flows through a point and what its hooks see."""

    def convert(self, grad):
        return 3 * grad

    def revert(self, grad):
        return grad / 3


def told_of_one_point():
    """What hooks of every kind of `add_hook` see at one point, in order, as some of them go, and the gradients."""
    point, seen = hook_point_type()(), []
    point.name = "point"
    takes = inspect.signature(point.add_hook).parameters

    def add(text, returns=lambda grad: None, **kwargs):
        def told(grad, hook):
            seen.append((text, hook.name, grad.sum().tolist()))
            return returns(grad)

        point.add_hook(told, dir="bwd", **{name: value for name, value in kwargs.items() if name in takes})

    def step():
        x = torch.ones(2, 3, requires_grad=True)
        point(x * torch.arange(3)).square().sum().backward()
        seen.append(("step", "", x.grad.tolist()))

    doubled = (lambda grad: 2 * grad) if accepts("grad") else (lambda grad: (2 * grad,))
    add("first")
    add("second", level=1)
    add("before", prepend=True, level=1)
    add("under two names", alias_names=["one", "other"], level=2)
    add("permanent", is_permanent=True)
    add("changes", doubled, level=2)
    step()
    if hasattr(point, "hook_conversion"):
        point.hook_conversion = Tripled()
        add("converted", (lambda grad: grad + 1) if accepts("grad") else (lambda grad: None), level=2)
        step()
        point.hook_conversion = None
    for chosen in ({"level": 1}, {"level": 2}):
        point.remove_hooks("bwd", **chosen)
        step()
    if hasattr(point, "backward_scale"):
        point.backward_scale = 0.5  # hooks are given something that can be summed, and no more
        step()
    for chosen in ({}, {"including_permanent": True}):
        point.remove_hooks("bwd", **chosen)
        step()
    return seen


def test_levels_prepend_aliases_conversions_and_removals_are_the_same():
    plain = told_of_one_point()
    assert [text for text, _, _ in plain[:2]] == ["before", "first"]
    assert [text for text, _, _ in plain[-6:]] == ["first", "permanent", "step", "permanent", "step", "step"]
    lens.install()
    try:
        assert told_of_one_point() == plain
    finally:
        lens.uninstall()


@pytest.mark.parametrize("enter", [lens.install, lambda: lens.accelerate(None).__enter__()], ids=["all", "one"])
def test_what_can_not_be_put_in_force_leaves_nothing_behind(enter, monkeypatch):
    def refuse(only):
        raise RuntimeError("not here")

    monkeypatch.setattr(acceleration.full_hooks, "enter", refuse)
    monkeypatch.setattr(acceleration, "hook_points", lambda who, model: {})
    before = inspect.getattr_static(hook_point_type(), "register_full_backward_hook", None)
    with pytest.raises(RuntimeError, match="not here"):
        enter()
    assert not lens.installed()
    assert inspect.getattr_static(hook_point_type(), "register_full_backward_hook", None) is before
