"""Which output of a module is captured: tuples, lists, mappings, and what full hooks make of them."""

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import SETUPS, Pair, activation_gradients, inputs, uneven
from torch import nn

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"


@pytest.mark.parametrize("output", ["second", 2])
def test_outputs_of_mappings_by_key(backend, output):
    from models import Named

    class Indexed(dict):
        """As Hugging Face outputs: values by position, too."""

        def __getitem__(self, key):
            return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

        def copy(self):
            return Indexed(self)

    model, x = nn.Sequential(Named(Indexed)), inputs()
    with tlfast.capture(model, "0", output=output, rows=4, backend=backend) as cap:
        out = model(x)
        assert type(out) is Indexed
        (uneven(out["first"]) + uneven(out["second"])).backward()
    out = model(x)
    assert_rows(cap, "0", torch.autograd.grad(uneven(out["second"]), out["second"])[0])


@pytest.mark.parametrize("output, right", [(None, "first"), ("second", "second"), (1, "second"), (0, "first")])
def test_outputs_of_hugging_face_models(backend, output, right):
    from dataclasses import dataclass

    from transformers.utils import ModelOutput

    @dataclass
    class Output(ModelOutput):
        first: torch.Tensor | None = None
        second: torch.Tensor | None = None

    class Model(nn.Module):
        def forward(self, x):
            return Output(first=x * 2, second=x * 3)

    factor = {"first": 5.0, "second": 7.0}
    model, x = nn.Sequential(Model()), inputs()
    with tlfast.capture(model, "0", output=output, rows=4, backend=backend) as cap:
        out = model(x)
        assert type(out) is Output
        (out.first * 5 + out["second"] * 7).sum().backward()
    assert_same_bits(x.grad, torch.full_like(x, 31.0))
    assert_rows(cap, "0", torch.full_like(x, factor[right]))


def test_named_tuples_and_lists_keep_their_type(backend):
    from typing import NamedTuple

    class Both(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    class Model(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, x):
            return self.make(x * 2, x * 3)

    for make, kind in ((Both, Both), (lambda *xs: list(xs), list), (lambda *xs: xs, tuple)):
        model, x = nn.Sequential(Model(make)), inputs()
        with tlfast.capture(model, "0", output=1, rows=4, backend=backend) as cap:
            out = model(x)
            assert type(out) is kind
            (out[0].sum() * 5 + out[1].sum() * 7).backward()
        assert_rows(cap, "0", torch.full_like(x, 7.0))
        assert_same_bits(x.grad, torch.full_like(x, 31.0))


def test_negative_index_of_an_output(backend, attach):
    setup = SETUPS["second_of_pair"]()
    right = activation_gradients(setup)["0"][0]
    with tlfast.capture(setup.model, "0", output=-1, rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    assert_rows(cap, "0", right)


def test_an_unused_first_output_is_missing_and_not_the_second(backend, attach):
    class Model(nn.Module):
        def forward(self, x):
            return x * 2, x * 3

    def step():
        return uneven(model[1](model[0](x)[1]))

    model, x = nn.Sequential(Model(), nn.Identity()), inputs()
    with tlfast.capture(model, ["0", "1"], rows=7, attach=attach, backend=backend, missing="nan") as cap:
        uneven(model[1](model[0](x)[0])).backward()
        step().backward()
    assert_same_bits(cap["0"][:3], cap["1"][:3])
    assert cap["0"][3:].isnan().all()
    assert cap.missing["0"].tolist() == [False] * 3 + [True] * 3
    assert not cap.missing["1"].any()
    with tlfast.capture(model, ["0", "1"], rows=7, attach=attach, backend=backend):
        uneven(model[1](model[0](x)[0])).backward()
        with pytest.raises(RuntimeError, match="no gradient at 0"):
            step().backward()


@pytest.mark.filterwarnings(NO_ROWS)
def test_output_without_a_tensor(backend, attach):
    model, x = nn.Sequential(Pair()), inputs()
    for output, rule in ((None, "hold a tensor"), (7, "hold 7"), (0, "hold 0")):

        class Nothing(nn.Module):
            def forward(self, x):
                return ("no", None)

        target = nn.Sequential(Nothing()) if output is None else model
        with tlfast.capture(target, "0", output=output, rows=4, attach=attach, backend=backend):
            with pytest.raises(TypeError) as error:
                target(x)
            assert str(error.value) == (
                f"capture at 0: the output must {rule}, got tuple. Choose it with output=<index or key>."
            )


@pytest.mark.filterwarnings(NO_ROWS)
def test_full_hooks_can_not_see_mappings_and_lists(backend):
    for value, kind in (({"a": 1}, "dict"), ([1], "list")):

        class Holds(nn.Module):
            def forward(self, x, value=value):
                return {"a": x * 2} if isinstance(value, dict) else [x * 2]

        model = nn.Sequential(Holds())
        with tlfast.capture(model, "0", rows=4, attach="full", backend=backend):
            with pytest.raises(TypeError) as error:
                model(inputs())
            assert str(error.value) == (
                f'capture at 0: the output must be a tensor or a tuple with attach="full", got {kind}. '
                'Use attach="tensor".'
            )
