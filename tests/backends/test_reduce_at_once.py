"""`reduce_into` goes past torch's dispatcher where nobody can see it, and through it everywhere else."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tlfast
from tlfast.backends import choice
from tlfast.spec import REDUCTIONS

GRAD = torch.arange(24.0).reshape(2, 3, 4) - 7.0
MASK = torch.tensor([[True, False, True], [True, True, False]])
pytestmark = pytest.mark.sanitize


class Seen(TorchDispatchMode):
    """Keeps the names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(native, monkeypatch):
    """The arguments of the calls that go through the dispatcher."""
    calls, op = [], torch.ops.tlfast.capture
    monkeypatch.setattr(torch.ops.tlfast, "capture", lambda *args: calls.append(args) or op(*args))
    return calls


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("over", [1, "pos", -2])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_bits_are_those_of_the_op(dispatched, reduce, over, mask):
    want, out = (torch.full((2, 3, 4) if reduce == "none" else (2, 4), torch.nan) for _ in range(2))
    torch.ops.tlfast.capture(want, GRAD, reduce, [1], mask, 0.5)
    dispatched.clear()
    assert tlfast.reduce_into(out, GRAD, reduce, over, mask, 0.5) is out
    assert torch.equal(out.view(torch.int32), want.view(torch.int32))
    assert dispatched == []


def test_a_mode_sees_the_op(native):
    with Seen() as seen:
        tlfast.reduce_into(torch.empty(2, 4), GRAD, "sum")
    assert "tlfast::capture" in seen.names


@pytest.mark.parametrize(
    "out, grad, over, mask, scale",
    [
        (torch.empty(2, 4), GRAD.clone().requires_grad_(), 1, None, 1.0),
        (torch.empty(2, 4), GRAD.to_sparse().to_dense()._neg_view(), 1, None, 1.0),
        (torch.empty(2), GRAD, (1, 2), None, 1.0),
        (torch.empty(2, 4), GRAD, 1, None, 1),
    ],
    ids=["a graph", "a lazy view", "several dimensions", "another form"],
)
def test_what_is_unusual_goes_the_usual_way(dispatched, out, grad, over, mask, scale):
    tlfast.reduce_into(out, grad, "sum", over, mask, scale)
    assert len(dispatched) == 1
    assert torch.equal(out, grad.detach().resolve_neg().sum(over))


def test_it_says_whether_it_is_done(native):
    at_once = choice.loaded().reduce_at_once
    out = torch.empty(2, 4)
    assert at_once(out, GRAD, "sum", 1, None, 1.0) is True
    assert at_once(out, GRAD, "average", 1, None, 1.0) is False
    assert at_once(out, GRAD, "sum", 2**70, None, 1.0) is False
    with pytest.raises(ValueError, match=r"capture: out must have shape \[2, 4\], got \[2, 3\]"):
        at_once(torch.empty(2, 3), GRAD, "sum", 1, None, 1.0)
    with pytest.raises(TypeError, match=r"reduce_at_once: arguments must be 6, got 2. Call tlfast.reduce_into."):
        at_once(out, GRAD)
