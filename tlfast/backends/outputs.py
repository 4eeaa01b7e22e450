"""Which of a module's outputs is meant, and the outputs with that one replaced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of ``tensor`` under a new tensor without a history, of its class and with its attributes.

    A parameter becomes a `torch.Tensor`: it is no leaf any more.
    """
    kind = type(tensor)
    if kind in (torch.Tensor, nn.Parameter):
        return tensor.detach()
    if torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        made = tensor.detach()  # only the class knows what it is made of
        if made is tensor:
            argument, rule = f"an output of class {kind.__name__}", "give a new tensor by detach()"
            raise TypeError(broken_rule("capture", argument, rule, "itself", "Capture another point."))
    else:
        # Not tensor.detach(): what a class makes of that may be a view, and an in-place operation on a view passes by
        # the node that is put behind it.
        made = torch.Tensor._make_subclass(kind, tensor)
    for name, value in vars(tensor).items():
        vars(made).setdefault(name, value)
    return made


def the_input(who: str, inputs: tuple[object, ...], named: Mapping[str, object]) -> torch.Tensor:
    """The one tensor that a layer with a weight is given, by place or by name; TypeError where that isn't known."""
    found = inputs[0] if inputs else next(iter(named.values()), None)
    if not isinstance(found, torch.Tensor) or (not inputs and len(named) > 1):
        rule = "be given its input as the first argument, or as the only one by name"
        got = type(found).__name__ if inputs else ", ".join(named) or "nothing"
        raise TypeError(broken_rule(who, "the module", rule, got, "Leave this point out."))
    more = sum(isinstance(one, torch.Tensor) for one in (*inputs, *named.values())) - 1
    if more:  # a gate, a residual, ...: what it puts out isn't made of its input and its weight alone
        raise TypeError(broken_rule(who, "the module", "be given one tensor", more + 1, "Leave this point out."))
    return found


def select_output(output: object, which: int | str | None) -> tuple[torch.Tensor | None, int | str | None]:
    """The tensor to capture among a module's outputs, and where it is (None: the output is the tensor)."""
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, (tuple, list)):
        keys: list[Any] = list(range(len(output))) if which is None else [which]
        items: Any = output
    else:
        items = _by_name(output)
        keys = list(items.keys())
        if which is not None:  # an index counts the keys, as in a ModelOutput
            by_index = isinstance(which, int) and which not in items and -len(keys) <= which < len(keys)
            keys = [keys[which] if by_index else which]  # type: ignore[index]
    for key in keys:
        try:
            value = items[key]
        except (KeyError, IndexError, TypeError):
            return None, None
        if isinstance(value, torch.Tensor) and (which is not None or value.is_floating_point()):
            return value, key
    return None, None


def _by_name(output: object) -> Mapping[Any, Any]:
    """What an output holds by key or, in a dataclass, by the name of its field."""
    if isinstance(output, Mapping):
        return output
    if is_dataclass(output):
        return {field.name: getattr(output, field.name, None) for field in fields(output)}
    return {}


def other_outputs(output: object, chosen: int | str | None) -> str:
    """Which other tensors beside the chosen one have a graph: "output=1 or output=2"; "" for none."""
    items = dict(enumerate(output)) if isinstance(output, (tuple, list)) else _by_name(output)
    if isinstance(chosen, int) and chosen < 0:
        chosen += len(items)
    found = [key for key, value in items.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    return " or ".join(f"output={key!r}" for key in found if key != chosen)


def no_tensor(who: str, side: str, output: object, which: int | str | None) -> TypeError:
    """The error for an output, or for inputs, in which there is nothing to capture."""
    holds = isinstance(output, (torch.Tensor, tuple, list, Mapping)) or is_dataclass(output)
    remedy = "Choose it with output=<index or key>." if holds else "Capture a module inside that puts out the tensor."
    rule = "hold a tensor" if which is None else f"hold {which!r}"
    if not holds:
        rule = "be a tensor, tuple, list, mapping or dataclass"
    return TypeError(broken_rule(who, side, rule, type(output).__name__, remedy))


def replace_output(output: Any, key: int | str | None, tensor: torch.Tensor) -> Any:
    """A shallow copy of a module's output with one tensor replaced."""
    if key is None:
        return tensor
    if isinstance(output, (tuple, list)):
        items = list(output)
        items[int(key)] = tensor
        if isinstance(output, tuple):
            return output._make(items) if hasattr(output, "_make") else type(output)(items)
        return items
    if isinstance(output, Mapping):
        copied: Any = output.copy() if hasattr(output, "copy") else dict(output)
        copied[key] = tensor
        return copied
    copied = copy.copy(output)  # a dataclass: made without a call of it, which may do more than to keep fields
    object.__setattr__(copied, str(key), tensor)  # also where it is frozen
    return copied


def values_of(output: object) -> tuple[object, ...] | None:
    """What a list, a mapping or a dataclass holds, in its order; None for what is none of them."""
    if isinstance(output, list):
        return tuple(output)
    return tuple(_by_name(output).values()) or None


def with_values(output: Any, values: tuple[object, ...]) -> Any:
    """The same with other values, as `values_of` gives them; what doesn't change isn't copied."""
    items = list(enumerate(output)) if isinstance(output, list) else list(_by_name(output).items())
    for (key, before), value in zip(items, values, strict=True):
        if value is not before:
            output = replace_output(output, key, value)  # type: ignore[arg-type]
    return output
