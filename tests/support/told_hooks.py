"""Programs with full backward hooks, and what they tell: with PyTorch's hooks and with native ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

import tlfast


def told(value: Any) -> Any:
    """A value as it can be compared: tensors by their bits, and None in tuples."""
    if isinstance(value, torch.Tensor):
        return "tensor", tuple(value.shape), str(value.dtype), value.detach().double().flatten().tolist()
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [told(item) for item in value]
    return value


class Told(list):
    """What hooks have seen, in order."""

    def hook(self, name: str, returns: Callable[[Any, Any], Any] = lambda *_: None) -> Callable[..., Any]:
        def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            self.append((name, type(module).__name__, told(grad_input), told(grad_output), torch.is_grad_enabled()))
            return returns(grad_input, grad_output)

        return hook

    def result(self, value: Any) -> None:
        self.append(("result", told(value)))

    def pre_hook(self, name: str, returns: Callable[[Any], Any] = lambda _: None) -> Callable[..., Any]:
        def hook(module: nn.Module, grad_output: Any) -> Any:
            self.append((name, told(grad_output), torch.is_grad_enabled()))
            return returns(grad_output)

        return hook


def both(run: Callable[[Told], Any]) -> tuple[Any, Any]:
    """What a program tells with PyTorch's hooks and with native ones: calls, result, error, warnings."""
    found = []
    for context in (nullcontext(), tlfast.accelerate_hooks()):
        seen, result, error = Told(), None, None
        torch.manual_seed(0)
        with context, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = told(run(seen))
            except Exception as raised:
                error = type(raised), str(raised)
        where = [(warning.category, str(warning.message), warning.filename, warning.lineno) for warning in caught]
        found.append((list(seen), result, error, where))
    return found[0], found[1]


def same(run: Callable[[Told], Any]) -> Any:
    """The same, which must be the same; returns it."""
    plain, native = both(run)
    assert native == plain
    return plain
