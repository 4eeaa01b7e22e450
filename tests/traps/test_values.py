"""Traps 1 to 5b and 9: which gradient a hook sees, at fresh, view, identity, leaf, patched and modified outputs."""

import math

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import Chain, HookPoint, activation_gradients, chain, hooks_left, inputs, residual, uneven
from torch import nn

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"


class Doubled(nn.Module):
    """A fresh output."""

    def forward(self, x):
        return x * 2


OUTPUTS = {"fresh": Doubled, "view": lambda: nn.Linear(6, 6), "identity": HookPoint}


STRIDED = {
    "expanded": lambda shape: torch.tensor(3.0).expand(shape),
    "expanded over positions": lambda shape: torch.randn(shape[0], 1, shape[2]).expand(shape),
    "transposed": lambda shape: torch.randn(shape[::-1]).permute(2, 1, 0),
    "sliced": lambda shape: torch.randn([2 * s for s in shape])[::2, 1::2, ::2],
    "offset": lambda shape: torch.randn(math.prod(shape) + 1)[1:].view(shape),
}


@pytest.mark.parametrize("reduce", ["none", "sum", "last"])
@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("n_examples", [3, 0])
def test_trap_01_gradients_of_any_strides(backend, attach, kind, reduce, n_examples):
    model, x = nn.Sequential(HookPoint()), inputs(n_examples)
    given, seen = STRIDED[kind](x.shape), []
    x.register_hook(lambda grad: seen.append(grad.stride()))
    with tlfast.capture(model, "0", reduce=reduce, rows=4, attach=attach, backend=backend) as cap:
        model(x).backward(given)
    assert seen == [given.stride()], "the gradient reached the tap as it was given"
    right = {"none": given, "sum": given.double().sum(1).float(), "last": given[:, -1]}[reduce]
    if n_examples:
        torch.testing.assert_close(cap["0"], right, rtol=1e-6, atol=1e-6)
    assert cap["0"].shape == right.shape
    assert cap._columns["0"].rows[n_examples:].isnan().all()


def test_trap_01_the_gradient_of_a_sum_is_expanded(backend, attach):
    model, x = nn.Sequential(Doubled()), torch.zeros(2, 3, 4, requires_grad=True)
    strides = []
    with tlfast.capture(model, "0", rows=4, attach=attach, backend=backend) as cap:
        out = model(x)
        out.register_hook(lambda grad: strides.append(grad.stride()))
        out.sum().backward()
    assert strides == [(0, 0, 0)]
    assert_rows(cap, "0", torch.ones(2, 3, 4))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_trap_02_in_place_after_the_point_tensor(backend, kind):
    model, x = nn.Sequential(OUTPUTS[kind]()), inputs()
    with tlfast.capture(model, "0", rows=4, attach="tensor", backend=backend) as cap:
        out = model(x.clone())
        out.mul_(3)
        out[:, 0] = 5.0
        uneven(out).backward()
    captured = x.grad
    x.grad = None
    out = model(x.clone())
    after = out * 3
    after = torch.cat([torch.full_like(after[:, :1], 5.0), after[:, 1:]], 1)
    assert_rows(cap, "0", torch.autograd.grad(uneven(after), out, retain_graph=True)[0])
    uneven(after).backward()
    assert_same_bits(captured, x.grad)


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_02_the_output_of_an_identity_still_shares_its_memory(backend):
    model, x = nn.Sequential(HookPoint()), inputs()
    with tlfast.capture(model, "0", rows=4, attach="tensor", backend=backend):
        given = x * 1
        out = model(given)
        out[:, 0] = 7.0
    assert (given[:, 0] == 7.0).all(), "as in the model without a capture"


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_02_the_input_of_an_identity_does_not_learn_of_an_operation_in_place(backend):
    """A documented difference: with a capture the two names share memory and not the history; full hooks raise."""
    model, x = nn.Sequential(HookPoint()), inputs()

    def gradient():
        x.grad = None
        given = x * 1
        model(given).mul_(3)
        given.square().sum().backward()
        return x.grad

    plain = gradient()
    with tlfast.capture(model, "0", rows=4, attach="tensor", missing="nan", backend=backend) as cap:
        captured = gradient()
    assert cap.rows == 0, "no gradient went through the point"
    assert_same_bits(plain, x.detach() * 3 * 2 * 3)
    assert_same_bits(captured, x.detach() * 3 * 2)


@pytest.mark.filterwarnings(NO_ROWS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", OUTPUTS)
def test_trap_02_in_place_after_the_point_full(backend, kind):
    model, x = nn.Sequential(nn.Linear(6, 6), OUTPUTS[kind]()), inputs()
    if backend == "native" and kind in ("fresh", "view"):  # which nobody else can know by another name
        with tlfast.capture(model, ["0", "1"], rows=4, attach="full", backend=backend) as cap:
            uneven(model(x).mul_(3)).backward()
        out = model(x)
        assert_rows(cap, "1", torch.autograd.grad(uneven(out * 3), out)[0])
        return

    def modified():
        with tlfast.capture(model, ["0", "1"], rows=4, attach="full", backend=backend):
            model(x).mul_(3)

    with pytest.raises(RuntimeError) as error:
        modified()
    assert str(error.value) == (
        'capture at 1: an output must stay unmodified in place with attach="full", got an in-place operation after it '
        '(the point called last). Use attach="tensor".'
    )
    assert "is a view and is being modified inplace" in str(error.value.__cause__)
    assert not hooks_left(model)


def test_trap_03_in_place_on_a_view_orphans_plain_hooks_but_not_the_tap(backend):
    model, x = nn.Sequential(nn.Linear(6, 6)), inputs()
    seen = []
    out = model(x)
    assert out._is_view()
    out.grad_fn.register_prehook(lambda grads: seen.append(grads))
    out.mul_(2)
    uneven(out).backward()
    assert not seen, "PyTorch has changed: a hook on the node of a modified view fires"
    with tlfast.capture(model, "0", rows=4, attach="tensor", backend=backend) as cap:
        out = model(x)
        out.mul_(2)
        out += 1
        uneven(out).backward()
    out = model(x)
    assert_rows(cap, "0", torch.autograd.grad(uneven(out * 2 + 1), out)[0])


def test_trap_04_identity_modules_give_their_own_gradient(backend, attach):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.hook = HookPoint()

        def forward(self, x):
            x = x * 1
            total.append(x)
            x.register_hook(seen.append)
            return 20 * x + 8 * self.hook(x)

    model, x, total, seen = Shared(), inputs(), [], []
    with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend) as cap:
        model(x).sum().backward()
    assert_rows(cap, "hook", torch.full_like(x, 8.0))
    assert_same_bits(seen[0], torch.full_like(x, 28.0))
    assert_same_bits(x.grad, torch.full_like(x, 28.0))


def test_trap_04_every_hook_point_of_a_residual_model(backend, attach):
    setup = residual()
    setup.points = [name for name, module in setup.model.named_modules() if isinstance(module, HookPoint)]
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, "**.hook_*", rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    assert len(cap.names) == 6
    for name in cap.names:
        assert_rows(cap, name, right[name][0])


def test_trap_05_leaf_outputs(backend, attach):
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4, 6))

        def forward(self, x):
            return self.table

    gives, point = Gives(), HookPoint()
    model = nn.Sequential(gives, point)
    own, x = [], inputs().detach()
    gives.table.register_hook(lambda grad: own.append(grad.clone()))
    with tlfast.capture(model, ["0", "1"], rows=16, attach=attach, backend=backend) as cap:
        for _ in range(3):
            uneven(model(x)).backward()
            model(x)  # forwards without a backward leave nothing behind
        uneven(point(gives.table) + 0 * gives(x)).backward()
    right = torch.autograd.grad(uneven(y := gives.table * 1), y)[0]
    assert len(own) == 4, "the user's own hook fires once in each backward"
    for grad in own:
        assert_same_bits(grad, right)
    assert_same_bits(cap["1"], right.repeat(4, 1, 1))
    assert_same_bits(cap["0"], torch.cat([right.repeat(3, 1, 1), 0 * right]))
    assert_same_bits(gives.table.grad, right * 4)


def test_trap_09_gradient_of_a_weight_alone(backend, attach):
    setup = chain()
    right = activation_gradients(setup)["linear"][0]
    cap = tlfast.capture(setup.model, "linear", rows=4, attach=attach, backend=backend)

    def weight_only():
        with cap:
            torch.autograd.grad(setup.loss(), setup.model.linear.weight)

    if attach == "tensor":
        weight_only()
        assert_rows(cap, "linear", right)
    else:  # a full hook fires at the module's input, which this gradient doesn't need
        with pytest.warns(UserWarning, match="capture: no backward reached the points"):
            weight_only()
        assert cap.rows == 0


def test_user_hooks_that_change_the_gradient_are_seen_by_both(backend, attach):
    model, x = Chain(), inputs()
    with tlfast.capture(model, ["tanh", "hook"], rows=4, attach=attach, backend=backend) as cap:
        handles = [
            model.hook.register_forward_hook(lambda m, args, out: out.register_hook(lambda g: g * 2) and None),
            model.flat.register_forward_pre_hook(lambda m, args: args[0].register_hook(lambda g: g + 1) and None),
        ]
        uneven(model(x)).backward()
    for handle in handles:
        handle.remove()
    hooked = model.tanh(model.linear(x))
    out = model.hook(hooked)
    plain = torch.autograd.grad(uneven(model.head(model.flat(out)).unflatten(0, (3, 4))), out)[0]
    # A hook on what the module put out is seen below it; one on what left the point, at the point.
    assert_rows(cap, "hook", plain + 1)
    assert_rows(cap, "tanh", (plain + 1) * 2)
