"""Let TransformerLens' own caching go through tlfast, for one model or for all, and take it back to the byte."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .. import steps as python_steps
from ..errors import broken_rule
from ..ops import pick_native
from ..taps import SinkTap
from .caching import run_with_cache
from .compatibility import warn_if_wrong
from .handles import TapHandle
from .library import bridge_type, hook_point_type, root_module_type
from .names import hook_points

# The hooks by which TransformerLens fills its caches: they read a gradient and return None.
_CACHING = re.compile(r"(run_with_cache|get_caching_hooks|add_caching_hooks)\.<locals>\.")
# What `add_hook` calls, in the versions that register full backward hooks and in those that don't.
_REGISTER = ("register_full_backward_hook", "register_backward_hook")
# What our run_with_cache takes; anything else is left to theirs, whose caching hooks are then taken one by one.
_LEFT_TO_THEIRS = ("start_at_layer", "stop_at_layer", "reset_hooks_end", "clear_contexts", "remove_batch_dim")


def _innermost(function: Any) -> Any:
    """The hook that was given to `add_hook`, out of the functions that it wraps around."""
    while isinstance(function, FunctionType) and function.__closure__:
        inside = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        cell = inside.get("hook", inside.get("full_hook"))
        if cell is None or not function.__module__.startswith("transformer_lens."):
            break
        function = cell.cell_contents
    return getattr(function, "func", function)  # of a partial


def is_caching_hook(function: Any) -> bool:
    """Whether a hook that is being registered is one of TransformerLens' own that fill a cache."""
    hook = _innermost(function)
    return (
        isinstance(hook, FunctionType)
        and hook.__module__.startswith("transformer_lens.")
        and _CACHING.search(hook.__qualname__) is not None
    )


def _registering(original: Callable[..., Any]) -> Callable[..., Any]:
    def register(point: Any, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Put a caching hook on a tap, which costs a tenth of a full backward hook; leave every other alone."""
        if not is_caching_hook(hook):
            return original(point, hook, *args, **kwargs)

        def sink(grad: torch.Tensor) -> None:
            hook(point, (), (grad,))  # TransformerLens' own wrapping: conversions, alias names

        native = pick_native("transformer_lens", "auto", set())
        name = str(point.name)
        if native is None:
            tap: Any = SinkTap(python_steps.Step(1, "nan"), name, sink, None)
        else:
            tap = native.Tap.to_sink(native.Step(1, "nan"), name, sink, "none", (), None)
        return TapHandle(point, tap, "tensor", native)

    return register


def _caches_gradients(host: type) -> bool:
    """Whether a model's own `run_with_cache` knows incl_bwd; the bridges of 3.x before 3.8 drop it without a word."""
    own = [vars(cls)["run_with_cache"] for cls in host.__mro__ if "run_with_cache" in vars(cls)]
    own = [getattr(function, "tlfast_replaced", function) for function in own]
    return any("incl_bwd" in inspect.signature(function).parameters for function in own)


def _caching(original: Callable[..., Any]) -> Callable[..., Any]:
    def cached(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("incl_bwd", False):
            return original(model, *args, **kwargs)
        left = [name for name in _LEFT_TO_THEIRS if name in kwargs]
        if not _caches_gradients(type(model)):
            if left and left != ["remove_batch_dim"]:
                raise ValueError(
                    broken_rule(
                        "run_with_cache", left[0], "be left out with incl_bwd=True", repr(kwargs[left[0]]),
                        "This TransformerLens caches no gradients on a bridge; tlfast does, and removes its own hooks.",
                    )
                )  # fmt: skip
            return run_with_cache(model, *args, params=True, calls="last", gated="skip", **kwargs)
        names_filter = kwargs.get("names_filter")
        known = names_filter is None or callable(names_filter) or isinstance(names_filter, (str, list))
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        if isinstance(names, list):
            known = all(name in hook_points("run_with_cache", model) for name in names)
        if left or not known or not torch.is_grad_enabled():
            return original(model, *args, **kwargs)
        return run_with_cache(model, *args, params=True, calls="last", gated="skip", **kwargs)

    cached.tlfast_replaced = original  # type: ignore[attr-defined]
    return cached


def _hosts() -> list[type]:
    """The classes that define a `run_with_cache`: HookedRootModule, HookedTransformer and its kin, the bridges."""
    found: list[type] = [root_module_type()]
    bridge = bridge_type()
    found += [] if bridge is None else [bridge]
    seen: dict[type, None] = {}
    while found:
        host = found.pop()
        for cls in host.__mro__:
            if "run_with_cache" in vars(cls) and cls.__module__.startswith("transformer_lens."):
                seen.setdefault(cls)
        kin: list[type] = host.__subclasses__()
        found += [cls for cls in kin if cls.__module__.startswith("transformer_lens.")]
    return list(seen)


_installed: list[tuple[type, str, Any]] = []  # what stood in the class itself before; None: nothing


def installed() -> bool:
    """Whether `install` is in force."""
    return bool(_installed)


def install() -> None:
    """Let every TransformerLens model cache through tlfast, from now on, until `uninstall`.

    ``run_with_cache(incl_bwd=True)``, ``get_caching_hooks`` and ``add_caching_hooks`` give what they gave, to the bit;
    ``HookPoint.add_hook`` stays as it is, and so does every hook that isn't TransformerLens' own caching. Warns where
    backward hooks of this TransformerLens are wrong.

    Example:
        tlfast.transformer_lens.install()
        loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    """
    if _installed:
        return
    warn_if_wrong()
    point = hook_point_type()
    for name in _REGISTER:
        _replace(point, name, _registering(getattr(nn.Module, name)))
    for host in _hosts():
        _replace(host, "run_with_cache", _caching(vars(host)["run_with_cache"]))


def _replace(cls: type, name: str, function: Any) -> None:
    _installed.append((cls, name, vars(cls).get(name)))
    setattr(cls, name, function)


def uninstall() -> None:
    """Take back what `install` did: the classes are as they were."""
    while _installed:
        cls, name, before = _installed.pop()
        if before is None:
            delattr(cls, name)
        else:
            setattr(cls, name, before)


@contextmanager
def accelerate(model: Any) -> Iterator[Any]:
    """Let one model cache through tlfast inside the context: what `install` does, for this model alone.

    Args:
        model: a TransformerBridge, a HookedTransformer or any HookedRootModule.

    Example:
        with accelerate(model):
            loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    """
    points = {id(point): point for point in hook_points("accelerate", model).values()}.values()
    changes = [(point, name, _registering(getattr(nn.Module, name))) for point in points for name in _REGISTER]
    changes.append((model, "run_with_cache", _caching(type(model).run_with_cache)))
    # In the instances' own dictionaries, past the __setattr__ of modules and bridges, which keep lists of their own.
    before = [(vars(owner), name, vars(owner).get(name)) for owner, name, _ in changes]
    try:
        for owner, name, function in changes:
            vars(owner)[name] = function.__get__(owner)
        yield model
    finally:
        for values, name, previous in before:
            if previous is None:
                values.pop(name, None)
            else:
                values[name] = previous
