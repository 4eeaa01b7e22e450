"""Influence against training again without each example, of a convex model that is solved exactly, in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import tlfast

N, WIDTH, CLASSES, DECAY = 40, 4, 3, 0.1
SETTINGS = {"points": ["0"], "bias": True, "embedding": "0", "k": None}


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


def data():
    """Examples of three classes, four of them with a wrong label, and others to ask about."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(N + 5) % CLASSES
    x = torch.eye(WIDTH, dtype=torch.float64)[y] + 0.5 * torch.randn(N + 5, WIDTH, generator=draw, dtype=torch.float64)
    y[:4] = (y[:4] + 1) % CLASSES
    return x, y


def inputs_of(x):
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def weight_of(model):
    return torch.cat([model[0].weight.data, model[0].bias.data[:, None]], 1)


def gradients_of(weights, inputs, y):
    """Of each example, at several weights [M, C, D + 1] with the bias last: the gradients [M, N, C * (D + 1)], and the
    curvature of its loss."""
    chances = (inputs @ weights.mT).softmax(-1)
    errors = chances - nn.functional.one_hot(y, CLASSES)
    outer = torch.diag_embed(chances) - chances[..., None] * chances[..., None, :]
    curvature = torch.einsum("mncd,ni,nj->mncidj", outer, inputs, inputs).flatten(2, 3).flatten(3)
    return (errors[..., None] * inputs[:, None]).flatten(2), curvature


def solved(inputs, y, kept):
    """For each row of ``kept`` [M, N] the only weight whose gradient is zero, by Newton; and the curvature there."""
    size = CLASSES * inputs.shape[1]
    weights = torch.zeros(len(kept), CLASSES, inputs.shape[1], dtype=torch.float64)
    for _ in range(8):
        gradients, curvatures = gradients_of(weights, inputs, y)
        gradient = torch.einsum("mn,mnd->md", kept, gradients) + DECAY * N * weights.flatten(1)
        curvature = torch.einsum("mn,mnde->mde", kept, curvatures) + DECAY * N * torch.eye(size)
        weights = weights - torch.linalg.solve(curvature, gradient).view_as(weights)
    assert gradient.norm() < 1e-9
    return weights, curvature[0]


@functools.cache
def trained():
    """The model, what each question's loss rises by without each example [Q, N], and the exact influence."""
    x, y = data()
    inputs = inputs_of(x)
    kept = torch.cat([torch.ones(1, N), 1 - torch.eye(N)]).double()  # the first has all examples
    weights, curvature = solved(inputs[:N], y[:N], kept)
    model = nn.Sequential(nn.Linear(WIDTH, CLASSES)).double()
    model[0].weight.data, model[0].bias.data = weights[0, :, :-1].clone(), weights[0, :, -1].clone()
    losses = -(inputs[N:] @ weights.mT).log_softmax(-1)[:, torch.arange(len(y) - N), y[N:]]  # [1 + N, Q]
    (gradients,), _ = gradients_of(weights[:1], inputs, y)
    influence = gradients[N:] @ torch.linalg.solve(curvature, gradients[:N].T)
    return model, (losses[1:] - losses[0]).T, influence


def examples(part):
    x, y = data()
    return [{"x": a, "y": b} for a, b in zip(x[part], y[part], strict=True)]


def agreement(one, other):
    """Spearman's rank correlation, the least of all questions."""
    ranks = [values.argsort(1).argsort(1).double() for values in (one, other)]
    return min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True))


def loss_of_each_label(model, batch):
    """The loss of a label, weighed so that squares of its gradient count as often as the model would draw it."""
    logits = model(batch["x"])
    chances = logits.detach().softmax(1).gather(1, batch["label"][:, None])[:, 0]
    return (chances.sqrt() * nn.functional.cross_entropy(logits, batch["label"], reduction="none")).sum()


def test_influence_ranks_examples_as_training_again_without_each_does():
    model, rises, exact = trained()
    assert agreement(exact, rises) > 0.99
    x, _ = data()
    every = [{"x": one, "label": torch.tensor(label)} for label in range(CLASSES) for one in x[:N]]
    factors = tlfast.factors(
        model, every, ["0"], kinds=("kfac", "ekfac"), bias=True, loss=loss_of_each_label, embedding="0"
    )
    curvature = factors["0"].eigenvalues.sum() * CLASSES  # of an example: the labels are weighed by their chances
    damping = float(DECAY / (curvature / factors["0"].eigenvalues.numel()))
    settings = SETTINGS | {"examples": examples(slice(0, N)), "loss": loss_of}
    found = {
        method: tlfast.score(model, examples(slice(N, None)), method, **settings, **more).scores
        for method, more in (("ekfac", {"moments": factors, "damping": damping}), ("dot", {}), ("cosine", {}))
    }
    (gradients,), _ = gradients_of(weight_of(model)[None], inputs_of(x), data()[1])
    torch.testing.assert_close(found["dot"], gradients[N:] @ gradients[:N].T)
    assert agreement(found["ekfac"], rises) > 0.95
    assert agreement(found["ekfac"], rises) > agreement(found["dot"], rises)
    ratio = found["ekfac"] / (CLASSES * N) / rises
    assert 0.7 < float(ratio.median()) < 1.4
    assert agreement(rises, -rises) == pytest.approx(-1)
