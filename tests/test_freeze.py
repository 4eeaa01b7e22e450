"""Freeze: no parameter gradients, the same activation gradients, and everything as it was afterwards."""

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import SETUPS, Chain, Residual, hooks_left, inputs, tokens, uneven
from torch import nn

import tlfast
from tlfast.freeze import find_embedding


def required(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_parameters_and_hooks_are_as_before():
    model = Residual()
    model.blocks[0].up.weight.requires_grad_(False)
    before = required(model)
    with tlfast.freeze(model) as frozen:
        assert frozen is model
        assert not any(required(model).values())
        out = model(tokens())
        assert out.requires_grad
        uneven(out).backward()
    assert required(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert not hooks_left(model)
    assert model.embed(tokens()).requires_grad
    uneven(model(tokens())).backward()
    assert model.embed.weight.grad is not None


def test_parameters_are_as_before_after_an_error_and_when_nested():
    model = Residual()
    before = required(model)

    def fails():
        with tlfast.freeze(model), tlfast.freeze(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert required(model) == before
    assert not hooks_left(model)


def test_everything_frozen_from_the_start_can_be_captured(backend, attach):
    setup = SETUPS["residual"]()
    with tlfast.capture(setup.model, setup.points, rows=4, attach=attach, backend=backend) as right:
        setup.loss().backward()
    setup.model.requires_grad_(False)
    with (
        tlfast.freeze(setup.model),
        tlfast.capture(setup.model, setup.points, rows=4, attach=attach, backend=backend) as cap,
    ):
        setup.loss().backward()
    for name in setup.points:
        assert_rows(cap, name, right[name])
    assert not any(required(setup.model).values())


def test_no_grad_stays_without_grad():
    model = Residual()
    with tlfast.freeze(model), torch.no_grad():
        assert not model(tokens()).requires_grad


def test_the_output_of_the_embedding_is_what_it_was():
    model, batch = Residual(), tokens()
    right = model(batch)
    with tlfast.freeze(model):
        assert_same_bits(model(batch), right)


def test_which_embedding():
    model = Residual()
    assert find_embedding(model) is model.embed
    several = nn.ModuleDict({"x": nn.Linear(2, 2), "words": nn.Embedding(2, 2), "places": nn.Embedding(2, 2)})
    assert find_embedding(several) is several["words"]
    hugging_face = SETUPS["gpt2"]().model
    assert find_embedding(hugging_face) is hugging_face.transformer.wte

    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(2, 2)

        def get_input_embeddings(self):
            raise NotImplementedError

    refuses = Refuses()
    assert find_embedding(refuses) is refuses.words


def test_no_embedding_is_an_error_unless_it_is_named():
    model = Chain()
    with (
        pytest.raises(ValueError, match="freeze: model must have an embedding, got Chain") as error,
        tlfast.freeze(model),
    ):
        raise AssertionError("entered")
    assert "Pass embedding=<the module whose output the gradients start from>." in str(error.value)
    assert all(required(model).values())
    with tlfast.freeze(model, embedding=model.linear):
        out = model(inputs().detach())
        assert out.requires_grad
        out.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_an_embedding_that_puts_out_something_else():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.ModuleDict({"embed": Pair()})
    with tlfast.freeze(model, embedding=model["embed"]), pytest.raises(TypeError) as error:
        model["embed"](inputs())
    assert str(error.value) == "freeze: the embedding's output must be a tensor, got tuple. Pass embedding=."


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_and_compiled(backend):
    import torch._dynamo

    setup = SETUPS["residual"]()
    points = ["blocks.0", "blocks.1.hook_mlp_out"]
    with tlfast.capture(setup.model, points, rows=4, backend=backend) as right:
        setup.loss().backward()
    torch._dynamo.reset()
    setup.model.zero_grad()
    with tlfast.freeze(setup.model), tlfast.capture(setup.model, points, rows=4, backend=backend) as cap:
        torch.compile(setup.loss, backend="aot_eager", fullgraph=True)().backward()
    torch._dynamo.reset()
    for name in points:
        torch.testing.assert_close(cap[name], right[name], rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in setup.model.parameters())
