"""The norm before a reader: its calls in a run, and gradients taken back through it, by formula where one is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from .places import Place

ROUNDINGS = 16.0  # epsilons by which two ways to compute one gradient may be apart, beside its size


@dataclass(frozen=True)
class Formula:
    """``y = weight * x^ + bias`` with ``x^ = x r``, of centred x or of x as it is, ``r = 1 / sqrt(mean x^2 + eps)``.

    Back through it a gradient g becomes ``w - mean(w) - x^ mean(w x^)``, with ``w = r weight g`` and, where x isn't
    centred, without the first mean. So of its dot product with anything two more dots a position need be known, and
    nothing of the size of g is made.
    """

    centred: bool
    weight: torch.Tensor | None
    eps: float

    def parts(self, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x^ [..., d], r [..., 1]) of what the norm was given."""
        x = given - given.mean(-1, keepdim=True) if self.centred else given
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * r, r

    def pulled_back(self, given: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """A gradient at the output as it is at the input."""
        x, r = self.parts(given)
        w = grad * r if self.weight is None else grad * r * self.weight
        back = w - x * (w * x).mean(-1, keepdim=True)
        return back - w.mean(-1, keepdim=True) if self.centred else back


def _formulas(module: nn.Module, dtype: torch.dtype, width: int) -> Iterator[Formula]:
    """What a norm may be, by what it and the module that it wraps have."""
    inner = getattr(module, "original_component", None)
    owners = [one for one in (module, inner) if one is not None]
    weights: list[torch.Tensor | None] = [None]
    for owner, name, offset in product(owners, ("weight", "w"), (0.0, 1.0)):  # Gemma's weights are from 1
        found = getattr(owner, name, None)
        if isinstance(found, torch.Tensor) and list(found.shape) == [width]:
            weights.insert(0 if offset == 0.0 else len(weights), found.detach().to(dtype) + offset)
    configs = [getattr(module, name, None) for name in ("cfg", "config")]
    named = [getattr(one, name, None) for one in (*owners, *configs) for name in ("eps", "variance_epsilon")]
    epsilons = dict.fromkeys(float(one) for one in named if isinstance(one, (int, float, torch.Tensor)))
    for weight, eps, centred in product(weights, epsilons or {1e-5: None}, (True, False)):
        yield Formula(centred, weight, eps)


@dataclass
class Norm:
    """A norm, and its calls in the forward that is running: what it was given and what it put out, with their graph."""

    place: Place
    calls: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    on_given: Callable[[Place, torch.Tensor], None] | None = None  # what is to be told of the stream before it
    formula: Formula | None = None  # by which gradients go back, once it is learnt
    _left: list[Formula] | None = None  # those that are not ruled out
    _given: torch.Tensor | None = None

    def hook(self) -> list[Any]:
        """Hooks that keep the calls."""

        def before(module: nn.Module, args: Any) -> None:
            self._given = args[0]
            if self.on_given is not None:
                self.on_given(self.place, args[0].detach())

        def after(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1 and self._given is not None:
                self.calls.append((self._given, output))
            self._given = None

        module = self.place.module
        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def given(self, call: int, dtype: torch.dtype) -> torch.Tensor:
        """What it was given in one call; where one call serves all, in that."""
        return self.calls[min(call, len(self.calls) - 1)][0].detach().to(dtype)

    def learn(self, call: int, grad: torch.Tensor, truth: torch.Tensor) -> None:
        """Rule out the formulas by which a gradient [..., d] doesn't go back as autograd has taken it.

        One of zeros tells nothing.
        """
        size = float(truth.norm())
        if size == 0:
            return
        given, bound = self.given(call, grad.dtype), ROUNDINGS * torch.finfo(self.calls[0][1].dtype).eps * size
        left = list(_formulas(self.place.module, grad.dtype, grad.shape[-1])) if self._left is None else self._left
        self._left = [one for one in left if float((one.pulled_back(given, grad) - truth).norm()) <= bound]
        self.formula = self._left[0] if self._left else None

    def pulled_back(self, call: int, grads: torch.Tensor) -> torch.Tensor:
        """Gradients [R, ...] at the output of one call as they are at its input, by autograd, in the same memory."""
        given, output = self.calls[min(call, len(self.calls) - 1)]
        if output is given:
            return grads
        for row in grads:
            (back,) = torch.autograd.grad(output, given, row.to(output.dtype), retain_graph=True)
            row.copy_(back)
        return grads
