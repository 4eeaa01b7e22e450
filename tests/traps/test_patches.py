"""Trap 5b: hooks that patch the output of a point, registered before and after ours."""

import pytest
import torch
from comparison import assert_rows
from models import Chain, hooks_left, inputs, uneven
from torch import nn

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"


PATCHES = {"out * 2": lambda out: out * 2, "mixed": lambda out: out * 0.5 + torch.ones_like(out).requires_grad_()}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("way", ["before", "after", "with_kwargs", "always_call", "prepend", "global"])
def test_trap_05b_patch_hooks_of_any_age_run_before_ours(backend, attach, way, patch):
    model, x = Chain(), inputs()
    given = []

    def hook(module, args, *rest):
        if module is model.hook:
            given.append(PATCHES[patch](rest[-1]).clone())
            return given[-1]
        return None

    def register():
        if way == "global":
            return nn.modules.module.register_module_forward_hook(hook)
        options = {way: True} if way in ("with_kwargs", "always_call", "prepend") else {}
        return model.hook.register_forward_hook(hook, **options)

    handle = register() if way == "before" else None
    cap = tlfast.capture(model, "hook", rows=8, attach=attach, backend=backend)
    try:
        with cap:
            handle = handle or register()
            for _ in range(2):  # the second time our hook is the last one already
                uneven(model(x)).backward()
    finally:
        handle.remove()
    right = [torch.autograd.grad(uneven(model.head(model.flat(out))), out)[0] for out in given]
    assert_rows(cap, "hook", torch.cat([grad.detach() for grad in right]))
    assert not hooks_left(model)


@pytest.mark.filterwarnings(NO_ROWS)
def test_output_that_does_not_depend_on_the_input(backend, attach):
    model, x = Chain(), inputs()
    replaced = torch.randn(3, 4, 6, requires_grad=True)
    handle = model.hook.register_forward_hook(lambda m, args, out: replaced)
    with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend) as cap:
        uneven(model(x)).backward()
    handle.remove()
    if attach == "tensor":
        assert_rows(cap, "hook", replaced.grad)
    else:  # a full hook fires once the gradient of the input is there, and here it never is
        assert cap.rows == 0


def test_trap_05b_two_captures_and_a_patch_in_between(backend, attach):
    model, x = Chain(), inputs()
    with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend) as a:
        handle = model.hook.register_forward_hook(lambda m, args, out: out * 3)
        with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend) as b:
            uneven(model(x)).backward()
        handle.remove()
    out = model.hook(model.tanh(model.linear(x))) * 3
    right = torch.autograd.grad(uneven(model.head(model.flat(out)).unflatten(0, (3, 4))), out)[0]
    assert_rows(a, "hook", right)
    assert_rows(b, "hook", right)


def test_trap_05b_several_points_patched_after_the_capture_was_entered(backend, attach):
    model, x = Chain(), inputs()
    points = [model.linear, model.tanh, model.hook]
    handles = []
    with tlfast.capture(model, ["linear", "tanh", "hook"], rows=10, attach=attach, backend=backend) as cap:
        for n_patched in range(1, 4):
            handles.append(points[-n_patched].register_forward_hook(lambda m, args, out: out * 2))
            uneven(model(x)).backward()
    for handle in handles:
        handle.remove()
    outs = [model.linear(x) * 2]
    outs.append(model.tanh(outs[-1]) * 2)
    outs.append(model.hook(outs[-1]) * 2)
    grads = torch.autograd.grad(uneven(model.head(model.flat(outs[-1])).unflatten(0, (3, 4))), outs)
    for name, grad in zip(("linear", "tanh", "hook"), grads, strict=True):
        torch.testing.assert_close(cap[name][6:], grad, rtol=0, atol=0)
