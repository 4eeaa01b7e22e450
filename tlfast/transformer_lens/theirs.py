"""What TransformerLens' own `run_with_cache` would do: which points it hooks, under which keys, by whose code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .arguments import uncounted
from .names import gate, hook_points

# What a run of theirs calls of a model and of its points. Where a class of the user's has its own, it is the user's
# that must be called.
_OF_MODELS = (
    "_check_hook_fireable", "_enable_hook", "_enable_hook_with_name", "_enable_hooks_for_points", "_gated_hook_reason",
    "_pos_slice_dim", "_remove_temporary_hook", "add_hook", "check_and_add_hook", "check_hooks_to_add",
    "clear_contexts", "get_caching_hooks", "hook_points", "hooks", "remove_all_hook_fns", "reset_hooks",
)  # fmt: skip
OF_POINTS = ("add_hook", "forward", "register_forward_hook", "register_full_backward_hook", "remove_hooks")
# Whose functions those may be. The globals tell: a decorator takes the name and module of what it wraps, not these.
_OURS = ("transformer_lens.", "tlfast.transformer_lens.", "torch.nn.modules.")
# The lists and dictionaries in which a point keeps its hooks.
_HOOKS = (
    "fwd_hooks", "bwd_hooks", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)  # fmt: skip


def _is_own(function: Any) -> bool:
    """Whether a function of a class is TransformerLens' own, or stands there by `install`."""
    if isinstance(function, property):
        function = function.fget
    if not isinstance(function, FunctionType):
        return function is None
    space = str(function.__globals__.get("__name__"))
    if space == "contextlib":
        return _is_own(getattr(function, "__wrapped__", object()))
    return space.startswith(_OURS)


def _overridden(owner: Any, names: Sequence[str]) -> bool:
    return not all(_is_own(getattr(type(owner), name, None)) for name in names)


def _replaced(owner: Any, names: Sequence[str]) -> bool:
    return not vars(owner).keys().isdisjoint(names)


def is_a_users(model: nn.Module) -> bool:
    """Whether a run of theirs calls methods of the model that aren't theirs: then it is a run of nobody else's."""
    return _overridden(model, (*_OF_MODELS, "hook_dict")) or _replaced(model, _OF_MODELS)


def users_classes(points: Sequence[Any]) -> set[type]:
    """The classes among those of the points that have an `add_hook` of somebody's, or what it calls."""
    return {cls for cls, point in {type(point): point for point in points}.items() if _overridden(point, OF_POINTS)}


def of_users_classes(points: Sequence[Any]) -> list[Any]:
    """The points whose class, or who themselves, have an `add_hook` of somebody's, or what it calls."""
    theirs = users_classes(points)
    return [point for point in points if type(point) in theirs or _replaced(point, OF_POINTS)]


def any_is_a_users(points: Sequence[Any]) -> bool:
    """Whether a run of theirs meets points of a class of somebody's, or gradients that it scales."""
    if _has_any_global_hook() or of_users_classes(points):
        return True
    return any(vars(point).get("backward_scale", 1.0) != 1.0 for point in points)


def is_hooked(point: Any) -> bool:
    """Whether there are hooks at a point already.

    Beside a hook of somebody's, who may put another tensor in the place of a point's, a full backward hook fires where
    the gradient reaches what the point was given, and PyTorch raises for a change in place.
    """
    own = vars(point)
    return any(own.get(name) for name in _HOOKS)


class _Look(threading.local):
    """The points of the model whose run is being set up, for theirs to find them without a second search."""

    model: Any = None
    points: dict[str, Any]


_look = _Look()


def remembering(original: property) -> property:
    """The `hook_dict` of a bridge, which is made at each reading, made once for a run."""
    read: Any = original.fget

    @wraps(read)
    def hook_dict(model: Any) -> Any:
        return dict(_look.points) if _look.model is model else read(model)

    return property(hook_dict, original.fset, original.fdel, original.__doc__)


class Left:
    """The names_filter with which theirs runs where the points are ours: it lets through what theirs complains of."""

    def __init__(self, off: Iterable[str]):
        self.off = frozenset(off)

    def __call__(self, name: str) -> bool:
        _look.model = None  # theirs has read its hook_dict, and what runs from now on may change the model
        return name in self.off


class Asked:
    """What a run of theirs is asked for: points by the keys that they get, in its order."""

    def __init__(
        self,
        model: nn.Module,
        known: dict[str, Any],
        found: dict[str, Any],
        off: Iterable[str] = (),
        exact: Iterable[str] = (),
    ):
        self.model, self.known, self.found, self.left, self.exact = model, known, found, Left(off), frozenset(exact)

    def look_once(self) -> None:
        """From now on, and until theirs goes through the names, its `hook_dict` is the one that was read."""
        _look.model, _look.points = self.model, self.known

    def forget(self) -> None:
        _look.model, _look.points = None, {}

    @uncounted
    def left_to(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The run as theirs makes it, for the same names; a predicate is asked once, and the model for its points."""
        if (
            options.get("names_filter") is None
        ):  # which is more than all names: nothing that is switched off is complained of
            return original(self.model, *args, **options)
        self.look_once()
        try:
            left = Left([*self.found, *self.left.off])
            return original(self.model, *args, **{**options, "names_filter": left})
        finally:
            self.forget()

    def completed(self, cache: dict[str, Any]) -> dict[str, Any]:
        """The cache with what a bridge in compatibility mode adds at the end: the aliases of its canonical names."""
        if not getattr(self.model, "compatibility_mode", False):
            return cache
        aliases = {name: point.name for name, point in self.known.items() if name != point.name}
        last = {canonical: alias for alias, canonical in aliases.items()}
        added = {}
        for key, kept in cache.items():
            name, suffix = (key.removesuffix("_grad"), "_grad") if key.endswith("_grad") else (key, "")
            if name in last:
                added[last[name] + suffix] = kept
        cache.update(added)
        for alias, canonical in aliases.items():
            for suffix in ("", "_grad"):
                if alias + suffix not in cache and canonical + suffix in cache:
                    cache[alias + suffix] = cache[canonical + suffix]
        return cache


def is_bridge(model: nn.Module) -> bool:
    """Whether a model keeps its points under aliases, too."""
    return hasattr(model, "compatibility_mode")


def asked_of_theirs(model: nn.Module, names_filter: Any) -> Asked | None:
    """What the model's own `run_with_cache` hooks for a filter of its kinds; None where it is to say what is wrong."""
    known = hook_points("run_with_cache", model)
    if names_filter is None:
        return Asked(model, known, known)
    wanted: Callable[[str], bool]
    if isinstance(names_filter, (str, list)):
        asked = [names_filter] if isinstance(names_filter, str) else names_filter
        if not all(isinstance(name, str) and name in known for name in asked):
            return None
        wanted = (set(asked) | ({known[name].name for name in asked} if is_bridge(model) else set())).__contains__
    elif callable(names_filter):
        wanted = names_filter
    else:
        return None
    found = {name: point for name, point in known.items() if wanted(name)}
    if not is_bridge(model):
        return Asked(model, known, found)  # whose points that are switched off are hooked like others
    why_off = gate(model, exact=True)
    off = [name for name, point in found.items() if why_off(name, point) is not None]
    return Asked(model, known, {name: point for name, point in found.items() if name not in off}, off)


def with_own_names(model: nn.Module, known: dict[str, Any], found: dict[str, Any], swept: bool) -> dict[str, Any]:
    """With the name of the point itself beside each alias that was asked for by name, as a bridge keeps it."""
    if not is_bridge(model) or swept:
        return found
    own = {point.name for point in found.values()}
    return {name: point for name, point in known.items() if name in found or name in own}


def within_layers(model: nn.Module, found: dict[str, Any], start: int | None, stop: int | None) -> dict[str, Any]:
    """Without the points that a bridge leaves out where its run starts or stops at a layer.

    It runs all the same what comes before the start, and enters the block at which it stops.
    """
    if not is_bridge(model) or not hasattr(model, "blocks"):
        return found
    n_blocks = len(model.blocks)  # type: ignore[arg-type]
    first, last = (limit if limit is None or limit >= 0 else n_blocks + limit for limit in (start, stop))
    embedding = getattr(model, "_is_embedding_stage_hook", lambda name: False)

    def inside(name: str) -> bool:
        if first is not None and embedding(name):
            return False
        parts = name.split(".")
        if parts[0] != "blocks" or len(parts) < 2 or not parts[1].isdecimal():
            return True
        return (first is None or int(parts[1]) >= first) and (last is None or int(parts[1]) < last)

    return {name: point for name, point in found.items() if inside(name)}
