"""Traps 6, 10 and 12: several calls, several backwards, and a capture that is left in between."""

import pytest
import torch
from comparison import assert_captured, assert_rows, assert_same_bits
from models import (
    Chain,
    HookPoint,
    Repeated,
    Residual,
    Setup,
    activation_gradients,
    chain,
    inputs,
    tokens,
    uneven,
)
from torch import nn

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"


def repeated():
    model, x = Repeated(3), inputs()
    return Setup(model, ["hook", "shared"], lambda: uneven(model(x)))


def test_trap_06_a_second_call_raises_by_default(backend, attach):
    setup = chain()
    model, x = Repeated(2), inputs()
    both = nn.ModuleDict({"once": setup.model, "twice": model})
    with tlfast.capture(
        both, ["once.hook", "twice.hook"], rows=4, attach=attach, backend=backend, missing="nan"
    ) as cap:
        with pytest.raises(RuntimeError) as error:
            uneven(model(x)).backward()
        assert cap.rows == 0
        setup.loss().backward()
    assert str(error.value) == (
        "capture at twice.hook: a point must fire once in a backward, got a second time. "
        'Choose calls="sum", "last" or "stack".'
    )
    assert cap.rows == 3
    assert cap.missing["twice.hook"].all()


@pytest.mark.parametrize("reduce", ["none", "norm", "mean"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_trap_06_sum_last_and_stack(backend, attach, reduce, dtype):
    setup = repeated()
    right = activation_gradients(setup)
    for name, calls in ((name, calls) for name in setup.points for calls in ("sum", "last", "stack")):
        grads = right[name]
        assert len(grads) == 3
        with tlfast.capture(
            setup.model, name, reduce=reduce, dtype=dtype, rows=7, attach=attach, backend=backend, calls=calls
        ) as cap:
            setup.loss().backward()
            setup.loss().backward()
        assert cap.rows == 6
        assert cap._columns[name].rows[6].isnan().all()
        rows = cap[name]
        assert_same_bits(rows[3:], rows[:3])
        if calls == "sum":
            # From the last call to the first, as the engine adds up: in float32, reduced after the sum.
            assert_captured(rows[:3], (grads[2] + grads[1]) + grads[0], reduce, (1,), what=(name, calls))
        elif calls == "last":
            assert_captured(rows[:3], grads[0], reduce, (1,), what=(name, calls))
        else:
            assert rows.shape[1] == 3
            for call in range(3):
                assert_captured(rows[:3, call], grads[call], reduce, (1,), what=(name, calls, call))


def test_trap_06_sum_adds_what_a_bfloat16_store_would_lose(backend, attach):
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.hook = HookPoint()

        def forward(self, x):
            return 256.0 * self.hook(x) + self.hook(x) + self.hook(x)

    model, x = Thrice(), inputs()
    with tlfast.capture(
        model, "hook", dtype=torch.bfloat16, rows=4, attach=attach, backend=backend, calls="sum"
    ) as cap:
        model(x).sum().backward()
    assert_rows(cap, "hook", torch.full(x.shape, 258.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("n_positions", [(4, 1), (1, 4), (4, 5)])
def test_trap_06_calls_of_several_shapes_are_never_broadcast(backend, attach, n_positions):
    hook = HookPoint()
    model, (a, b) = nn.ModuleDict({"hook": hook}), (inputs(3, n) for n in n_positions)
    with tlfast.capture(
        model, "hook", reduce="sum", rows=8, attach=attach, backend=backend, calls="sum", missing="nan"
    ) as cap:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is below
            (uneven(hook(a)) + uneven(hook(b))).backward()
        assert cap.rows == 0
        uneven(hook(a)).backward()
    first, second = [3, n_positions[1], 6], [3, n_positions[0], 6]
    assert str(error.value) == (
        f"capture at hook: a point must have one shape in all calls to be summed ({first}), got {second}. "
        'Choose calls="last" or "stack".'
    )
    with tlfast.capture(model, "hook", reduce="sum", rows=8, attach=attach, backend=backend, calls="stack") as cap:
        (uneven(hook(a)) + uneven(hook(b))).backward()
    assert cap["hook"].shape == (3, 2, 6)


def test_trap_06_forwards_that_wait_for_their_backwards(backend, attach):
    setup = chain()
    right = activation_gradients(setup)["hook"][0]
    for calls in ("raise", "sum", "last"):
        with tlfast.capture(setup.model, "hook", rows=10, attach=attach, backend=backend, calls=calls) as cap:
            losses = [setup.loss(), setup.loss() * 2, setup.loss() * 4]
            for loss in losses:
                loss.backward()
        torch.testing.assert_close(cap["hook"], torch.cat([right, right * 2, right * 4]), rtol=1e-6, atol=0)
    with tlfast.capture(setup.model, "hook", rows=10, attach=attach, backend=backend, calls="sum") as cap:
        (setup.loss() + setup.loss() * 2).backward()
    torch.testing.assert_close(cap["hook"], right * 3, rtol=1e-6, atol=1e-6)


def test_trap_10_second_backward_and_gradient_of_gradient(backend, attach):
    setup = chain()
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, ["tanh", "hook"], rows=10, attach=attach, backend=backend) as cap:
        loss = setup.loss()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (loss * 2).backward()
    assert cap.rows == 9
    for name in cap.names:
        assert_same_bits(cap[name], torch.cat([right[name][0]] * 2 + [2 * right[name][0]]))


def test_trap_10_double_backward(backend, attach):
    model, x = Chain(), inputs()

    def penalty(loss):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return grad.square().sum()

    with tlfast.capture(model, ["tanh", "hook"], rows=10, attach=attach, backend=backend) as cap:
        penalty(uneven(model(x))).backward()
    assert cap.rows == 6
    # By hand: the same forward on copies, whose gradients are asked for twice.
    copies = []
    handles = [
        m.register_forward_hook(lambda m, a, out: copies.append(out.clone()) or copies[-1])
        for m in (model.tanh, model.hook)
    ]
    loss = uneven(model(x))
    for handle in handles:
        handle.remove()
    first = torch.autograd.grad(loss, copies, retain_graph=True)
    second = torch.autograd.grad(penalty(loss), copies)
    for i, name in enumerate(("tanh", "hook")):
        assert_same_bits(cap[name][:3], first[i])
        torch.testing.assert_close(cap[name][3:], second[i], rtol=1e-5, atol=1e-6)


def test_gradient_accumulation(backend, attach):
    model, batches = Residual(), [tokens(2), tokens(1), tokens(3)]
    with tlfast.capture(model, "unembed", reduce="sum", rows=7, attach=attach, backend=backend) as cap:
        for batch in batches:
            uneven(model(batch)).backward()
    got = cap["unembed"].clone()
    right = [
        activation_gradients(Setup(model, ["unembed"], lambda b=b: uneven(model(b))))["unembed"][0] for b in batches
    ]
    assert_captured(got, torch.cat(right), "sum", (1,))


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_12_a_capture_left_between_forward_and_backward(backend, attach):
    setup = chain()
    with tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend) as cap:
        loss = setup.loss()
    loss.backward()
    assert cap.rows == 0
    rows = cap._columns["hook"].rows
    assert rows is None or rows.isnan().all()


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_12_a_capture_left_inside_a_backward(backend, attach):
    setup = chain()
    cap = tlfast.capture(setup.model, ["hook", "linear"], rows=4, attach=attach, backend=backend)
    cap.__enter__()
    loss = setup.loss()
    handle = setup.model.tanh.register_full_backward_hook(lambda *_: cap.__exit__(None, None, None))
    loss2 = setup.loss()
    loss2.backward()
    handle.remove()
    loss.backward()
    assert cap.rows == 0


def test_forwards_of_earlier_steps_are_added_up(backend):
    """Each call is one of its own: a step may hold one whose forward was before the step before."""
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.arange(24.0).reshape(3, 2, 4)
    with tlfast.capture(model, "0", rows=9, calls="sum", attach="tensor", backend=backend) as cap:
        kept = model(x[0]).square().sum()
        model(x[1]).sum().backward()
        (kept + model(x[2]).sum()).backward()
    assert_same_bits(cap["0"], torch.cat([torch.ones(2, 3), 2 * model(x[0]).detach() + 1]))
