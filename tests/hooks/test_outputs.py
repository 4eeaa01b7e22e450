"""Which output of a module is captured: tuples, lists, mappings, and what full hooks make of them."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import SETUPS, Pair, Setup, activation_gradients, inputs, uneven
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


@pytest.mark.filterwarnings(NO_ROWS, "ignore:For backward hooks to be called")  # PyTorch's, before it asks
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


@dataclass
class Plain:
    name: str
    first: torch.Tensor
    second: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    name: str
    first: torch.Tensor
    second: torch.Tensor


@dataclass(frozen=True, slots=True)
class Slots:
    name: str
    first: torch.Tensor
    second: torch.Tensor

    def __post_init__(self):
        if not self.name:
            raise ValueError("made anew")


class Makes(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize("kind", [Plain, Frozen, Slots])
@pytest.mark.parametrize("output, factor", [(None, 5.0), ("second", 7.0), (2, 7.0), (-2, 5.0)])
def test_dataclasses_keep_their_type_and_other_fields(backend, kind, output, factor):
    model, x = nn.Sequential(Makes(lambda x: kind("n", x * 2, x * 3))), inputs()
    with tlfast.capture(model, "0", output=output, rows=4, backend=backend) as cap:
        out = model(x)
        assert type(out) is kind
        assert out.name == "n"
        (out.first * 5 + out.second * 7).sum().backward()
    assert_rows(cap, "0", torch.full_like(x, factor))
    assert_same_bits(x.grad, torch.full_like(x, 31.0))


@pytest.mark.filterwarnings(NO_ROWS)
def test_an_object_with_tensors_is_refused_with_a_remedy_that_exists(backend):
    model = nn.Sequential(Makes(lambda x: SimpleNamespace(first=x * 2)))
    with tlfast.capture(model, "0", rows=4, backend=backend), pytest.raises(TypeError) as error:
        model(inputs())
    assert str(error.value) == (
        "capture at 0: the output must be a tensor, tuple, list, mapping or dataclass, got SimpleNamespace. Capture a "
        "module inside that puts out the tensor."
    )


@pytest.mark.filterwarnings(NO_ROWS)
@pytest.mark.parametrize(
    "make, others",
    [
        (lambda x: (x.detach(), x * 2, x * 3), "output=1 or output=2"),
        (lambda x: {"places": x.detach(), "hidden": x * 2}, "output='hidden'"),
        (lambda x: Plain("n", x.detach(), x * 2), "output='second'"),
    ],
    ids=["tuple", "mapping", "dataclass"],
)
def test_a_first_tensor_without_a_graph_is_an_error_and_not_the_next_one(backend, attach, make, others):
    model, x = nn.Sequential(Makes(make)), inputs()
    if attach == "full" and not isinstance(make(x), tuple):
        return
    with tlfast.capture(model, "0", rows=4, attach=attach, backend=backend), pytest.raises(RuntimeError) as error:
        model(x)
    assert str(error.value) == (
        "capture at 0: the output must require grad, got a tensor without a graph: no gradient can reach it. "
        f'Choose one that has a graph, {others}, or pass missing="nan".'
    )


@pytest.mark.parametrize("output", [None, 0, -3])
def test_an_unused_output_beside_others_names_them(backend, attach, output):
    def make(x):
        return x * 2, x * 3, torch.topk(x, 2)[1]

    model, x = nn.Sequential(Makes(make), Makes(lambda pair: pair[1])), inputs()
    with tlfast.capture(model, ["1"], rows=4, attach=attach, backend=backend) as right:
        uneven(model(x)).backward()
    with tlfast.capture(model, "0", output=1, rows=4, attach=attach, backend=backend) as cap:
        uneven(model(x)).backward()
    assert_rows(cap, "0", right["1"])
    specs = [tlfast.Spec("0", output=output), tlfast.Spec("1")]
    with (
        pytest.warns(UserWarning, match="capture: no backward reached the points"),
        tlfast.capture(model, specs, rows=4, attach=attach, backend=backend),
        pytest.raises(RuntimeError) as error,
    ):
        uneven(model(x)).backward()
    assert str(error.value) == (
        "capture: every point must fire in a backward, got no gradient at 0 (called, but the backward does not go "
        'through the output). Choose output=1 at 0, or leave these points out, or pass missing="nan" for NaN rows.'
    )


def test_struct_sequences_as_topk_gives_them(backend):
    model, x = nn.Sequential(Makes(lambda x: torch.topk(x * 2, 2))), inputs()
    with tlfast.capture(model, "0", rows=4, backend=backend) as cap:
        out = model(x)
        assert type(out) is torch.return_types.topk
        uneven(out.values).backward()
    out = model(x)
    assert_same_bits(out.values, torch.topk(x * 2, 2).values)
    assert_rows(cap, "0", torch.autograd.grad(uneven(out.values), out.values)[0])


@pytest.mark.filterwarnings(NO_ROWS)
def test_full_hooks_can_not_make_struct_sequences(backend):
    model = nn.Sequential(Makes(lambda x: torch.topk(x * 2, 2)))
    with tlfast.capture(model, "0", rows=4, attach="full", backend=backend), pytest.raises(TypeError) as error:
        model(inputs())
    assert str(error.value) == (
        'capture at 0: the output must be a tensor or a tuple with attach="full", got topk. Use attach="tensor".'
    )


@pytest.mark.parametrize("output", [None, 1])
def test_a_router_whose_logits_nothing_uses(backend, attach, output):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2, max_position_embeddings=8,
    )  # fmt: skip
    model, batch, layer = MixtralForCausalLM(config).eval(), torch.randint(11, (2, 4)), "model.layers.0.mlp.gate"
    setup = Setup(model, [layer], lambda: uneven(model(batch).logits), output=1)
    right = activation_gradients(setup)[layer][0]
    assert right.abs().max() > 0
    cap = tlfast.capture(model, layer, output=output, rows=16, attach=attach, backend=backend)
    with (
        pytest.warns(UserWarning, match="capture") if output is None else nullcontext() as warned,
        tlfast.freeze(model),
        cap,
    ):
        setup.loss().backward()
    if output is None:
        assert str(warned[0].message) == (
            "capture: no backward reached the points, so there are no rows. The points were called and a backward ran, "
            f"but its loss isn't made of their outputs: choose points that it uses, or output=1 at {layer}."
        )
    else:
        assert_rows(cap, layer, right)
