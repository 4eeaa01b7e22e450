"""All that a caller can tell of one call on a model, and in what two calls differ, to the bit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LISTED = ("fwd_hooks", "bwd_hooks")
PLAIN = {bool, int, float, str, type(None)}
# PyTorch's note that a full backward hook was there once; nobody reads it but the refusal of deprecated hooks.
NOTES = {"_is_full_backward_hook"}


@dataclasses.dataclass
class Outcome:
    """What a call returned or raised, and what it left behind."""

    error: Any = None
    output: Any = None
    cache: Any = None
    grads: Any = None
    warned: Any = None
    left: Any = None
    random: Any = None


def outcome(model, call):
    """The outcome of a call that returns (output, cache); it begins without gradients, and with the same seed.

    Tensors are copied: a later call can't change them. What is left is for the caller to look for.
    """
    model.zero_grad()
    torch.manual_seed(3)
    found = Outcome()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            output, cache = call()
        except Exception as error:
            found.error = type(error).__name__, str(error)
        else:
            tensors = getattr(cache, "cache_dict", cache)
            found.output = described(output)
            found.cache = {"class": type(cache).__name__, "batch": getattr(cache, "has_batch_dim", None)}
            found.cache |= described(tensors)
    found.warned = [(one.category.__name__, str(one.message), one.filename, one.lineno) for one in warned]
    found.grads = described({name: parameter.grad for name, parameter in model.named_parameters()})
    found.random = described(torch.get_rng_state())
    return found


def described(value):
    """A tensor as its bytes and all that is told about it; a container as its class, its order and what is in it."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().clone(memory_format=torch.contiguous_format).flatten()
        return {
            "class": type(value).__name__, "shape": tuple(value.shape), "dtype": str(value.dtype),
            "strides": strides_that_matter(value), "device": str(value.device),
            "graph": value.grad_fn.name() if value.grad_fn is not None else value.requires_grad,
            "bytes": raw.view(torch.uint8) if raw.numel() else raw,
        }  # fmt: skip
    if isinstance(value, Mapping):
        return {"order": list(value), **{str(name): described(inner) for name, inner in value.items()}}
    if isinstance(value, (tuple, list)):
        inside = {str(place): described(inner) for place, inner in enumerate(value)}
        return {"class": type(value).__name__, "order": len(value), **inside}
    return value if type(value) in PLAIN else type(value).__name__


def strides_that_matter(tensor):
    """The strides by which something is reached: those of a dimension of size 1, or of no element, are arbitrary."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(stride for size, stride in steps if size > 1) if tensor.numel() else ()


def marks(model):
    """By module, what hooks and accelerations may change in a model: hooks by their functions' names, attributes."""
    modules = {id(module): (name, module) for name, module in model.named_modules()}
    modules |= {id(point): (name, point) for name, point in getattr(model, "hook_dict", {}).items()}
    return {name: _marks_of(vars(module)) for name, module in modules.values()}


def _marks_of(values):
    found = {key: value for key, value in values.items() if type(value) in PLAIN and key not in NOTES}
    found["attributes"] = values.keys() - NOTES
    for key in HOOKS:
        if values.get(key):
            found[key] = [getattr(one, "__qualname__", type(one).__name__) for one in values[key].values()]
    for key in LISTED:
        if values.get(key):
            found[key] = [(one.is_permanent, one.context_level) for one in values[key]]
    return found


def changes(before, after):
    """What differs between the marks of a model before and after, by module and attribute."""
    found = {}
    for name in before | after:
        first, second = before.get(name, {}), after.get(name, {})
        if first != second:
            keys = [key for key in first | second if first.get(key) != second.get(key)]
            found |= {f"{name} {key}": [str(first.get(key)), str(second.get(key))] for key in keys}
    return found


def differences(theirs, ours, but=()):
    """In what two outcomes differ, as paths with both values; ``but`` are the names of parts that may."""
    if theirs.error != ours.error and "error" not in but:  # the rest follows from it
        return [f"error: {theirs.error} and {ours.error}"]
    wrong = []
    for field in dataclasses.fields(Outcome):
        if field.name not in but:
            wrong += _differing(field.name, getattr(theirs, field.name), getattr(ours, field.name), but)
    return wrong


def _differing(path, first, second, but):
    if isinstance(first, dict) and isinstance(second, dict):
        wrong = [f"{path}.{name}: theirs alone" for name in first if name not in second]
        wrong += [f"{path}.{name}: ours alone" for name in second if name not in first]
        for name in first:
            if name in second and name not in but and not (name == "order" and wrong):
                wrong += _differing(f"{path}.{name}", first[name], second[name], but)
        return wrong
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape == second.shape:
            apart = int((first != second).sum())
            return [f"{path}: {apart} of {first.numel()}"] if apart else []
        return [f"{path}: {first.numel()} and {second.numel()}"]
    if type(first) is type(second) and first == second:
        return []
    if isinstance(first, list) and isinstance(second, list) and sorted(first) == sorted(second):
        place = next(place for place, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
        first, second = first[place : place + 4], second[place : place + 4]
    return [f"{path}: {_short(first)} and {_short(second)}"]


def _short(value):
    return "a value" if isinstance(value, dict) else f"{value!r:.300}"
