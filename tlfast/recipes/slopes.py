"""A forward that many backwards go through: what of its derivatives can be known before the first is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .native_forms import native_norms, own_forward

# Those that take each number by itself, by the names of their classes. Written out in Python, as those of transformers
# are, one is a dozen operations in each backward; its derivative is one product.
_ELEMENTWISE = {
    "torch.nn.modules.activation": {
        "ELU", "GELU", "Hardswish", "LeakyReLU", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Tanh",
    },
    "transformers.activations": {
        "AccurateGELUActivation", "ClippedGELUActivation", "FastGELUActivation", "GELUActivation", "GELUTanh",
        "LaplaceActivation", "MishActivation", "NewGELUActivation", "PytorchGELUTanh", "QuickGELUActivation",
        "ReLUSquaredActivation", "SiLUActivation",
    },
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Sloped(torch.autograd.Function):
    """The output that a function had, with its derivative as a constant."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, output: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slope)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None, None


def _sloped(module: nn.Module, args: Any, output: Any) -> Any:
    x = args[0] if len(args) == 1 else None
    if not torch.is_grad_enabled():  # inside of another function, whose backward is its own
        return None
    if not isinstance(x, torch.Tensor) or not x.requires_grad or getattr(output, "shape", None) != x.shape:
        return None
    at = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(type(module).forward(module, at).sum(), at)
    return _Sloped.apply(x, output.detach(), slope)  # type: ignore[no-untyped-call]


@contextmanager
def slopes_once(model: nn.Module) -> Iterator[None]:
    """Let activation functions that run inside keep their derivative.

    Those that somebody hooked, or gave another forward, stay as they are: their derivative is what these make it.
    A bridge of TransformerLens writes its norms out, too. Where that is the LayerNorm of torch, it is torch's own here,
    by a switch that the bridge has for it. A backward through such a forward can't be differentiated again.
    """
    found = [
        module
        for module in model.modules()
        if type(module).__name__ in _ELEMENTWISE.get(type(module).__module__, ())
        and own_forward(module, type(module).__module__.partition(".")[0])
        and not any(getattr(module, name) for name in _HOOKS)
    ]
    with native_norms(model):
        hooks = [module.register_forward_hook(_sloped) for module in found]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
