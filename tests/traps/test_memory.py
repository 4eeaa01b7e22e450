"""Traps 20 and 22 to 23b: what hooks return, whose memory is written, and tensors without memory."""

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import (
    Chain,
    HookPoint,
    chain,
    hooks_left,
    inputs,
    residual,
    uneven,
)
from torch import nn

import tlfast
from tlfast.hooks.full_hooks import FullHook

NO_ROWS = "ignore:capture. no backward reached the points"


def test_trap_20_hooks_return_nothing_and_change_nothing(backend, attach):
    setup = residual()
    setup.loss().backward()
    plain = [p.grad.clone() for p in setup.model.parameters()]
    setup.model.zero_grad()
    with tlfast.capture(setup.model, setup.points, reduce="mean", rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
        full = FullHook(cap._taps[0][1])
        cap._backwards.close()
        assert full(setup.model, (), (torch.ones(3, 4, 6),)) is None
    for p, want in zip(setup.model.parameters(), plain, strict=True):
        assert_same_bits(p.grad, want)


def test_trap_22_rows_are_never_resized(backend, attach):
    setup = chain()
    with tlfast.capture(setup.model, "hook", rows=7, attach=attach, backend=backend) as cap:
        setup.loss().backward()
        raw = cap._columns["hook"].rows
        before = raw.clone()
        with pytest.raises(
            ValueError, match=r"capture at hook: a row must have shape \[4, 6\] in every step, got \[2, 6\]"
        ):
            uneven(setup.model(inputs(3, 2))).backward()
    assert raw.shape == before.shape
    assert_same_bits(raw, before)


@pytest.mark.filterwarnings(NO_ROWS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("transform", ["grad", "vmap", "vjp"])
def test_trap_23_tensors_of_torch_func_are_refused(backend, attach, transform):
    model = Chain()

    def loss(x):
        return model(x.unsqueeze(0)).sum()

    run = {
        "grad": lambda: torch.func.grad(loss)(torch.randn(4, 6)),
        "vmap": lambda: torch.func.vmap(loss)(torch.randn(2, 4, 6)),
        "vjp": lambda: torch.func.vjp(loss, torch.randn(4, 6)),
    }[transform]
    with tlfast.capture(model, "linear", rows=4, attach=attach, backend=backend) as cap:
        with pytest.raises(RuntimeError) as error:
            run()
        assert cap.rows == 0
    what = "an input" if attach == "full" and transform != "vmap" else "the output"  # full hooks wrap the inputs first
    assert str(error.value) == (
        f"capture at linear: {what} must be a tensor with memory of its own, got one inside a torch.func "
        "transform. Use loss.backward() or torch.autograd.grad instead."
    )
    assert not hooks_left(model)


@pytest.mark.parametrize("calls", ["raise", "sum", "stack"])
def test_trap_23b_what_is_kept_is_a_copy(backend, attach, calls):
    # The engine may go on adding into the tensor that it handed to a hook; here somebody empties it at once.
    class Twice(nn.Module):
        def __init__(self, n_calls):
            super().__init__()
            self.hook, self.n_calls = HookPoint(), n_calls

        def forward(self, x):
            for _ in range(self.n_calls):
                x = x * 1
                x.register_hook(lambda grad: grad.zero_() if grad.is_contiguous() else None)
                x = self.hook(x)
            return x

    n_calls = 1 if calls == "raise" else 2
    model, x, given = Twice(n_calls), inputs(), torch.randn(3, 4, 6)
    with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend, calls=calls) as cap:
        model(x).backward(given.clone())
    nothing = torch.zeros_like(given)
    want = {"raise": given, "sum": given + nothing, "stack": torch.stack([nothing, given], 1)}[calls]
    assert_rows(cap, "hook", want)
