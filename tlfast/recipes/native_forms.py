"""Norms and activation functions that a model writes out in Python, by the operation that torch has for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu

# Of transformers: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), nine operations and two dozen in the backward.
_TANH_GELUS = ("NewGELUActivation", "FastGELUActivation")
_WIDE = (torch.float32, torch.float64)  # in 16 bits the operations round one by one, which is what the model computes


def own_forward(module: nn.Module, package: str) -> bool:
    """Whether a module's forward is its package's: rules of relevance put others in its place, or around it."""
    forward = type(module).forward
    home: str = getattr(forward, "__module__", "")
    around = hasattr(forward, "__wrapped__")
    return "forward" not in vars(module) and home.split(".")[0] == package and not around


def _hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(part, name) for part in module.modules() for name in names)


def _tanh_gelu(written: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def forward(x: Any) -> Any:
        plain = type(x) is torch.Tensor and x.dtype in _WIDE
        return gelu(x, approximate="tanh") if plain else written(x)

    return forward


@contextmanager
def native_norms(model: nn.Module, watched: Collection[nn.Module] = ()) -> Iterator[None]:
    """Let a TransformerLens bridge use torch's LayerNorm, by the switch that it has for it, where it writes it out.

    Not where a hook is inside, a rule of relevance in force, or one of the modules that are ``watched``.
    """
    found: list[Any] = []
    for module in model.modules():
        switch = getattr(module, "use_native_layernorm_autograd", None)
        is_norm = switch is False and type(getattr(module, "original_component", None)) is nn.LayerNorm
        ruled = any((getattr(module, "_relevance_rule_refcounts", None) or {}).values())  # of TransformerLens after 4.3
        if is_norm and not ruled and own_forward(module, "transformer_lens"):
            inside = set(module.modules()) - {module}
            if not inside & set(watched) and not any(_hooked(part) for part in inside):
                found.append(module)
    try:
        for norm in found:
            norm.use_native_layernorm_autograd = True
        yield
    finally:
        for norm in found:
            norm.use_native_layernorm_autograd = False


@contextmanager
def native_forms(model: nn.Module, watched: Collection[nn.Module]) -> Iterator[None]:
    """The same for norms, and for the tanh GELUs of transformers; numbers are those of the model but for rounding."""
    found: list[Any] = [
        module
        for module in model.modules()
        if type(module).__name__ in _TANH_GELUS and own_forward(module, "transformers")
    ]
    with native_norms(model, watched):
        try:
            for module in found:
                module.forward = _tanh_gelu(module.forward)
            yield
        finally:
            for module in found:
                vars(module).pop("forward", None)
