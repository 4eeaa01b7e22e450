"""Let TransformerLens' own caching go through tlfast, for one model or for all, and take it back to the byte."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from ..errors import broken_rule
from ..hooks import full_hooks
from ..hooks.patches import Patch, Patches
from .arguments import by_name, uncounted
from .caching import run_as_theirs
from .compatibility import warn_if_wrong
from .handles import SinkHandle, Sinks
from .jacobian_lens import jacobian_lens_patches
from .library import bridge_type, hook_point_type, root_module_type
from .names import hook_points
from .theirs import Left, any_is_a_users, asked_of_theirs, is_a_users, remembering
from .tools import PACKAGE, Waiting
from .tools import patches as patches_of_tools

# The hooks by which TransformerLens fills its caches: they read a gradient and return None.
_CACHING = re.compile(r"(run_with_cache|get_caching_hooks|add_caching_hooks)\.<locals>\.")
# What `add_hook` calls, in the versions that register full backward hooks and in those that don't.
_REGISTER = ("register_full_backward_hook", "register_backward_hook")
# Left to theirs, whose caching hooks are then taken one by one, unless they are what they are without being given.
_LEFT_TO_THEIRS = {
    "start_at_layer": None, "stop_at_layer": None, "reset_hooks_end": True, "clear_contexts": False,
    "remove_batch_dim": False,
}  # fmt: skip


@lru_cache(maxsize=256)
def _what(code: CodeType, qualname: str) -> tuple[int | None, bool]:
    """Where a function has the hook that it wraps around, and whether it fills a cache; many have the same code."""
    names = code.co_freevars
    inside = next((names.index(name) for name in ("hook", "full_hook") if name in names), None)
    return inside, _CACHING.search(qualname) is not None


def is_caching_hook(function: Any) -> bool:
    """Whether a hook that is being registered is one of TransformerLens' own that fill a cache."""
    while isinstance(function, FunctionType) and function.__module__.startswith("transformer_lens."):
        inside, caching = _what(function.__code__, function.__qualname__)
        if inside is None or not function.__closure__:
            return caching
        function = function.__closure__[inside].cell_contents
        function = getattr(function, "func", function)  # of a partial
    return False


def _hooks_of(point: Any) -> Iterator[Any]:
    for hooks in (point._forward_pre_hooks, point._forward_hooks, point._backward_pre_hooks, point._backward_hooks):
        yield from hooks.values()


def _is_somebodys(hook: Any) -> bool:
    """Whether a hook of a point is neither a tap's nor one of TransformerLens' own that fill a cache."""
    return not type(hook).__module__.startswith("tlfast.") and not is_caching_hook(hook)


def _registering(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def register(point: Any, hook: Any, prepend: bool = False) -> Any:
        if not _in_force.concern(point) or not is_caching_hook(hook):
            return original(point, hook, prepend=prepend)
        # A tap costs a tenth of a full backward hook. Beside a hook of somebody's that is needed: see `is_hooked`.
        sinks = Sinks.at(point)
        if sinks is None and (_has_any_global_hook() or any(map(_is_somebodys, _hooks_of(point)))):
            return original(point, hook, prepend=prepend)
        return SinkHandle(sinks or Sinks(point), hook, prepend)

    return register


@lru_cache(maxsize=64)
def _takes_incl_bwd(function: Callable[..., Any]) -> bool:
    return "incl_bwd" in inspect.signature(function).parameters


def _caches_gradients(host: type) -> bool:
    """Whether a model's own `run_with_cache` knows incl_bwd; the bridges of 3.x before 3.8 drop it without a word."""
    own = [vars(cls)["run_with_cache"] for cls in host.__mro__ if "run_with_cache" in vars(cls)]
    return any(_takes_incl_bwd(getattr(function, "tlfast_replaced", function)) for function in own)


def _caching(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    @uncounted
    def cached(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        given, options = by_name(original, args, kwargs)
        names_filter = options.get("names_filter")
        if not options.get("incl_bwd", False) or isinstance(names_filter, Left) or not _in_force.concern(model):
            return original(model, *args, **kwargs)
        left = [name for name, usual in _LEFT_TO_THEIRS.items() if options.get(name, usual) is not usual]
        caches_gradients = _caches_gradients(type(model))
        if not caches_gradients:
            _refuse_what_is_lacking(left, options)
        elif left or not torch.is_grad_enabled() or is_a_users(model):
            return original(model, *args, **kwargs)
        asked = asked_of_theirs(model, names_filter)
        if asked is None:
            return original(model, *args, **kwargs)
        if caches_gradients and any_is_a_users(list(asked.found.values())):
            return asked.left_to(original, *given, **options)
        return run_as_theirs(original.__get__(model), asked, given, options, caches_gradients)

    replacing: Any = cached
    replacing.tlfast_replaced = original
    return cached


def _refuse_what_is_lacking(left: list[str], options: dict[str, Any]) -> None:
    if left and left != ["remove_batch_dim"]:
        raise ValueError(
            broken_rule(
                "run_with_cache", left[0], "be left out with incl_bwd=True", repr(options[left[0]]),
                "This TransformerLens caches no gradients on a bridge; tlfast does, and removes its own hooks.",
            )
        )  # fmt: skip


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


def _replacements() -> Iterator[Patch]:
    point, hosts = hook_point_type(), _hosts()
    for name in _REGISTER:
        yield point, name, _registering(getattr(point, name))
    for host in hosts:
        yield host, "run_with_cache", _caching(vars(host)["run_with_cache"])
    for cls in dict.fromkeys(cls for host in hosts for cls in host.__mro__):
        made = vars(cls).get("hook_dict")
        if isinstance(made, property) and cls.__module__.startswith("transformer_lens."):
            yield cls, "hook_dict", remembering(made)
    yield from _replacements_of_tools()


def _replacements_of_tools() -> Iterator[Patch]:
    yield from patches_of_tools(_in_force.concern)
    yield from jacobian_lens_patches(_in_force.concern)


class _InForce(Patches):
    """The patches, and while anybody wants them who waits for the import of a tool."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = Waiting(lambda: self.also(_replacements_of_tools()))

    def changed(self) -> None:
        wanted, waits = self.wanted() and PACKAGE not in sys.modules, self._waiting in sys.meta_path
        if wanted and not waits:
            sys.meta_path.insert(0, self._waiting)
        elif waits and not wanted:
            sys.meta_path.remove(self._waiting)


_in_force = _InForce()


def installed() -> bool:
    """Whether `install` is in force."""
    return _in_force.everywhere()


def _enter(only: list[Any] | None, hooked: list[Any]) -> None:
    """Put both in force, for these objects or for all, or neither."""
    _in_force.enter(_replacements, only)
    try:
        full_hooks.enter(hooked)
    except BaseException:
        _in_force.leave(only)
        raise


def install() -> None:
    """Let every TransformerLens model cache through tlfast, from now on, until `uninstall`.

    ``run_with_cache(incl_bwd=True)``, ``get_caching_hooks`` and ``add_caching_hooks`` give what they gave, to the bit;
    ``HookPoint.add_hook`` stays as it is. Every other backward hook of a HookPoint is called by native code, as by
    `tlfast.install_hooks`, and gives what it gave: also one that returns a gradient. ``JacobianLens.fit``, where there
    is one, makes its rows by `tlfast.recipes`, within rounding. The tool `attribution_patch`, in
    versions that have it, takes pairs in batches through `tlfast.recipes`, and gives the same nodes and edges up to
    rounding; the function that was imported before stays theirs. Warns where
    backward hooks of this TransformerLens are wrong. Calls are counted: it is in force until as many calls of
    `uninstall`.

    Example:
        tlfast.transformer_lens.install()
        loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    """
    if not installed():
        warn_if_wrong()
    _enter(None, [hook_point_type()])


def uninstall() -> None:
    """Take back one `install`. With the last the classes are as they were; without any nothing happens."""
    if installed():
        _in_force.leave()
        full_hooks.leave([hook_point_type()])


@contextmanager
def accelerate(model: Any) -> Iterator[Any]:
    """Let one model cache through tlfast inside the context: what `install` does, for this model alone.

    What is copied from it or pickled inside isn't accelerated.

    Args:
        model: a TransformerBridge, a HookedTransformer or any HookedRootModule.

    Example:
        with accelerate(model):
            loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    """
    only = [model, *{id(point): point for point in hook_points("accelerate", model).values()}.values()]
    _enter(only, only)
    try:
        yield model
    finally:
        full_hooks.leave(only)
        _in_force.leave(only)
