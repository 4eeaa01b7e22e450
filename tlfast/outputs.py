"""Which of a module's outputs is meant, and the outputs with that one replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import broken_rule


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


def select_output(output: object, which: int | str | None) -> tuple[torch.Tensor | None, int | str | None]:
    """The tensor to capture among a module's outputs, and where it is (None: the output is the tensor)."""
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, Mapping):
        keys: list[Any] = list(output.keys())
        if which is not None:  # an index counts the keys, as in a ModelOutput
            by_index = isinstance(which, int) and which not in output and -len(keys) <= which < len(keys)
            keys = [keys[which] if by_index else which]  # type: ignore[index]
        items = output
    elif isinstance(output, (tuple, list)):
        keys = list(range(len(output))) if which is None else [which]
        items = output  # type: ignore[assignment]
    else:
        return None, None
    for key in keys:
        try:
            value = items[key]
        except (KeyError, IndexError, TypeError):
            return None, None
        if isinstance(value, torch.Tensor) and (which is not None or value.is_floating_point()):
            return value, key
    return None, None


def replace_output(output: Any, key: int | str | None, tensor: torch.Tensor) -> Any:
    """A shallow copy of a module's output with one tensor replaced."""
    if key is None:
        return tensor
    if isinstance(output, Mapping):
        copied: Any = output.copy() if hasattr(output, "copy") else dict(output)
        copied[key] = tensor
        return copied
    items = list(output)
    items[int(key)] = tensor
    if isinstance(output, tuple):
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    return items
