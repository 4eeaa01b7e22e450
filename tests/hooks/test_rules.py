"""A capture inside relevance rules, as LXT and RelP patch them into a model: gradients as the model then has them."""

import torch
from comparison import assert_rows, assert_same_bits
from models import Setup, activation_gradients, inputs, uneven
from torch import nn

import tlfast
from tlfast import Spec

POINTS = ["0", "1", "2", "3"]


class Divided(torch.autograd.Function):
    """What is given, whose gradient is divided: the uniform rule, of a product of two."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.factor, None


class Gate(nn.Module):
    """A product of two inputs, as of a gated MLP or of attention."""

    def forward(self, x):
        return x * x.sigmoid()


def gelu_by_identity(self, x):
    """The rule of an activation: its slope at this input, held still."""
    return x * (nn.functional.gelu(x) / (x + 1e-6)).detach()


def norm_by_identity(self, x):
    """The rule of a norm: its deviation held still."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt().detach()
    return centred / deviation * self.weight + self.bias


def gate_by_halves(self, x):
    return Divided.apply(x * x.sigmoid(), 2)


RULES = ((nn.GELU, gelu_by_identity), (nn.LayerNorm, norm_by_identity), (Gate, gate_by_halves))


def test_gradients_are_those_that_the_rules_make(backend, attach, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), Gate()), inputs()
    setup = Setup(model, POINTS, lambda: uneven(model(x)))
    plain = activation_gradients(setup)
    cap = tlfast.capture(model, POINTS, rows=4, attach=attach, backend=backend)  # made before, entered inside
    for kind, forward in RULES:
        monkeypatch.setattr(kind, "forward", forward)
    right = activation_gradients(setup)
    with cap:
        setup.loss().backward()
    for name in POINTS:
        assert_rows(cap, name, right[name][0])
    assert not torch.allclose(plain["0"][0], right["0"][0], rtol=0.1)


def test_products_are_those_that_the_rules_make(backend, monkeypatch):
    """An input times its gradient is the relevance there."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), Gate()), inputs()
    for kind, forward in RULES:
        monkeypatch.setattr(kind, "forward", forward)
    hidden = model[0](x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(uneven(model[1:](hidden)), hidden)
    with tlfast.capture(model, Spec("1", of="grad*act", side="input"), rows=3, backend=backend) as cap:
        uneven(model(x)).backward()
    assert_same_bits(cap["1:input:grad*act"], grad * hidden.detach())
