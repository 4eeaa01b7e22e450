"""Experts of transformers, whose weights are one tensor for all of them: each expert's matrices as layers.

The module of the experts is given tokens, which expert each goes to, and with what weight; inside nothing is called
that could be captured. So while the gradient at its output is on its way, what the captured experts do is done again
with what the module was given: each matrix is a module that is called with the tokens of each example that it sees, and
what is captured there is the gradient of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..backends.checkpoints import Heard, unheard
from ..errors import broken_rule

_UP, _GATED, _DOWN = "up_proj", "gate_up_proj", "down_proj"
_TOKENS = 6  # of the trial
_INPUTS = ("hidden_states", "top_k_index", "top_k_weights")
Bool = torch.Tensor


class ExpertLayer(nn.Module):
    """A matrix of one expert [n_outputs, n_inputs], of the parameter ``parameter`` of its module."""

    experts: Any

    def __init__(self, experts: nn.Module, parameter: str, number: int):
        super().__init__()
        self.__dict__["experts"] = experts  # no child: it is the other way round
        self.parameter, self.number = parameter, number
        shape = getattr(experts, parameter).shape[1:]
        self.n_inputs, self.n_outputs = shape if self._turned else shape[::-1]
        self.has_bias = getattr(experts, f"{parameter}_bias", None) is not None

    @property
    def _turned(self) -> bool:
        return bool(self.experts.is_transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n_inputs] -> [..., n_outputs]."""
        weight = getattr(self.experts, self.parameter)[self.number]
        bias = getattr(self.experts, f"{self.parameter}_bias")[self.number] if self.has_bias else None
        return torch.nn.functional.linear(x, weight.T if self._turned else weight, bias)


def is_experts(module: Any) -> bool:
    """Whether a module is that of all experts of a layer, as transformers has it."""
    down, up = (getattr(module, name, None) for name in (_DOWN, _up_of(module)))
    known = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    return known and all(isinstance(one, nn.Parameter) and one.dim() == 3 for one in (down, up))


def expert_layers(name: str, module: nn.Module) -> dict[str, ExpertLayer]:
    """The matrices of a module's experts by their names, ``{name}.expert_{number}.{parameter}``, as bergson's are."""
    return {
        f"{name}.expert_{number}.{parameter}".removeprefix("."): ExpertLayer(module, parameter, number)
        for number in range(getattr(module, _DOWN).shape[0])
        for parameter in (_up_of(module), _DOWN)
    }


def all_expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of all experts of a model."""
    return {
        layer: one
        for name, module in model.named_modules()
        if is_experts(module)
        for layer, one in expert_layers(name, module).items()
    }


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module, or a matrix of an expert, by its name."""
    inside, _, rest = name.rpartition(".expert_")
    try:
        return model.get_submodule(name)
    except AttributeError:
        number, _, parameter = rest.partition(".")
        return ExpertLayer(model.get_submodule(inside), parameter, int(number))


def check_experts(who: str, layers: Mapping[str, nn.Module]) -> None:
    """ValueError for matrices of experts whose module does another thing than experts do, as a trial shows."""
    tried: set[int] = set()
    for name, layer in layers.items():
        if not isinstance(layer, ExpertLayer) or id(layer.experts) in tried:
            continue
        tried.add(id(layer.experts))
        if not _does_as_experts(layer.experts):
            inside, kind = name.rpartition(".expert_")[0], type(layer.experts).__name__
            rule, got = "do what experts do", f"{inside}, a {kind} that does another thing"
            raise ValueError(broken_rule(who, "points", rule, got, "Leave this point out."))


class RoutedCalls:
    """Calls the captured matrices of one module's experts in each backward.

    Args:
        who: the caller, for errors.
        name: of the module.
        model: that has it.
        layers: the captured ones.
        mask: returns the mask of the step, bool [B, P], or None.
    """

    def __init__(
        self, who: str, name: str, model: nn.Module, layers: Iterable[ExpertLayer], mask: Callable[[], Bool | None]
    ):
        self.who, self.mask, self.n_examples, self.active = f"{who} at {name}", mask, 0, False
        self.n_empty = Counter[int]()  # by expert, positions that were called and hold no token
        self.module = model.get_submodule(name)
        self.parent = model.get_submodule(name.rpartition(".")[0])
        self.layers = {(one.number, one.parameter): one for one in layers}
        self._heard, self._entered = Heard(), False  # outside of a backward

    def hook(self) -> list[Any]:
        """Register what listens to the module; the handles remove it."""
        self.active, self._entered = True, False
        return [
            self.parent.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, prepend=True, with_kwargs=True),
            self,
        ]

    def remove(self) -> None:
        """Nothing more is called."""
        self.active = False

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._entered |= torch._C._current_graph_task_id() == -1
        given = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
        self.n_examples = 0 if given is None or given.dim() < 3 else given.shape[0]

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.active or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        if torch.compiler.is_compiling():
            rule, remedy = "run without torch.compile", "Capture the model that isn't compiled."
            raise RuntimeError(broken_rule(self.who, "experts", rule, "a compiled model", remedy))
        given = dict(zip(_INPUTS, args, strict=False)) | kwargs
        hidden, index, weights = (given[name] for name in _INPUTS)
        n = self.n_examples
        if hidden.dim() != 2 or not n or len(hidden) % n:
            got = f"{list(hidden.shape)} where the module around it was given {n or 'no batch'}"
            rule, remedy = "be given the tokens of a batch [B, P, D], side by side", "Give the model a batch."
            raise ValueError(broken_rule(self.who, "experts", rule, got, remedy))
        index, weights = index.reshape(len(hidden), -1), weights.reshape(len(hidden), -1)
        device, autocast = hidden.device.type, None
        if torch.is_autocast_enabled(device):
            autocast = torch.get_autocast_dtype(device)
        with nullcontext() if self._heard.hears(self._entered) else unheard():
            return _Again.apply(output, self, n, autocast, hidden, index, weights)  # type: ignore[no-untyped-call]

    def fire(
        self, n: int, autocast: torch.dtype | None, hidden: torch.Tensor, index: torch.Tensor,
        weights: torch.Tensor, grad: torch.Tensor,
    ) -> None:  # fmt: skip
        """Call the matrices with what their experts were given, and take the gradient at the output through them."""
        real, device = self._real(n, len(hidden)), hidden.device.type
        cast: AbstractContextManager[object] = nullcontext()
        if autocast is not None or torch.is_autocast_enabled(device):
            cast = torch.autocast(device, autocast, enabled=autocast is not None)
        with torch.enable_grad(), cast:
            for number in sorted({number for number, _ in self.layers}):
                picked = index == number
                chosen = picked.any(-1) if real is None else picked.any(-1) & real
                at = _Places(chosen.view(n, -1))
                self.n_empty[number] += at.n_empty
                weight = (weights * picked).sum(-1)[at.token, None]
                given = at.spread(hidden[at.token]).requires_grad_()
                made = self._expert(number, given, at.filled)
                back = at.spread((grad[at.token] * weight).to(made.dtype))
                torch.autograd.grad(made, given, back)

    def _expert(self, number: int, given: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        """What an expert makes of tokens; the second matrix, too, is given zeros where there is none."""
        up, down = (self._layer(number, name) for name in (_up_of(self.module), _DOWN))
        inner = _activated(self.module, up(given))
        made: torch.Tensor = down(torch.where(filled, inner, 0))
        return made

    def _layer(self, number: int, parameter: str) -> ExpertLayer:
        found = self.layers.get((number, parameter))
        return ExpertLayer(self.module, parameter, number) if found is None else found

    def _real(self, n: int, n_tokens: int) -> torch.Tensor | None:
        """Which tokens are real, [B * P]."""
        mask = self.mask()
        if mask is not None and (mask.dim() != 2 or len(mask) != n or mask.numel() != n_tokens):
            rule, remedy = f"be [{n}, {n_tokens // n}], of the tokens that the experts get", "Give that of this batch."
            raise ValueError(broken_rule(self.who, "mask", rule, list(mask.shape), remedy))
        return None if mask is None else mask.flatten()


class _Places:
    """Where the chosen tokens of each example [B, P] go: side by side, with zeros behind them."""

    def __init__(self, chosen: torch.Tensor):
        n, n_positions = chosen.shape
        example, position = chosen.nonzero(as_tuple=True)
        self.token = example * n_positions + position
        self._at = example, (chosen.cumsum(1) - 1)[example, position]
        self._shape = n, max(1, int(chosen.sum(1).max()))
        self.n_empty = n * self._shape[1] - len(example)
        self.filled = chosen.new_zeros(*self._shape, 1)
        self.filled[self._at] = True

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [B, most, D]."""
        made = tokens.new_zeros(*self._shape, tokens.shape[1])
        made[self._at] = tokens
        return made


class _Again(torch.autograd.Function):
    """An identity behind the experts, whose backward does again what they did, for those that are captured."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, calls: RoutedCalls, n: int, autocast: Any, *given: Any) -> torch.Tensor:
        ctx.calls, ctx.n, ctx.autocast = calls, n, autocast
        ctx.save_for_backward(*given)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.calls.active:
            ctx.calls.fire(ctx.n, ctx.autocast, *(one.detach() for one in ctx.saved_tensors), grad.detach())
        return grad, None, None, None, None, None, None


def _up_of(module: Any) -> str:
    return _GATED if hasattr(module, _GATED) else _UP


def _activated(module: Any, up: torch.Tensor) -> torch.Tensor:
    """What the second matrix of an expert is given, of what the first one has made."""
    made: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    return made


def _does_as_experts(module: Any) -> bool:
    """Whether a module makes of drawn tokens what its experts would, each by its matrices and its activation."""
    weight = getattr(module, _DOWN)
    n_experts, draw = min(2, weight.shape[0]), torch.Generator().manual_seed(0)  # all may be too many to try
    size = ExpertLayer(module, _DOWN, 0).n_outputs
    try:
        with torch.no_grad():
            hidden = torch.randn(_TOKENS, size, generator=draw).to(weight)
            index = torch.stack([torch.randperm(n_experts, generator=draw) for _ in range(_TOKENS)])
            index = index.to(weight.device)
            weights = (torch.rand(index.shape, generator=draw) + 0.5).to(weight)
            found = module.forward(hidden, index, weights)
            wanted = torch.zeros_like(hidden, dtype=torch.float64)
            for number in range(n_experts):
                up, down = (ExpertLayer(module, name, number) for name in (_up_of(module), _DOWN))
                of_expert = (weights * (index == number)).sum(-1, keepdim=True)
                wanted += (down(_activated(module, up(hidden))) * of_expert).double()
    except Exception:  # of a forward that takes other inputs, or weights that aren't here
        return False
    if found.shape != wanted.shape:
        return False
    tolerance = 4 * torch.finfo(weight.dtype).eps ** 0.75
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())
