"""Freeze: no parameter gradients, the same activation gradients, and everything as it was afterwards."""

import re
import warnings

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import SETUPS, Chain, Residual, Setup, activation_gradients, hooks_left, inputs, tokens, uneven
from torch import nn

import tlfast
from tlfast.hooks.freeze import find_embedding, find_embeddings


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
    class Sizes(nn.Module):
        def forward(self, x):
            return x.shape, torch.arange(3)

    model = nn.ModuleDict({"embed": Sizes()})
    with tlfast.freeze(model, embedding=model["embed"]), pytest.raises(TypeError) as error:
        model["embed"](inputs())
    assert str(error.value) == (
        "freeze: the output of embed must hold a floating-point tensor, got tuple. Name another module by embedding=."
    )


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


class Towers(nn.Module):
    """Two embeddings, of which the model names one, and a start that is no embedding."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(11, 6), nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, batch):
        return self.first(self.source(batch)) + self.second(self.target(batch))


def test_what_is_said_inside_a_freeze(backend):
    model, batch = Towers(), tokens()
    with tlfast.freeze(model), tlfast.capture(model, ["first", "second"], rows=4, backend=backend) as cap:
        with pytest.raises(RuntimeError) as error:
            model(batch)
        with tlfast.freeze(model, embedding="target"):
            uneven(model(batch)).backward()
    assert cap.rows == 3
    assert str(error.value) == (
        "capture at second: the output must require grad, got a tensor without a graph: no gradient can reach it, "
        "since freeze starts the graph at source. Pass embedding=<a module that is called before this point>, or "
        'missing="nan".'
    )
    with (
        tlfast.freeze(model, embedding=["second"]),
        pytest.warns(UserWarning, match="capture: no backward reached the points"),
        tlfast.capture(model, "first", rows=4, backend=backend),
        pytest.raises(RuntimeError, match=r"freeze starts the graph at second, which was not called\. Pass embedding="),
    ):
        model(batch)


@pytest.mark.parametrize("embedding", ["source and target", "names", "a glob"])
def test_several_embeddings_by_name_or_themselves(backend, attach, embedding):
    model, batch = Towers(), tokens()
    given = {"source and target": [model.source, model.target], "names": ["source", "target"], "a glob": "*[et]"}
    setup = Setup(model, ["source", "target", "first", "second"], lambda: uneven(model(batch)))
    right = activation_gradients(setup)
    model.zero_grad()
    with (
        tlfast.freeze(model, embedding=given[embedding]),
        tlfast.capture(model, setup.points, rows=4, attach=attach, backend=backend) as cap,
    ):
        setup.loss().backward()
    for name in setup.points:
        assert_rows(cap, name, right[name][0])
    assert all(p.grad is None for p in model.parameters())


def test_an_embedding_that_is_none_of_the_models():
    model = Towers()
    for wrong, text in (
        (nn.Embedding(2, 2), "freeze: embedding must be modules of the model, got a Embedding that isn't in it. "),
        ("sorce", "freeze: embedding must match a module, got 'sorce'. Nearest: source"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)), tlfast.freeze(model, embedding=wrong):
            raise AssertionError("entered")
    assert all(required(model).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Embedding(3, 2)))
    with pytest.raises(TypeError) as error, tlfast.freeze(scripted):
        raise AssertionError("entered")
    assert str(error.value) == (
        "freeze: model must run in Python, got RecursiveScriptModule, made by torch.jit. Use the model that it was "
        "made of: code of torch.jit calls no hooks."
    )


def test_all_that_look_tokens_up_and_nothing_else():
    class Part(nn.Module):
        def __init__(self, embed):
            super().__init__()
            self.embed_tokens, self.places = embed, nn.Embedding(8, 6)

        def get_input_embeddings(self):
            return self.embed_tokens

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Embedding(11, 6)
            self.encoder, self.decoder = Part(nn.Embedding(11, 6)), Part(nn.Embedding(11, 6))
            self.decoder.embed_tokens.weight = self.shared.weight
            self.vision = Part(nn.Linear(6, 6))
            self.tied = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.tied.weight = self.head.weight = self.shared.weight

        def get_input_embeddings(self):
            return self.shared

    model = Whole()
    found = [model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.tied]
    assert set(find_embeddings(model)) == set(found)
    assert find_embeddings(model)[0] is model.shared


def test_an_embedding_that_puts_out_a_tuple(backend):
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(6, 6)

        def forward(self, x):
            return x.shape, self.project(x)

    model, x = nn.ModuleDict({"patches": Patches(), "layer": nn.Linear(6, 6)}), inputs().detach()
    with (
        tlfast.freeze(model, embedding="patches"),
        tlfast.capture(model, ["patches", "layer"], rows=4, backend=backend) as cap,
    ):
        sizes, start = model["patches"](x)
        out = model["layer"](start)
        uneven(out).backward()
    assert sizes == x.shape
    right = torch.autograd.grad(uneven(copy := out.detach().requires_grad_()), copy)[0]
    assert_rows(cap, "layer", right)
    assert_rows(cap, "patches", right @ model["layer"].weight)
