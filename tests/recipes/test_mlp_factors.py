"""The factors of an MLP's gradients: multiplied they are the gradients that autograd gives the weights."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from tlfast.recipes import backward_lens

EXAMPLES = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
MATRICES = {"gpt2": ("c_fc", "c_proj"), "llama": ("gate_proj", "up_proj", "down_proj")}


def loss(logits, batch):
    """Of each example, over its real tokens."""
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.next_tokens.flatten(), ignore_index=-100, reduction="none"
    )
    return flat.view(batch.input_ids.shape).sum(1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_products_of_factors_are_gradients_of_weights(kind, side):
    model = tiny_model(kind, torch.float64)
    found = backward_lens(model, EXAMPLES, loss, padding_side=side, batch_examples=2)
    assert len(found.factors) == 2 * len(MATRICES[kind])
    assert {name.rpartition(".")[2] for name in found.factors} == set(MATRICES[kind])
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    for k, tokens in enumerate(EXAMPLES):
        ids = torch.tensor([tokens])
        value = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        model.zero_grad()
        value.backward()
        assert float(found.values[k]) == pytest.approx(value.item(), rel=1e-10)
        for name, factors in found.factors.items():
            truth = model.get_submodule(name).weight.grad
            truth = truth.T if kind == "gpt2" else truth
            made = factors.output_gradients[k].T @ factors.inputs[k]
            assert torch.allclose(made, truth, rtol=1e-9, atol=1e-12 * float(truth.abs().max()))
            assert torch.allclose(factors.weight_gradient(k).double(), truth, atol=1e-5 * float(truth.abs().max()))
            assert len(factors.inputs[k]) == len(tokens)


def test_named_matrices_alone():
    found = backward_lens(tiny_model("gpt2"), EXAMPLES, loss, "transformer.h.1.mlp.c_fc")
    assert list(found.factors) == ["transformer.h.1.mlp.c_fc"]


def test_a_model_without_known_names():
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 20))
    with pytest.raises(ValueError, match="backward_lens: points must be given where no MLP is found, got a Sequential"):
        backward_lens(model, EXAMPLES, loss)
