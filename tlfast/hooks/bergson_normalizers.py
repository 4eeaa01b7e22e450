"""Bergson's names of modules, and its ``normalizers.pth``: the second moments that it divides gradients by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule
from ..projections.projection import Projection
from .experts import ExpertLayer, all_expert_layers, submodule
from .layers import Layer, find_layer, linear_layer, projected_name
from .second_moments import AdafactorNormalizer, AdamNormalizer, Normalizer

_BASE = Projection(1, scheme="bergson-2")
# Which tensors a class of theirs keeps, and of how many dimensions.
_KEPT = {"AdamNormalizer": {"weight_avg_sq": 2}, "AdafactorNormalizer": {"row": 1, "col": 1}}


def _names(model: nn.Module) -> dict[str, str]:
    """How bergson calls each module, and each matrix of experts that lie in one."""
    names = [*(name for name, _ in model.named_modules()), *all_expert_layers(model)]
    return {name: projected_name(model, name, _BASE) for name in names}


def known_name(who: str, argument: str, model: nn.Module, name: str) -> str:
    """Bergson's name of a module; ValueError for one that the model hasn't."""
    names = _names(model)
    if name not in names:
        rule, remedy = "be of modules of the model", "Give the model that they were made of."
        raise ValueError(broken_rule(who, argument, rule, repr(name), remedy))
    return names[name]


def our_names(who: str, path: object, model: nn.Module, theirs: list[str]) -> dict[str, str]:
    """Our name of each module in a file; ValueError for one that the model hasn't."""
    named = {known: name for name, known in _names(model).items()}
    odd = next((name for name in theirs if name not in named), None)
    if odd is not None:
        rule, remedy = "be of modules of the model", "Give the model that it was made of."
        raise ValueError(broken_rule(who, os.fspath(str(path)), rule, repr(odd), remedy))
    return {name: named[name] for name in theirs}


def linear_at(who: str, argument: str, model: nn.Module, name: str) -> Layer:
    """The linear layer of a name; ValueError for a module of another kind, of which bergson keeps nothing."""
    module = submodule(model, name)
    layer = find_layer(who, name, module) if isinstance(module, ExpertLayer) else linear_layer(module)
    if layer is None:
        rule, remedy = "be of linear layers", "bergson has none of others: name linear layers."
        raise ValueError(broken_rule(who, argument, rule, f"{name} ({type(module).__name__})", remedy))
    return layer


def loaded(who: str, path: Path) -> dict[str, Any]:
    """What `torch.save` has put into a file; ValueError where that is no mapping by name. Nothing in it is run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(broken_rule(who, str(path), "hold tensors by module", repr(found)[:100], "Check the path."))
    return found


def write_bergson_normalizers(
    normalizers: Mapping[str, Normalizer], path: str | os.PathLike[str], model: nn.Module
) -> None:
    """Write normalizers as the ``normalizers.pth`` of bergson 2.5, whose names are those inside the model's base.

    Args:
        normalizers: by module, as `read_optimizer` and `Factors.normalizers` give them.
        path: the file.
        model: in which the modules are.

    Raises:
        ValueError: for a module that the model hasn't, one that isn't a linear layer, and moments of another shape.
    """
    who, saved = "write_bergson_normalizers", {}
    for name, normalizer in normalizers.items():
        known, layer = known_name(who, "normalizers", model, name), linear_at(who, "normalizers", model, name)
        has_bias = normalizer.shape[1] > layer.n_inputs
        if isinstance(normalizer, AdafactorNormalizer):
            has_bias = normalizer.bias is not None
        shape = (layer.n_outputs, layer.n_inputs + has_bias)
        if normalizer.shape != shape:
            rule, got = f"be of gradients [{shape[0]}, {shape[1]}] at {name}", list(normalizer.shape)
            raise ValueError(broken_rule(who, "normalizers", rule, got, "Give the model that they were made of."))
        if isinstance(normalizer, AdamNormalizer):
            v, bias = normalizer.second_moment, None
            if has_bias:
                v, bias = v[:, :-1], v[:, -1]
            said = {"__class__": "AdamNormalizer", "weight_avg_sq": v, "bias_avg_sq": bias}
        else:
            row, col, bias = normalizer.row, normalizer.col, normalizer.bias
            said = {"__class__": "AdafactorNormalizer", "row": row, "col": col, "bias_avg_sq": bias}
        saved[known] = {
            key: value.float().contiguous() if isinstance(value, torch.Tensor) else value
            for key, value in said.items()
            if value is not None
        }
    torch.save(saved, path)


def read_bergson_normalizers(
    path: str | os.PathLike[str], model: nn.Module, *, bias: bool = True
) -> dict[str, Normalizer]:
    """Read bergson's ``normalizers.pth``, by our names of the modules.

    Args:
        path: the file.
        model: in which the modules are.
        bias: with the second moments of biases, where the file has such.

    Raises:
        ValueError: for another file, a damaged one, and for a module that the model hasn't, or has in another shape.
        OSError: for one that can't be read.
    """
    who = "read_bergson_normalizers"
    found = loaded(who, Path(path))
    made: dict[str, Normalizer] = {}
    for theirs, name in our_names(who, path, model, list(found)).items():
        said = found[theirs] if isinstance(found[theirs], dict) else {}
        kind, has_bias = said.get("__class__"), bias and said.get("bias_avg_sq") is not None
        if not isinstance(kind, str) or kind not in _KEPT:
            rule, remedy = "hold Adam's or Adafactor's second moments", "bergson 2.5 writes these."
            raise ValueError(broken_rule(who, os.fspath(path), rule, repr(kind), remedy))
        _check_kept(who, path, model, name, said)
        kept = {key: said[key].double() for key in (*_KEPT[kind], *(["bias_avg_sq"] if has_bias else []))}
        of_bias = kept.get("bias_avg_sq")
        if kind == "AdamNormalizer":
            v = kept["weight_avg_sq"]
            made[name] = AdamNormalizer(v if of_bias is None else torch.cat([v, of_bias[:, None]], 1))
        else:
            made[name] = AdafactorNormalizer(kept["row"], kept["col"], of_bias)
    return made


def _check_kept(who: str, path: object, model: nn.Module, name: str, said: Mapping[str, Any]) -> None:
    """ValueError for an entry without its tensors, or, of a linear layer, with those of another shape."""
    wanted = dict(_KEPT[said["__class__"]]) | ({"bias_avg_sq": 1} if said.get("bias_avg_sq") is not None else {})
    remedy = "It is damaged, or of another model."
    for key, n_dims in wanted.items():
        held = said.get(key)
        if not isinstance(held, torch.Tensor) or held.dim() != n_dims or not held.is_floating_point():
            got = f"{held.dtype} {list(held.shape)}" if isinstance(held, torch.Tensor) else type(held).__name__
            rule = f"hold {key} of {name!r} as floats of {n_dims} dimension{'s' * (n_dims > 1)}"
            raise ValueError(broken_rule(who, os.fspath(str(path)), rule, got, remedy))
    module = submodule(model, name)
    layer = find_layer(who, name, module) if isinstance(module, ExpertLayer) else linear_layer(module)
    sizes = {key: list(said[key].shape) for key in wanted}
    n_outputs = sizes["row" if "row" in sizes else "weight_avg_sq"][0]
    n_inputs = sizes["col" if "col" in sizes else "weight_avg_sq"][-1]
    fits = layer is None or (n_outputs, n_inputs) == (layer.n_outputs, layer.n_inputs)
    if not fits or sizes.get("bias_avg_sq", [n_outputs]) != [n_outputs]:
        rule = f"hold second moments of {name!r} in its shape"
        raise ValueError(broken_rule(who, os.fspath(str(path)), rule, str(sizes), remedy))


def is_bergsons(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a ``normalizers.pth``: it holds by module what says its class. Its numbers aren't read."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # of a file of another kind, whatever that is
        return False
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(one, dict) and "__class__" in one for one in found.values())
    )
