"""The second moments that an optimizer has saved, by layer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule
from .layers import convolution, linear_layer
from .second_moments import AdafactorNormalizer as AdafactorNormalizer
from .second_moments import AdamNormalizer as AdamNormalizer
from .second_moments import Normalizer as Normalizer

_WHO = "read_optimizer"
# Names of the parameters that transformers' Trainer lets out of weight decay, in lower case.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def read_optimizer(
    path: str | os.PathLike[str], model: nn.Module, *, bias: bool = False, names: Sequence[str] | None = None
) -> dict[str, Normalizer]:
    """The second moments of linear layers and convolutions that a training run has saved: the ``optimizer.pt`` of a
    checkpoint.

    It is the ``state_dict`` of torch's Adam or AdamW, or of transformers' Adafactor, saved by `torch.save`; nothing in
    it is run. Of Conv1D of transformers, whose weight lies as [I, O], the moments are turned. Convolutions have those
    of Adam alone.

    Args:
        path: the file, or the folder of a checkpoint with ``optimizer.pt``.
        model: whose parameters it had.
        bias: with the second moment of the bias, where a layer has one.
        names: of the parameters in the optimizer's order. None: as the file says, or for a single group of parameters
            the order of ``model.named_parameters()``, and for two groups that of transformers' Trainer: those with
            weight decay first.

    Returns:
        By module: an `AdamNormalizer`, or an `AdafactorNormalizer`.

    Raises:
        ValueError: for a file without second moments, or whose shapes are not those of the model.
        OSError: for one that can't be read.

    Example:
        >>> import os, tempfile, torch, tlfast
        >>> model, path = torch.nn.Sequential(torch.nn.Linear(4, 3)), os.path.join(tempfile.mkdtemp(), "optimizer.pt")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> torch.save(optimizer.state_dict(), path)
        >>> tlfast.read_optimizer(path, model)["0"](torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """
    found = os.path.join(path, "optimizer.pt") if os.path.isdir(path) else os.fspath(path)
    saved: Any = None
    got = repr(found)
    try:
        saved = torch.load(found, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of pickle, of torch's reader of archives, and whatever a foreign file makes of them
        got += f" ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        rule, remedy = "hold the state_dict of an optimizer", "Check the path."
        raise ValueError(broken_rule(_WHO, "path", rule, got, remedy))
    states = _by_name(saved, model, names)
    made: dict[str, Normalizer] = {}
    for name, module in model.named_modules():
        state = states.get(f"{name}.weight" if name else "weight")
        if state is None:
            continue
        if linear_layer(module) is not None or (convolution(module) is not None and "exp_avg_sq" in state):
            of_bias = states.get(f"{name}.bias" if name else "bias") if bias else None
            made[name] = _normalizer(name, module, state, of_bias)
    if not made:
        rule, remedy = (
            "have second moments of linear layers or convolutions",
            "Adam, AdamW and transformers' Adafactor have such.",
        )
        raise ValueError(broken_rule(_WHO, "path", rule, "none", remedy))
    return made


def _by_name(saved: Mapping[str, Any], model: nn.Module, names: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
    """The state of each parameter; ValueError where the file's order isn't known, or isn't the model's."""
    groups = saved["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if names is None and all(group.get("param_names") for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sizes_fit = True
    if names is None:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if len(groups) == 2:
            kept = _undecayed(model)
            decayed = [name for name in names if name not in kept]
            sizes_fit = len(decayed) == len(groups[0]["params"])
            names = decayed + [name for name in names if name in kept]
    fits = sizes_fit and len(names) == len(numbers) and (len(groups) <= 2 or all(name in shapes for name in names))
    states = (
        {name: saved["state"][n] for name, n in zip(names, numbers, strict=fits) if n in saved["state"]} if fits else {}
    )
    for name, state in states.items():
        moment = state.get("exp_avg_sq", state.get("exp_avg"))
        fits &= name in shapes and (moment is None or moment.shape == shapes[name])
    if not fits:
        rule, remedy = "have the model's parameters, in an order that is known", "Give their names=, in its order."
        got = f"{len(numbers)} parameters in {len(groups)} groups"
        raise ValueError(broken_rule(_WHO, "the optimizer", rule, got, remedy))
    return states


def _undecayed(model: nn.Module) -> set[str]:
    """The parameters that transformers' Trainer lets out of weight decay."""
    of_norms = {
        f"{name}.{own}".strip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own in module._parameters
    }
    return of_norms | {name for name, _ in model.named_parameters() if _UNDECAYED.search(name.lower())}


def _normalizer(
    name: str, module: nn.Module, state: Mapping[str, Any], of_bias: Mapping[str, Any] | None
) -> Normalizer:
    layer = linear_layer(module)
    turned = layer is not None and not isinstance(module, nn.Linear)
    known = None if of_bias is None else of_bias.get("exp_avg_sq")
    bias = None if known is None else known.double()
    if layer is not None and "exp_avg_sq_row" in state:
        row, col = state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double()
        row, col = (col, row) if turned else (row, col)
        if (len(row), len(col)) == (layer.n_outputs, layer.n_inputs):
            return AdafactorNormalizer(row, col, bias)
    elif "exp_avg_sq" in state:
        v = state["exp_avg_sq"].double().flatten(1)
        v = v.T if turned else v
        return AdamNormalizer(v if bias is None else torch.cat([v, bias[:, None]], 1))
    rule, remedy = "have a second moment of its shape", "Check the model, and the optimizer."
    raise ValueError(broken_rule(_WHO, f"the optimizer at {name or 'the model'}", rule, ", ".join(state), remedy))
