"""Tries a class of layers that is known by its name or base: is its weight gradient what a capture makes?"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..backends.weight import Weight, Window
from ..spec import STORED_DTYPES

# Of what the formula gives: far above the rounding of float32, far below another eps, padding or factor.
_TOLERANCE = 2**-12
_SMALL = 8  # tokens of an embedding, whose table may be of gigabytes; inputs and outputs of a linear layer
_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def does_as_known(
    module: nn.Module, kind: str, bias: bool, padding_idx: int, normalized: int, eps: float, window: Window | None
) -> bool:
    """Whether the gradient of a module's weight, and of its bias, is that of its kind of layer.

    A class may say that it is an ``nn.Linear`` or a ``LayerNorm`` and multiply its output, pad its input, or make its
    weight of others. So a copy with drawn weights is run on two drawn examples, and what autograd gives for each is
    compared with the formula. The forwards of torch's own classes, and that of transformers' Conv1D, are known, where
    nobody has put others in their place.
    A weight that isn't of float numbers is quantised, which can't be tried: its class is believed.
    """
    forward = _forward_of(module)
    if forward is None:
        return False
    known = next((one for one in (*_KNOWN, conv1d_of_transformers()) if forward is getattr(one, "forward", None)), None)
    # What the forward of a convolution calls.
    inner = getattr(type(module), "_conv_forward", None)
    used = [one for one in (forward, inner) if one is not None]
    if known and inner is getattr(known, "_conv_forward", None) and all(_is_own(known, one) for one in used):
        return True
    weight: Any = module.weight
    if weight.dtype not in STORED_DTYPES:
        return True
    formula = Weight(
        kind, "gradient", bias, None, torch.eye(_SMALL) if kind == "embedding" else None, 1.0, 0,
        padding_idx if padding_idx < _SMALL else -1, (normalized, eps), window, (None, None, None), (),
    )  # fmt: skip
    # A large linear layer in small first, since its weight may be of gigabytes; not all can be made smaller.
    sizes = (True, False) if kind == "linear" and weight.numel() > _SMALL**2 else (False,)
    return any(_tried(module, forward, formula, small) for small in sizes)


def _is_own(known: type[nn.Module], forward: Any) -> bool:
    """Whether a forward is the one that came with a class: others put theirs into torch's own classes, too."""
    return getattr(forward, "__module__", None) == known.__module__ and not hasattr(forward, "__wrapped__")


def _tried(module: nn.Module, forward: Any, formula: Weight, small: bool) -> bool:
    draw = torch.Generator().manual_seed(0)
    weight: Any = module.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            twin = _twin(module, formula.layer, small, draw, device)
            given = _input_of(twin, formula.layer, formula.window, draw).to(device)
            return _agrees(twin, forward(twin, given), given, formula)
    except Exception:  # of a forward that takes another input
        return False


def conv1d_of_transformers() -> Any:
    """The class of a linear layer whose weight lies as [inputs, outputs]; None where it isn't imported."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _forward_of(module: nn.Module) -> Any:
    """The function that a module's forward is; None for a forward that was put on it and isn't a method."""
    own: Any = vars(module).get("forward")
    if own is not None and hasattr(module, "_hf_hook"):  # of accelerate, which moves inputs and weights
        own = vars(module).get("_old_forward")
    if own is None:
        return type(module).forward
    return own.__func__ if isinstance(own, MethodType) else None


def _twin(module: nn.Module, kind: str, small: bool, draw: torch.Generator, device: torch.device) -> Any:
    """The same module with drawn weights in float32; what isn't a parameter is shared."""
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module))
    drawn: dict[str, nn.Parameter | None] = {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            drawn[name] = None
            continue
        shape = list(parameter.shape)
        if kind == "embedding" and name == "weight":
            shape[0] = _SMALL
        if small and name in ("weight", "bias"):
            shape = [min(size, _SMALL) for size in shape]
        drawn[name] = nn.Parameter((torch.rand(shape, generator=draw) + 0.5).to(device))
    vars(twin)["_parameters"] = drawn
    if small:
        twin.out_features, twin.in_features = drawn["weight"].shape  # type: ignore[union-attr]
    if kind == "embedding" and (twin.padding_idx or 0) >= _SMALL:
        twin.padding_idx = None
    return twin


def _input_of(twin: Any, kind: str, window: Window | None, draw: torch.Generator) -> torch.Tensor:
    if kind == "embedding":
        return torch.randint(0, _SMALL, (2, 5), generator=draw)
    if window is not None:
        sizes = [dilation * (size - 1) + stride + 1 for size, stride, dilation in zip(*window[:3], strict=True)]
        return torch.randn(2, twin.in_channels, *sizes, generator=draw)
    if kind == "linear":
        return torch.randn(2, 3, twin.in_features, generator=draw)
    # Of another size at each position, at which another eps shows.
    return torch.randn(2, 3, *twin.weight.shape, generator=draw) * torch.tensor([1.0, 0.03, 0.001]).view(
        3, *[1] * twin.weight.dim()
    )


def _agrees(twin: Any, made: Any, given: torch.Tensor, formula: Weight) -> bool:
    if not isinstance(made, torch.Tensor) or made.dtype != torch.float32 or len(made) != 2:
        return False
    given_back = torch.linspace(-1, 2, made.numel(), device=made.device).view(made.shape).cos()
    kept = formula.keep("capture", given)
    found = formula.rows("capture", kept, given_back, None)
    parameters = [twin.weight, twin.bias] if formula.bias else [twin.weight]
    for example in range(2):
        grads = torch.autograd.grad(made[example], parameters, given_back[example], retain_graph=True)
        weight = grads[0].T if formula.layer == "embedding" else grads[0]
        if formula.of_norm:
            wanted = torch.cat([grad.flatten() for grad in grads])
        else:
            wanted = torch.cat([weight.flatten(1), *(grad[:, None] for grad in grads[1:])], 1)
        if wanted.shape != found[example].shape:
            return False
        if not (found[example] - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
            return False
    return True
