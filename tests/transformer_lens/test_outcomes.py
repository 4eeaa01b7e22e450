"""The comparison of two calls finds each thing in which they can differ, and nothing where they don't."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from lens_calls import OURS, REFUSED, Call, compared, going, of_any_backward
from lens_models import root_module
from lens_outcomes import changes, differences, marks, outcome
from torch import nn

import tlfast.transformer_lens as lens

LONG = torch.arange(6.0).view(2, 3)
TEXTS = ("Full backward hook is firing when it does", "another")


def seen(call, model=None):
    model = root_module() if model is None else model
    before = marks(model)
    found = outcome(model, call)
    found.left = changes(before, marks(model))
    return found


def returning(**tensors):
    return seen(lambda: (torch.ones(1), tensors))


def test_the_same_twice_is_the_same():
    assert differences(returning(a=LONG, b=None), returning(a=LONG.clone(), b=None)) == []


@pytest.mark.parametrize(
    "other, where",
    [
        (LONG + torch.tensor([0, 0, 1e-6]), "cache.a.bytes"),
        (LONG * torch.tensor([-1.0, 1, 1]), "cache.a.bytes"),  # the sign of a zero, too
        (LONG.double(), "cache.a.dtype"),
        (LONG.view(3, 2), "cache.a.shape"),
        (LONG.t().contiguous().t(), "cache.a.strides"),
        (LONG.clone().requires_grad_(), "cache.a.graph"),
        (nn.Parameter(LONG, requires_grad=False), "cache.a.class"),
        (None, "cache.a: "),
    ],
)
def test_a_tensor_that_differs(other, where):
    wrong = differences(returning(a=LONG), returning(a=other))
    assert wrong
    assert any(text.startswith(where) for text in wrong)


@pytest.mark.parametrize(
    "shape, strides, others, matter",
    [
        ((2, 1, 3), (3, 3, 1), (3, 1, 1), False),
        ((1, 1), (1, 1), (5, 7), False),
        ((0, 2), (2, 1), (1, 1), False),
        ((2, 1, 3), (3, 3, 1), (1, 3, 2), True),
        ((2,), (1,), (2,), True),
    ],
)
def test_strides_that_reach_something(shape, strides, others, matter):
    one, other = torch.zeros(8).as_strided(shape, strides), torch.zeros(8).as_strided(shape, others)
    wrong = differences(returning(a=one), returning(a=other))
    assert [text.split(":")[0] for text in wrong] == ["cache.a.strides"] * matter


def test_not_a_number_is_itself():
    nan = torch.full((2,), float("nan"))
    assert differences(returning(a=nan), returning(a=nan.clone())) == []


def test_keys_and_their_order():
    both = returning(a=LONG, b=LONG)
    assert differences(both, returning(b=LONG, a=LONG)) == ["cache.order: ['a', 'b'] and ['b', 'a']"]
    assert differences(both, returning(a=LONG)) == ["cache.b: theirs alone"]
    assert differences(returning(a=LONG), both) == ["cache.b: ours alone"]


def test_what_may_differ_is_told():
    other = returning(a=LONG.t().contiguous().t())
    assert differences(returning(a=LONG), other, but=("strides",)) == []


def raising(error):
    def call():
        raise error

    return seen(call)


def test_errors_by_their_class_and_text():
    assert differences(raising(ValueError("a")), raising(ValueError("a"))) == []
    for other in (raising(ValueError("b")), raising(TypeError("a"))):
        assert [text.split(":")[0] for text in differences(raising(ValueError("a")), other)] == ["error"]
    assert differences(raising(ValueError("a")), returning(a=LONG)) == ["error: ('ValueError', 'a') and None"]
    assert "output: None and a value" in differences(raising(ValueError("a")), returning(a=LONG), but=("error",))


def test_warnings_and_random_numbers():
    def warning(text):
        warnings.warn(text, stacklevel=1)
        return torch.ones(1), {}

    plain = seen(lambda: (torch.ones(1), {}))
    assert differences(seen(lambda: warning("a")), plain)[0].startswith("warned: ")
    assert differences(seen(lambda: warning("a")), seen(lambda: warning("b")))[0].startswith("warned: ")
    drawn = seen(lambda: (torch.rand(1) * 0 + 1, {}))
    assert [text.split(":")[0] for text in differences(plain, drawn)] == ["random.bytes"]


def test_a_warning_of_the_backward_has_no_place_and_others_have():
    def warning(text):
        warnings.warn(text, stacklevel=1)
        return torch.ones(1), {}

    plain, *found = (seen(call) for call in (lambda: (torch.ones(1), {}), *(partial(warning, text) for text in TEXTS)))
    backward, other = (of_any_backward(one) for one in found)
    assert backward.warned == [("UserWarning", TEXTS[0])]
    assert other.warned == found[1].warned
    assert differences(of_any_backward(plain), backward)[0].startswith("warned: ")


def test_parameter_gradients():
    def backward(model):
        model.layer.weight.sum().backward()
        return torch.ones(1), {}

    model, other = root_module(), root_module()
    wrong = differences(seen(lambda: backward(model), model), seen(lambda: (torch.ones(1), {}), other))
    assert [text.split(":")[0] for text in wrong] == ["grads.layer.weight"]


def test_what_is_left_in_a_model():
    model = root_module()

    def left(change):
        before = marks(model)
        change()
        return [place.split(" ") for place in changes(before, marks(model))]

    assert left(lambda: None) == []
    assert left(lambda: model.layer.register_forward_hook(print)) == [["layer", "_forward_hooks"]]
    assert ["hook_in", "fwd_hooks"] in left(lambda: model.hook_in.add_hook(lambda value, hook: None))
    assert ["hook_in", "bwd_hooks"] in left(lambda: model.hook_in.add_hook(lambda grad, hook: None, dir="bwd"))
    assert left(lambda: vars(model).update(extra=[])) == [["", "attributes"]]
    assert left(lambda: model.train(not model.training))[0] == ["", "training"]


def test_a_way_that_gives_something_else_is_found():
    """From end to end: ours with another gradient, with another error, and where theirs refuses."""
    model, x = root_module(), torch.randn(2, 3, 16)

    def make(run):
        return run(x, incl_bwd=True)

    assert compared(model, {"loss, all": Call(make)}) == ([], 1)
    # The sum over the calls of a point, where theirs keeps the last.
    summed = Call(make, mine=lambda run: lens.run_with_cache(model, x, incl_bwd=True, params=True))
    wrong, _ = compared(model, {"loss, all": summed})
    assert sorted(text.split(": ")[0] for text in wrong) == [f"loss, all; {way}" for way in sorted(OURS)]
    assert all("hook_twice_grad.bytes" in text for text in wrong)
    refused = Call(lambda run: run(x, wrong=1), ours=REFUSED, mine=lambda run: run(x))
    wrong, _ = compared(model, {"an unknown argument, all": refused})
    assert sum("; ours" in text and "unexpected keyword" in text for text in wrong) == len(OURS)


def test_ways_are_what_they_say():
    model = root_module()
    own = model.run_with_cache
    with going("theirs", model) as run:
        assert run == own
    for way in ("accelerate, native", "install, native"):
        with going(way, model) as run:
            assert run != own
        assert model.run_with_cache == own
    with going("ours, python", model) as run:
        assert run.func is lens.run_with_cache
        assert run.keywords["backend"] == "python"
