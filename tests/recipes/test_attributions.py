"""Integrated gradients are complete, saliency is gradient times input, and neither a token nor padding leaks out."""

from __future__ import annotations

import html
import re

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_model
from torch import nn

from tlfast.recipes import integrated_gradients, saliency
from tlfast.recipes.attributions import Attributions

EXAMPLES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
TEXTS = ["<b>now</b>\n", "\x1b[31mred", "&"]


def last(logits, batch):
    """The logit of token 65 behind the last real token."""
    n, n_positions = batch.input_ids.shape
    real = torch.ones(n, n_positions, dtype=torch.bool) if batch.mask is None else batch.mask
    return logits[torch.arange(n), (real * torch.arange(n_positions)).amax(1), 65]


def alone(model, tokens, metric=last):
    """Embeddings [P, D] of one example, their gradient and the metric, by torch alone."""
    model.eval()
    e = model.get_input_embeddings()(torch.tensor([tokens])).detach().requires_grad_()
    value = model(inputs_embeds=e).logits[0, -1, 65]
    (grad,) = torch.autograd.grad(value, e)
    return e.detach()[0], grad[0], value.item()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_saliency_is_gradient_times_input(kind, side):
    model = tiny_model(kind, torch.float64)
    model.train()
    found = saliency(model, EXAMPLES, last, padding_side=side, batch_examples=2)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for scores, value, tokens in zip(found.scores, found.values, EXAMPLES, strict=True):
        e, grad, truth = alone(model, tokens)
        terms = (e * grad).abs().sum(1)
        bound = torch.finfo(torch.float32).eps * terms + 1e-10 * terms.max()
        assert ((scores - (e * grad).sum(1)).abs() <= bound).all()
        assert float(value) == pytest.approx(truth, rel=1e-10)
    assert found.tokens == [[f"[{token}]" for token in tokens] for tokens in EXAMPLES]
    assert found.delta is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_integrated_gradients_are_the_mean_gradient_on_the_way(side):
    model = tiny_model("gpt2", torch.float64).eval()
    found = integrated_gradients(model, EXAMPLES, last, steps=20, padding_side=side, batch_examples=5)
    assert found.delta.abs().max() < 1e-6 * found.values.abs().max()  # completeness
    for scores, tokens in zip(found.scores, EXAMPLES, strict=True):
        e, _, _ = alone(model, tokens)
        places = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        points = (places[:, None, None] * e).requires_grad_()
        (grads,) = torch.autograd.grad(model(inputs_embeds=points).logits[:, -1, 65].sum(), points)
        truth = (grads.mean(0) * e).sum(1)
        assert torch.allclose(scores.double(), truth, atol=1e-4 * float(truth.abs().max()))  # by another quadrature


def test_a_baseline_of_a_token_where_zero_is_no_place_to_be():
    model = tiny_model("llama", torch.float64)
    found = integrated_gradients(model, EXAMPLES, last, baseline=32, steps=32)
    assert found.delta.abs().max() < 1e-4 * found.values.abs().max()
    same = integrated_gradients(model, EXAMPLES, last, model.get_input_embeddings().weight[32], steps=32)
    assert all(torch.equal(one, other) for one, other in zip(found.scores, same.scores, strict=True))
    # A norm of RMS jumps at zero: what doesn't add up is said.
    assert integrated_gradients(model, EXAMPLES, last, steps=32).delta.abs().max() > 0.1


def test_an_input_of_numbers():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()

    def metric(output, given):
        assert given.shape == (*output.shape[:1], 3)
        return output[:, 0] * given[:, 1].detach()

    start = torch.tensor([0.1, 0.2, 0.3])
    found = integrated_gradients(model, x, lambda output, given: output[:, 0], start, 16, batch_examples=2)
    assert found.delta.abs().max() < 1e-6  # scores are float32
    whole = integrated_gradients(model, x, lambda output, given: output[:, 0], start, 16, batch_examples=64)
    assert torch.allclose(torch.stack(found.scores), torch.stack(whole.scores))
    assert len(integrated_gradients(model, x, metric)) == 5
    linear = integrated_gradients(model[0], x, lambda output, given: output[:, 1], steps=1)
    assert torch.allclose(torch.stack(linear.scores), (x * model[0].weight[1]).float())


def test_fields_go_with_their_examples():
    model = tiny_model("gpt2", torch.float64)
    examples = [{"input_ids": tokens, "answer": 60 + k} for k, tokens in enumerate(EXAMPLES)]

    def answer(logits, batch):
        n, n_positions = batch.input_ids.shape
        real = torch.ones(n, n_positions, dtype=torch.bool) if batch.mask is None else batch.mask
        return logits[torch.arange(n), (real * torch.arange(n_positions)).amax(1), batch["answer"]]

    for function in (saliency, integrated_gradients):
        found = function(model, examples, answer, batch_examples=4)
        model.eval()
        for k, tokens in enumerate(EXAMPLES):
            truth = model(torch.tensor([tokens])).logits[0, -1, 60 + k]
            assert float(found.values[k]) == pytest.approx(truth.item(), rel=1e-10)


def test_another_module_than_the_embedding():
    model = tiny_model("gpt2", torch.float64)
    start = torch.linspace(-1, 1, 16)  # at zeros a norm of the layer nearly jumps
    found = integrated_gradients(model, EXAMPLES, last, start, 24, embedding="transformer.h.0")
    assert found.delta.abs().max() < 1e-3 * found.values.abs().max()
    assert [len(scores) for scores in found.scores] == [6, 2, 4]


def test_how_it_is_drawn():
    found = saliency(tiny_model("gpt2"), TEXTS, last, tokenizer=byte_tokenizer())
    drawn = found._repr_html_()
    assert "<b>" not in drawn
    assert "\x1b" not in html.unescape(re.sub(r"<[^>]*>", "", str(found)))
    text = html.unescape(re.sub(r"<small>.*?</small> |<[^>]*>", "", drawn))
    assert text == "".join(TEXTS)
    in_terminal = re.sub(r"\x1b\[[0-9;]*m", "", found.terminal())
    assert in_terminal == "<b>now</b>\u00b7\n\u00b7[31mred\n&"
    assert len(str(found).splitlines()) == 3 + sum(len(text) for text in TEXTS)
    assert repr(found) == "<Attributions of 3 examples; print it, or let a notebook show it>"


def test_colours_say_which_way():
    scores = torch.tensor([2.0, -2.0, 0.0, float("nan"), float("inf")])
    found = Attributions([scores], torch.tensor([1.0]), tokens=[list("abcde")])
    colours = re.findall(r"48;5;(\d+)m", found.terminal())
    assert colours == ["196", "21", "231", "231", "231"]  # red, blue, white
    assert re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", found.html()) == [
        ("214", "1.00"), ("52", "1.00"), ("52", "0.00"), ("52", "0.00"), ("52", "0.00"),
    ]  # fmt: skip
    assert Attributions([torch.zeros(2)], torch.zeros(1)).html().count("0.00)") == 2


def first(logits, batch):
    return logits[:, 0, 0]


@pytest.mark.parametrize("function", [saliency, integrated_gradients])
@pytest.mark.parametrize(
    "text, changed",
    [
        (r"metric must return \[1\], a number each, got \[1, 6\]", {"metric": lambda logits, batch: logits[:, :, 0]}),
        (r"metric must return a tensor, got float", {"metric": lambda logits, batch: 1.0}),
        ("metric must have a gradient, got a value without a graph",
         {"metric": lambda logits, batch: logits.argmax(2)[:, -1].float()}),
        ("batches must hold examples, got none", {"batch": []}),
        ("tokenizer must be given for texts, got None", {"batch": ["text"]}),
        ('padding_side must be "right" or "left", got \'both\'', {"padding_side": "both"}),
        ("batch_examples must be a positive number, got 0", {"batch_examples": 0}),
        ("fields of the examples must be used by the model or the metric, got answer",
         {"batch": [{"input_ids": [1, 2, 3], "answer": 4}]}),
        ("embedding must match a module, got 'absent'", {"embedding": "absent"}),
        ("embedding must be one module, got 2 of them", {"embedding": "transformer.h.*"}),
    ],
)  # fmt: skip
def test_what_is_refused(function, text, changed):
    settings = {"batch": EXAMPLES[:1], "metric": first} | changed
    model = tiny_model("gpt2")
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"{function.__name__}: {text}"):
        function(model, settings.pop("batch"), settings.pop("metric"), **settings)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "text, changed",
    [
        ("steps must be a positive number, got 0", {"steps": 0}),
        ("baseline must be a tensor, the number of a token, or None, got '", {"baseline": "zero"}),
        ("baseline must be a token of the 256, got 256", {"baseline": 256}),
        (r"baseline must be \[D\], or \[P, D\] where all have one length, got \[1, 3, 16\] for examples of several",
         {"inputs": [[1, 2, 3], [4, 5]], "baseline": torch.zeros(1, 3, 16)}),
        (r"baseline must be \[D\], or \[P, D\] where all have one length, got \[2, 3, 16\] for several examples",
         {"inputs": [[1, 2, 3], [4, 5, 6]], "baseline": torch.zeros(2, 3, 16)}),
        (r"baseline must broadcast to \[1, 6, 16\], got \[7\]", {"baseline": torch.zeros(7)}),
        ("embedding must be left out for a floating-point input, got str",
         {"inputs": torch.zeros(2, 3), "embedding": "0"}),
        (r"inputs must be a batch \[B, ...\], got \[3\]", {"inputs": torch.zeros(3)}),
        ("baseline must be a tensor, or None, got 3", {"inputs": torch.zeros(2, 3), "baseline": 3}),
        ("transformer.h.0.mlp.dropout must be called once in a forward, got 2 calls",
         {"embedding": "transformer.h.0.mlp.dropout"}),
    ],
)  # fmt: skip
def test_what_a_path_refuses(text, changed):
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.dropout = model.transformer.h[0].mlp.dropout
    settings = {"inputs": EXAMPLES[:1]} | changed
    with pytest.raises((ValueError, TypeError), match=f"integrated_gradients: {text}"):
        integrated_gradients(model, settings.pop("inputs"), first, **settings)
