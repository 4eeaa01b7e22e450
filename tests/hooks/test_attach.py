"""Attach: every gradient of one module's output goes to a tensor or a function."""

import copy
import math

import pytest
import torch
from backends import usable
from comparison import assert_captured, assert_same_bits
from models import Chain, HookPoint, Penalised, Repeated, Setup, activation_gradients, chain, hooks_left, inputs, uneven
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlfast


@pytest.mark.parametrize("reduce", ["none", "sum", "mean", "last", "norm", "absmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_takes_the_reduced_gradient(backend, attach, reduce, dtype):
    setup = chain()
    right = activation_gradients(setup)["hook"][0]
    memory = torch.full((3, *([3, 4, 6] if reduce == "none" else [3, 6])), math.nan, dtype=dtype)
    with tlfast.attach(setup.model.hook, memory[1], reduce=reduce, attach=attach, backend=backend):
        for _ in range(2):  # the second gradient replaces the first
            memory[1] = math.nan
            setup.loss().backward()
    assert_captured(memory[1], right, reduce, (1,))
    assert memory[[0, 2]].isnan().all()
    assert not hooks_left(setup.model)
    setup.loss().backward()
    assert_captured(memory[1], right, reduce, (1,))


def test_a_function_is_given_each_gradient(backend, attach):
    setup = chain()
    right = activation_gradients(setup)
    found = {"linear": [], "tanh": [], "hook": []}
    handles = [
        tlfast.attach(
            getattr(setup.model, name), lambda g, n=name: found[n].append(g.clone()), attach=attach, backend=backend
        )
        for name in found
    ]
    for _ in range(2):
        setup.loss().backward()
    for handle in handles:
        handle.remove()
        handle.remove()
    setup.loss().backward()
    for name, grads in found.items():
        assert len(grads) == 2
        for grad in grads:
            assert_same_bits(grad, right[name][0], name)
    assert not hooks_left(setup.model)


def test_it_is_the_gradient_through_the_module_alone(backend, attach):
    model, x = nn.Sequential(Penalised()), inputs()
    setup = Setup(model, ["0"], lambda: uneven(model(x)) + model[0].penalty)
    found = []
    with tlfast.attach(model[0], lambda g: found.append(g.clone()), attach=attach, backend=backend):
        setup.loss().backward()
    assert_same_bits(found[0], activation_gradients(setup)["0"][0])


def test_several_calls_reach_the_sink_last_call_first(backend, attach):
    model, x = Repeated(3), inputs()
    setup = Setup(model, ["hook"], lambda: uneven(model(x)))
    right = activation_gradients(setup)["hook"]
    found = []
    with tlfast.attach(model.hook, lambda g: found.append(g.clone()), attach=attach, backend=backend):
        setup.loss().backward()
    assert len(found) == 3
    for got, want in zip(found, reversed(right), strict=True):
        assert_same_bits(got, want)


def test_one_of_several_outputs(backend, attach):
    class Two(nn.Module):
        def forward(self, x):
            return x * 2, x * 3

    model, x, found = Two(), inputs(), []
    for output in (None, 0, 1):
        with tlfast.attach(model, lambda g: found.append(g.clone()), output=output, attach=attach, backend=backend):
            a, b = model(x)
            (5 * a + 7 * b).sum().backward()
    for got, want in zip(found, (5.0, 5.0, 7.0), strict=True):
        assert_same_bits(got, torch.full_like(x, want))


def test_what_a_sink_returns_changes_nothing(backend, attach):
    setup = chain()
    setup.loss().backward()
    right = setup.model.linear.weight.grad.clone()
    setup.model.zero_grad()
    with tlfast.attach(setup.model.hook, lambda g: g * 100, attach=attach, backend=backend):
        setup.loss().backward()
    assert_same_bits(setup.model.linear.weight.grad, right)


def test_an_error_of_the_sink_ends_the_backward(backend, attach):
    setup, found = chain(), []

    def sink(grad):
        found.append(grad.clone())
        if len(found) == 1:
            raise ZeroDivisionError("in the sink")

    with tlfast.attach(setup.model.hook, sink, attach=attach, backend=backend):
        with pytest.raises(ZeroDivisionError, match="in the sink"):
            setup.loss().backward()
        setup.loss().backward()
    assert len(found) == 2
    assert not hooks_left(setup.model)


def test_a_tensor_of_the_wrong_shape_is_not_written(backend, attach):
    setup, out = chain(), torch.full((2, 6), math.nan)
    with (
        tlfast.attach(setup.model.hook, out, reduce="sum", attach=attach, backend=backend),
        pytest.raises(ValueError, match=r"out must have shape \[3, 6\], got \[2, 6\]"),
    ):
        setup.loss().backward()
    assert out.isnan().all()
    assert out.shape == (2, 6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_reach_the_sink_once(backend, attach, reentrant):
    setup = chain()
    x, found = inputs(), []
    right = activation_gradients(Setup(setup.model, ["hook"], lambda: uneven(setup.model(x))))["hook"][0]
    with tlfast.attach(setup.model.hook, lambda g: found.append(g.clone()), attach=attach, backend=backend):
        uneven(checkpoint(setup.model, x, use_reentrant=reentrant)).backward()
    assert len(found) == 1
    assert_same_bits(found[0], right)


def test_calls_without_a_gradient_are_passed_over(backend, attach):
    model, x, found = Chain(), inputs(), []
    with tlfast.attach(model.hook, lambda g: found.append(g.clone()), attach=attach, backend=backend):
        with torch.no_grad():
            model(x)
        model.hook(x.detach())
        (model(x).detach() * x.mean()).sum().backward()
    assert not found


def test_removed_between_forward_and_backward(backend, attach):
    setup, found = chain(), []
    handle = tlfast.attach(setup.model.hook, lambda g: found.append(g.clone()), attach=attach, backend=backend)
    loss = setup.loss()
    handle.remove()
    loss.backward()
    assert not found


def test_in_place_after_the_module(backend):
    model, x, found = HookPoint(), inputs(), []
    with tlfast.attach(model, lambda g: found.append(g.clone()), attach="tensor", backend=backend):
        out = model(x * 1)
        out.mul_(3)
        out.sum().backward()
    assert_same_bits(found[0], torch.full_like(x, 3.0))


def test_a_copy_carries_no_sink(backend, attach):
    model, x, found = nn.Sequential(nn.Linear(6, 6)), inputs(), []
    with tlfast.attach(model[0], lambda g: found.append(g.clone()), attach=attach, backend=backend):
        uneven(copy.deepcopy(model)(x)).backward()
        assert not found
        uneven(model(x)).backward()
    assert len(found) == 1


def test_beside_a_capture(backend, attach):
    setup, found = chain(), []
    with (
        tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend) as cap,
        tlfast.attach(setup.model.hook, lambda g: found.append(g.clone()), attach=attach, backend=backend),
    ):
        setup.loss().backward()
    assert_same_bits(cap["hook"], found[0])


@pytest.mark.parametrize("which", ["python", "native"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo itself, in torch 2.11
def test_compiled(which):
    import torch._dynamo

    usable(which)
    setup = chain()
    right = activation_gradients(setup)["hook"][0]
    out = torch.full((3, 6), math.nan)
    torch._dynamo.reset()
    with tlfast.attach(setup.model.hook, out, reduce="sum", backend=which):
        torch.compile(setup.loss, backend="aot_eager", fullgraph=True)().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(out, right.sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong, kind, text",
    [
        ({"module": "hook"}, TypeError, "attach: module must be an nn.Module, got str. Pass the module."),
        (
            {"sink": 3},
            TypeError,
            "attach: sink must be a tensor or callable, got int. Pass a function of the gradient.",
        ),
        (
            {"attach": "node"},
            ValueError,
            "attach: attach must be one of auto, tensor, full, got 'node'. Check the spel",
        ),
        (
            {"backend": "cuda"},
            ValueError,
            "attach: backend must be one of auto, native, python, got 'cuda'. Check the s",
        ),
        (
            {"reduce": "max"},
            ValueError,
            "attach: reduce must be one of none, sum, mean, last, norm, absmax, got 'max'. ",
        ),
        (
            {"reduce": "sum", "over": "width"},
            ValueError,
            'attach: over must be "batch", "pos" or dimension numbers, got',
        ),
    ],
)
def test_bad_arguments(wrong, kind, text):
    model = Chain()
    arguments = {"module": model.hook, "sink": torch.empty(3, 6), "backend": "python"} | wrong
    with pytest.raises(kind) as error:
        tlfast.attach(arguments.pop("module"), arguments.pop("sink"), **arguments)
    assert str(error.value).startswith(text)
    assert not hooks_left(model)
