"""Norms in a training loop, the noise scale and filters: against per-example gradients, and against Opacus."""

import doctest
import re
import sys

import pytest
import torch
from torch import nn

import tlfast
from tlfast import Spec
from tlfast.attribution import (
    NoiseScale,
    diagnostics,
    el2n,
    gradient_norms,
    hardest,
    mean_gradient_norm,
    score_examples,
)


def network():
    torch.manual_seed(0)
    layers = nn.Embedding(9, 6), nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 5)
    return nn.Sequential(*layers), torch.randint(0, 9, (4, 7)), torch.randint(0, 5, (4, 7))


def loss_of(model, x, y):
    """A mean over examples, as in training."""
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def alone(model, x, y):
    """The flat gradient of each example's own loss, float64 [B, parameters]."""
    wide, rows = network()[0].double(), []
    wide.load_state_dict(model.state_dict())
    for one in zip(x.split(1), y.split(1), strict=True):
        wide.zero_grad()
        loss_of(wide, *one).backward()
        rows.append(torch.cat([p.grad.flatten() for p in wide.parameters()]))
    return torch.stack(rows)


def test_norms_and_the_noise_scale_of_a_training_step():
    model, x, y = network()
    rows = alone(model, x, y)
    noise, optimizer = NoiseScale(), torch.optim.SGD(model.parameters(), lr=0.1)
    with tlfast.capture(model, "*", rows=4, of="weight", reduce="norm", bias=True) as cap:
        with cap.batch(grad_scale=1 / len(x)):
            loss_of(model, x, y).backward()
        assert torch.allclose(gradient_norms(cap), rows.norm(dim=1), rtol=1e-5)
        assert mean_gradient_norm(model, cap) == pytest.approx(rows.mean(0).norm().item(), rel=1e-5)
        noise.add(gradient_norms(cap), mean_gradient_norm(model, cap))
        optimizer.step()
    covariance = rows.T.cov()
    assert noise.noise == pytest.approx(covariance.trace().item(), rel=1e-4)
    signal = rows.mean(0).square().sum() - covariance.trace() / len(rows)
    assert noise.signal == pytest.approx(signal.item(), rel=1e-4)


def test_norms_of_tokens_are_those_of_one_tokens_gradient():
    model, x, y = network()
    spec = Spec("*", "norm", of="weight", bias=True, per="token")
    mask = torch.ones(4, 7, dtype=torch.bool).tril(3)
    with tlfast.capture(model, spec, rows=4) as cap, cap.batch(mask=mask):
        loss_of(model, x, y).backward()
    found = gradient_norms(cap, per="token")
    assert found.shape == (int(mask.sum()),)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x)[1, 2][None], y[1, 2][None]) / x.numel()
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert torch.allclose(found[int(mask[0].sum()) + 2], wanted.double(), rtol=1e-5)
    with pytest.raises(ValueError, match='cap must have columns with of="weight", reduce="norm", per="example"'):
        gradient_norms(cap)


def test_the_noise_scale_is_that_of_known_gradients():
    """Gradients of a known mean and covariance: estimates over many batches come near both."""
    draw, dim = torch.Generator().manual_seed(1), 10
    mean = torch.full((dim,), 0.5)
    noise, recent = NoiseScale(), NoiseScale(decay=0.99)
    for _ in range(800):
        rows = mean + 2 * torch.randn(8, dim, generator=draw)
        for one in (noise, recent):
            one.add(rows.norm(dim=1), rows.mean(0).norm())
    assert noise.value == pytest.approx(4 * dim / (0.25 * dim), rel=0.1)
    assert noise.noise == pytest.approx(4 * dim, rel=0.02)
    assert recent.value == pytest.approx(16, rel=0.3)
    few = NoiseScale()
    assert few.value != few.value
    few.add(torch.ones(2), 0.0)
    assert few.value == float("inf")


@pytest.mark.long
@pytest.mark.peers("opacus")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # at the embedding
def test_norms_are_those_of_opacus():
    from opacus import GradSampleModule

    model, x, y = network()
    with tlfast.capture(model, "*", rows=4, of="weight", reduce="norm", bias=True) as cap:
        loss_of(model, x, y).backward()
    wrapped = GradSampleModule(network()[0], loss_reduction="sum")
    loss_of(wrapped, x, y).backward()
    theirs = torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters()]).sum(0).sqrt()
    assert torch.allclose(gradient_norms(cap).float(), theirs, rtol=1e-5)


def test_el2n_is_the_norm_of_the_error():
    draw = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(3, 4, 6, generator=draw), torch.randint(0, 6, (3, 4), generator=draw)
    labels[1, 2:], labels[2] = -100, -100
    wanted = (logits.softmax(-1) - nn.functional.one_hot(labels.clamp_min(0), 6)).norm(dim=-1)
    found = el2n(logits, labels, per="token")
    assert torch.allclose(found[labels >= 0], wanted[labels >= 0])
    assert found[labels < 0].isnan().all()
    means = torch.stack([wanted[0].mean(), wanted[1, :2].mean()])
    assert torch.allclose(el2n(logits, labels)[:2], means)
    assert el2n(logits, labels)[2].isnan()
    assert torch.allclose(el2n(logits[:, 0], labels[:, 0].clamp_min(0))[:2], wanted[:2, 0])


def test_the_hardest_are_kept_without_those_that_are_skipped():
    scores = torch.tensor([0.5, torch.nan, 0.9, 0.1, torch.inf])
    assert hardest(scores, 0.4).tolist() == [2, 4]
    assert hardest(scores, 0.4, skip=0.2).tolist() == [0, 2]
    assert hardest(scores, 1.0).tolist() == [0, 2, 3, 4]


def projected():
    model = nn.Linear(2, 2)
    cap = tlfast.capture(model, "", rows=1, of="weight", reduce="norm", project=2)
    return mean_gradient_norm(model, cap)


def without_grad():
    model = nn.Linear(2, 2)
    return mean_gradient_norm(model, tlfast.capture(model, "", rows=1, of="weight", reduce="norm"))


ONE = torch.ones(2)
REFUSED = {
    'gradient_norms: cap must have columns with of="weight", reduce="norm"': lambda: gradient_norms(
        tlfast.capture(nn.Linear(2, 2), "", rows=1)
    ),
    "mean_gradient_norm: cap must have norms of whole gradients, got projected ones at ''.": projected,
    "mean_gradient_norm: the weight of '' must have a .grad, got none.": without_grad,
    "NoiseScale: decay must be from 0 to below 1, or None, got 1.": lambda: NoiseScale(1.0),
    "NoiseScale: norms must be those of two examples at least, [B], got [1].": lambda: NoiseScale().add(ONE[:1], 1.0),
    "NoiseScale: norms must be finite, got NaN or infinity.": lambda: NoiseScale().add(ONE * torch.inf, 1.0),
    "el2n: logits must be [B, C] with labels [B], or [B, P, C] with [B, P], got [2], [2].": lambda: el2n(ONE, ONE),
    "el2n: labels must be classes, 0 to 1, or -100, got 5 to 5.": lambda: el2n(ONE[None], torch.tensor([5])),
    "hardest: scores must be [N], got [1, 2].": lambda: hardest(ONE[None], 0.5),
    "hardest: keep must be above 0, and at most 1 together with skip, got keep=0.9, skip=0.2.": lambda: hardest(
        ONE, 0.9, skip=0.2
    ),
}


@pytest.mark.parametrize("text, make", REFUSED.items())
def test_refusals(make, text):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(text)):
        make()


@pytest.mark.parametrize("module", [diagnostics.__name__, score_examples.__module__])
def test_examples_of_the_docstrings(module):
    found = doctest.testmod(sys.modules[module])
    assert found.attempted
    assert not found.failed
