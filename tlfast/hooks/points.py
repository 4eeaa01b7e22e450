"""Find the modules that a spec means: by name, glob or predicate, or given themselves."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import nn

from ..errors import broken_rule
from ..globs import glob_to_regex as glob_to_regex
from ..globs import is_glob as is_glob
from ..spec import Points
from .experts import all_expert_layers


def as_list(points: Points) -> list[Any]:
    """Points that are no predicate, one or several of them, as a list."""
    return [points] if isinstance(points, (str, nn.Module)) else list(cast("Iterable[Any]", points))


def match_names(
    who: str, names: Iterable[str], points: Points, argument: str = "points", swept: Collection[str] | None = None
) -> list[str]:
    """The names that ``points`` means, in the order of ``names``; ValueError for one that matches nothing.

    Args:
        who, argument: the caller and its argument, for errors.
        names: all names.
        points: names, globs or a predicate.
        swept: those that a glob or predicate may match; None: all.
    """
    known = list(names)
    open_to_all = known if swept is None else [name for name in known if name in swept]
    if callable(points):
        wanted = {name for name in open_to_all if points(name)}
        if not wanted:
            raise ValueError(
                broken_rule(who, argument, "match a module", "a predicate that is false for all", _some(known))
            )
        return [name for name in known if name in wanted]
    patterns = as_list(points)
    if not patterns:
        raise ValueError(broken_rule(who, argument, "name at least one module", patterns, _some(known)))
    wanted = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise _not_points(who, argument, pattern)
        regex = glob_to_regex(pattern)
        found = [n for n in open_to_all if regex.fullmatch(n)] if is_glob(pattern) else {pattern} & set(known)
        if not found:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            hint = f"Nearest: {', '.join(near)}." if near else _some(known)
            raise ValueError(broken_rule(who, argument, "match a module", repr(pattern), hint))
        wanted.update(found)
    return [name for name in known if name in wanted]


def _some(known: list[str]) -> str:
    shown = ", ".join(known[:5])
    return f"The model has {len(known)} modules: {shown}{', ...' if len(known) > 5 else ''}."


def _not_points(who: str, argument: str, given: object) -> TypeError:
    remedy = "Pass strings, or modules of the model."
    return TypeError(broken_rule(who, argument, "be names, globs or modules", repr(given), remedy))


def named_points(who: str, model: nn.Module, points: Points, argument: str = "points") -> Points:
    """``points`` in words: each module that was given itself by its name, one asked for beside it, else its first.

    Raises:
        ValueError, TypeError: for a module that isn't in the model or can't be called, and for what is no point.
    """
    single = isinstance(points, (str, nn.Module))
    if callable(points) and not single:
        return points
    if not single and not isinstance(points, Iterable):
        raise _not_points(who, argument, points)
    given = as_list(points)
    if not any(isinstance(point, nn.Module) for point in given):
        return points
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for place, point in enumerate(given):
        if isinstance(point, nn.Module):
            known = names.get(id(point), [])
            if not known:
                got, remedy = f"a {type(point).__name__} that isn't in it", "Pass the model that holds it."
                raise ValueError(broken_rule(who, argument, "be modules of the model", got, remedy))
            if isinstance(point, (nn.ModuleList, nn.ModuleDict)):
                got, remedy = f"a {type(point).__name__} ({known[0]})", "Pass a list of the modules in it."
                raise TypeError(broken_rule(who, argument, "be modules that are called", got, remedy))
            given[place] = next((name for name in known if name in given), known[0])
    return cast(Points, given[0] if single else given)


def find_points(who: str, model: nn.Module, points: Points, argument: str = "points") -> dict[str, nn.Module]:
    """The modules that ``points`` means, keyed by name, in the model's order.

    A module that is known under two names is found under each of them by name, once by a glob or given itself.
    """
    points = named_points(who, model, points, argument)
    names = [] if callable(points) else as_list(points)
    modules = once = dict(model.named_modules())
    if any(isinstance(name, str) and ".expert_" in name for name in names):
        modules = once = once | {name: one for name, one in all_expert_layers(model).items() if name not in once}
    if any(name not in once for name in names if isinstance(name, str) and not is_glob(name)):
        modules = dict(model.named_modules(remove_duplicate=False)) | modules
    if "" not in names:  # the model itself is a point only by its name
        modules.pop("", None)
    found = {name: modules[name] for name in match_names(who, modules, points, argument, once.keys())}
    for name, module in found.items():
        refuse_scripted(who, argument, name, module)
    return found


def refuse_scripted(who: str, argument: str, name: str, module: nn.Module) -> None:
    """TypeError for a module that is scripted or traced: it takes no hooks."""
    if isinstance(module, torch.jit.ScriptModule):
        got = f"{name or type(module).__name__}, made by torch.jit"
        remedy = "Use the model that it was made of: code of torch.jit calls no hooks."
        raise TypeError(broken_rule(who, argument, "run in Python", got, remedy))
