"""Traps 11 and 14 to 19: graphs, dtypes, accumulation, masks and scales."""

import pytest
import torch
from comparison import assert_captured, assert_rows, assert_same_bits, assert_untouched
from models import (
    Chain,
    HookPoint,
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


class Scaled(nn.Module):
    """Two hook points whose gradients are what the loss says."""

    def __init__(self):
        super().__init__()
        self.hook = HookPoint()

    def forward(self, x):
        return self.hook(x)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("reduce", ["none", "mean", "last"])
def test_trap_11_create_graph_leaves_the_ring_out_of_the_graph(backend, attach, reduce):
    setup = chain()
    right = activation_gradients(setup)["hook"][0]
    for calls in ("raise", "sum", "stack"):
        with tlfast.capture(
            setup.model, "hook", reduce=reduce, rows=7, attach=attach, backend=backend, calls=calls
        ) as cap:
            for _ in range(2):
                setup.loss().backward(create_graph=True)
        rows = cap["hook"][:, 0] if calls == "stack" else cap["hook"]
        assert not cap._columns["hook"].rows.requires_grad
        assert_captured(rows[3:], right, reduce, (1,))
        assert cap._columns["hook"].rows[6].isnan().all()
    setup.model.zero_grad()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trap_14_autocast_takes_the_dtype_from_the_gradient(backend, attach, dtype):
    model, x = Chain(), inputs(3, 300)
    seen = {}

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return uneven(model(x).float())

    handle = model.linear.register_forward_hook(
        lambda m, a, out: out.register_hook(lambda g: seen.update(g=g)) and None
    )
    with tlfast.capture(model, "linear", reduce="sum", dtype=dtype, rows=4, attach=attach, backend=backend) as cap:
        loss().backward()
    handle.remove()
    grad = seen["g"]
    assert grad.dtype == torch.bfloat16
    assert cap["linear"].dtype == (dtype or torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    assert_captured(cap["linear"], grad, "sum", (1,))
    assert_untouched(cap._columns["linear"].rows, 3)


def test_trap_14_float64_models_keep_float64(backend, attach):
    setup = chain()
    setup.model.double()
    x = inputs().detach().double().requires_grad_()
    setup.loss = lambda: uneven(setup.model(x))
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, ["hook", "tanh"], reduce="norm", rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    assert cap["hook"].dtype == torch.float64
    assert_captured(cap["hook"], right["hook"][0], "norm", (1,))


def test_trap_15_rows_of_a_mean_loss_depend_on_the_batch(backend, attach):
    model, batch = Residual(), tokens(8)
    norms = {}
    for kind in ("sum", "mean"):
        for n in (2, 8):
            with tlfast.capture(model, "blocks.0", rows=9, attach=attach, backend=backend) as cap:
                losses = model(batch[:n]).square().sum((1, 2))
                getattr(losses, kind)().backward()
            norms[kind, n] = cap["blocks.0"][0].norm().item()
    assert norms["sum", 8] == pytest.approx(norms["sum", 2], rel=1e-5)
    assert norms["mean", 2] == pytest.approx(4 * norms["mean", 8], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trap_15_grad_scale_undoes_a_scaler(backend, attach, dtype):
    model, x = Scaled(), inputs()
    given = torch.randn(3, 4, 6)
    with tlfast.capture(model, "hook", reduce="mean", dtype=dtype, rows=8, attach=attach, backend=backend) as cap:
        model(x).backward(given)
        with cap.batch(grad_scale=65536.0):
            model(x).backward(given * 65536.0)
    assert_same_bits(cap["hook"][3:], cap["hook"][:3])


@pytest.mark.parametrize("n", [257, 1027])
def test_trap_16_real_tokens_are_counted_as_integers(backend, attach, n):
    model, x = Scaled(), torch.zeros(1, n + 5, 2, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(1, n + 5, dtype=torch.bool)
    mask[:, n:] = False
    with (
        tlfast.capture(
            model, "hook", reduce="mean", dtype=torch.float32, rows=2, attach=attach, backend=backend
        ) as cap,
        cap.batch(mask=mask),
    ):
        model(x).backward(torch.ones_like(x))
    assert_rows(cap, "hook", torch.ones(1, 2))


def test_trap_17_running_sums_are_kept_in_float32(backend, attach):
    model, x = Scaled(), torch.zeros(2, 2048, 5, dtype=torch.bfloat16, requires_grad=True)
    given = torch.rand(2, 2048, 5).bfloat16()
    with tlfast.capture(model, "hook", reduce="sum", rows=3, attach=attach, backend=backend) as cap:
        model(x).backward(given)
    assert cap["hook"].dtype == torch.bfloat16
    assert_captured(cap["hook"], given, "sum", (1,))
    slow = torch.zeros(2, 5, dtype=torch.bfloat16)
    for p in range(2048):
        slow += given[:, p]
    assert ((slow.float() - given.float().sum(1)) / given.float().sum(1)).abs().max() > 0.02, "the trap is still there"


def test_trap_18_nonfinite_and_saturated_values_are_counted(backend, attach):
    model, x = Scaled(), torch.zeros(2, 2, 2, requires_grad=True)
    given = torch.tensor([[[7e4, 1e-8], [1.0, torch.nan]], [[-7e4, torch.inf], [2.0, 3.0]]])
    with tlfast.capture(model, "hook", dtype=torch.float16, rows=5, attach=attach, backend=backend) as cap:
        model(x).backward(given)
        assert cap.counts == {"hook": {"nonfinite": 4, "saturated": 2}}
        cap.clear()
        model(x).backward(torch.ones_like(given))
        model(x).backward(given)
    assert cap.counts == {"hook": {"nonfinite": 8, "saturated": 4}}, "since entering"
    assert_same_bits(cap["hook"][2:], given.half())


@pytest.mark.parametrize("side", ["left", "right"])
def test_trap_19_padding_has_gradients_at_inner_points(backend, attach, side):
    # Bidirectional mixing: the padding's own positions get a gradient at the hook, though none at the logits.
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.hook = HookPoint()

        def forward(self, x):
            x = self.hook(x)
            return x + x.cumsum(1) + x.flip(1).cumsum(1)

    model, x = Mixed(), inputs(2, 5)
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    mask = mask if side == "left" else mask.flip(1)
    setup = Setup(model, ["hook"], lambda: uneven(model(x)[mask]))
    grad = activation_gradients(setup)["hook"][0]
    assert grad[~mask].abs().min() > 0
    for reduce in ("none", "sum", "mean", "last", "norm", "absmax"):
        with (
            tlfast.capture(model, "hook", reduce=reduce, rows=3, attach=attach, backend=backend) as cap,
            cap.batch(mask=mask),
        ):
            setup.loss().backward()
        assert_captured(cap["hook"], grad, reduce, (1,), mask)
        if reduce == "last":
            assert_same_bits(cap["hook"][1], grad[1, 4 if side == "left" else 2])
