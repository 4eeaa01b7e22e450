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
from .layers import projected_name
from .second_moments import AdafactorNormalizer, AdamNormalizer, Normalizer

_BASE = Projection(1, scheme="bergson-2")


def _names(model: nn.Module) -> dict[str, str]:
    """How bergson calls each module."""
    return {name: projected_name(model, name, _BASE) for name, _ in model.named_modules()}


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
        ValueError: for a module that the model hasn't.
    """
    who = "write_bergson_normalizers"
    modules, saved = dict(model.named_modules()), {}
    for name, normalizer in normalizers.items():
        known = known_name(who, "normalizers", model, name)
        if isinstance(normalizer, AdamNormalizer):
            n_inputs = modules[name]._parameters["weight"].numel() // len(normalizer.second_moment)
            v, bias = normalizer.second_moment, None
            if v.shape[1] == n_inputs + 1:
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
        ValueError: for another file, and for a module that the model hasn't.
        OSError: for one that can't be read.
    """
    who = "read_bergson_normalizers"
    found = loaded(who, Path(path))
    made: dict[str, Normalizer] = {}
    for theirs, name in our_names(who, path, model, list(found)).items():
        said = found[theirs] if isinstance(found[theirs], dict) else {}
        kind, held = said.get("__class__"), said.get("bias_avg_sq") if bias else None
        of_bias = None if held is None else held.double()
        if kind == "AdamNormalizer":
            v = said["weight_avg_sq"].double()
            made[name] = AdamNormalizer(v if of_bias is None else torch.cat([v, of_bias[:, None]], 1))
        elif kind == "AdafactorNormalizer":
            made[name] = AdafactorNormalizer(said["row"].double(), said["col"].double(), of_bias)
        else:
            rule, remedy = "hold Adam's or Adafactor's second moments", "bergson 2.5 writes these."
            raise ValueError(broken_rule(who, os.fspath(path), rule, repr(kind), remedy))
    return made


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
