"""What was given to a run_with_cache: by position or by name, to tlfast or to the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from ..errors import broken_rule

P = ParamSpec("P")
R = TypeVar("R")
# What a run_with_cache or a cache_fwd_and_bwd of ours takes and no run_with_cache of TransformerLens does.
OURS = ("metric", "params", "dtype", "reduce", "over", "calls", "backend", "gated")

# `warnings` counts no frames of a file with such a name.
_UNCOUNTED = "<tlfast: no frame for warnings, as those of importlib._bootstrap>"


def uncounted(function: Callable[P, R]) -> Callable[P, R]:
    """A function that stands between theirs and its caller, where theirs warns of a line of its caller's."""
    code: Any = function
    code.__code__ = code.__code__.replace(co_filename=_UNCOUNTED)
    return function


def own_run_with_cache(model: Any) -> Any:
    """The model's own `run_with_cache`, also where `accelerate` or `install` has put ours in its place."""
    found = model.run_with_cache
    replaced = getattr(found, "tlfast_replaced", None)
    return found if replaced is None else replaced.__get__(model)


@lru_cache(maxsize=64)
def _parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(function).parameters.items())[1:])


def _parameters(method: Any) -> dict[str, inspect.Parameter]:
    """What a method, of a class or bound, takes behind the model."""
    return _parameters_of(getattr(method, "__func__", method))


def by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) that mean the same to a method, with all that has a name among the kwargs.

    What can't be right stays as it is, for the method's own TypeError.
    """
    kinds = {name: parameter.kind for name, parameter in _parameters(function).items()}
    if inspect.Parameter.VAR_POSITIONAL in kinds.values() or inspect.Parameter.POSITIONAL_ONLY in kinds.values():
        return args, kwargs
    names = [name for name in kinds if kinds[name] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    named = dict(zip(names, args, strict=False))
    if len(named) < len(args) or named.keys() & kwargs.keys():
        return args, kwargs
    return (), {**named, **kwargs}


def default_of(function: Any, name: str) -> Any:
    """What a method takes an argument for that isn't given; None where it knows no such argument."""
    parameter = _parameters(function).get(name)
    return None if parameter is None else parameter.default


def _taken_by(model: Any) -> set[str]:
    """The names that the model's forward takes, and that of the model inside a bridge."""
    inner = getattr(model, "original_model", None)
    models = [model, inner] if isinstance(inner, nn.Module) else [model]
    return {name for one in models for name in inspect.signature(one.forward).parameters}


def _refuse_what_both_take(who: str, model: Any, kwargs: dict[str, Any]) -> None:
    taken: set[str] = set()
    for name in OURS:
        if name in kwargs:
            taken = taken or _taken_by(model)
            if name in taken:
                raise ValueError(
                    broken_rule(
                        who, name, "be told apart from the argument of the model's forward", repr(kwargs[name]),
                        "Give the model's in model_kwargs={...}; beside model_kwargs, which may be empty, "
                        f"{name}= is tlfast's.",
                    )
                )  # fmt: skip


def told_apart(function: Callable[P, R]) -> Callable[P, R]:
    """Sort what a caller gave to tlfast and to the model.

    A keyword of ours that the model's forward takes, too, is an error, unless model_kwargs is given as well. And what
    the model's own run_with_cache takes by position may be given so.
    """
    positional = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values())

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):
            if kwargs.get("model_kwargs") is None:
                _refuse_what_both_take(function.__name__, args[0], kwargs)
            if positional:
                own = own_run_with_cache(args[0])
                given, kwargs = by_name(own, args[1:], kwargs)
                args = (args[0], *given)
        return function(*args, **kwargs)

    return called
