"""Which hook points a names_filter means: names, short names, globs, predicates; aliases and gated points."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..errors import broken_rule
from ..hooks.points import glob_to_regex, is_glob
from .library import full_name, root_module_type

# None is every point; a tuple like ("resid_post", 3) is one name in the short form of TransformerLens.
ShortName = tuple[Any, ...]
NamesFilter = str | ShortName | nn.Module | Sequence[str | ShortName | nn.Module] | Callable[[str], bool] | None
# Points of tensors [batch, position, head, d_head].
_BY_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")


def hook_points(who: str, model: nn.Module) -> dict[str, Any]:
    """All hook points of a model by name, aliases included: its `hook_dict`."""
    found = getattr(model, "hook_dict", None)
    if not isinstance(found, dict) or not found:
        raise TypeError(
            broken_rule(
                who, "model", "have hook points (a hook_dict)", type(model).__name__,
                "Pass a TransformerBridge, a HookedTransformer or a HookedRootModule after setup().",
            )
        )  # fmt: skip
    return found


def is_short_name(given: object) -> bool:
    """Whether a tuple is one name, ("resid_post", 3), and not several names."""
    return isinstance(given, tuple) and len(given) in (2, 3) and (given[1] is None or isinstance(given[1], int))


def spelled_out(model: nn.Module, given: Any) -> str:
    """The full name of a point; a negative layer counts from the last."""
    parts = (given,) if isinstance(given, str) else tuple(given)
    if len(parts) > 1 and isinstance(parts[1], int) and parts[1] < 0:
        config: Any = model.cfg
        parts = (parts[0], config.n_layers + parts[1], *parts[2:])
    return full_name(parts)


def gate(model: nn.Module, exact: bool = False) -> Callable[[str, Any], str | None]:
    """A function of a point that says why a hook there would never be called, or None: the model's own check.

    Exactly the model's own says so of an alias, too, that means a point which is always on.
    """
    check: Any = getattr(model, "check_hooks_to_add", None)
    if not callable(check):
        return lambda name, point: None
    by_name_alone = len(inspect.signature(check).parameters) == 1

    def reason(name: str, point: Any) -> str | None:
        name = name if exact else point.name or name
        try:
            check(name) if by_name_alone else check(point, name, None, dir="bwd")
        except (AssertionError, ValueError) as error:
            return str(error)
        return None

    return reason


def find_names(
    who: str,
    model: nn.Module,
    names_filter: NamesFilter,
    gated: str = "raise",
    known: dict[str, Any] | None = None,
    own_sweep: bool = False,
) -> dict[str, Any]:
    """The hook points that a filter means, by the names that were asked for, in the model's order.

    Args:
        who: the caller, for errors.
        model: it has a `hook_dict`.
        names_filter: None, a name, a short name, a glob, a hook point, a predicate on names, or a sequence of all but
            the predicate.
        gated: what happens to a point that is switched off and was asked for by its name: "raise", or "skip" with a
            warning as for one that a predicate or a glob matches. Under None they are left out; "keep" keeps them
            there, since they do no harm where a point may stay silent.
        known: the model's points where they were read before: a bridge makes them anew at each reading.
        own_sweep: whether a predicate leaves out exactly what the model's own would.

    Raises:
        ValueError: for a name that isn't there, or is gated; TypeError for anything else than names.
    """
    known = hook_points(who, model) if known is None else known
    words = named_filter(who, model, names_filter, known)
    why_off = gate(model, exact=own_sweep and callable(words))
    if words is None and gated == "keep":
        return known
    if words is None:
        return {name: point for name, point in known.items() if why_off(name, point) is None}
    exact: set[str] = set()
    swept: set[str] = set()
    if callable(words):
        swept = {name for name in known if words(name)}
    else:
        single = isinstance(words, str) or is_short_name(words)
        for asked in [words] if single else words:
            if isinstance(asked, str) and asked not in known and is_glob(asked):
                regex = glob_to_regex(asked)
                found = {name for name in known if regex.fullmatch(name)}
                swept |= found
            elif isinstance(asked, str) or is_short_name(asked):
                name = asked if isinstance(asked, str) and asked in known else spelled_out(model, asked)
                found = {name} & known.keys()
                exact |= found
            else:
                raise TypeError(
                    broken_rule(who, "names_filter", "be names or a predicate", repr(asked), "Pass strings.")
                )
            if not found:
                near = difflib.get_close_matches(str(asked), known, n=3, cutoff=0.4)
                hint = f"Nearest: {', '.join(near)}." if near else "See model.hook_dict."
                raise ValueError(broken_rule(who, "names_filter", "match a hook point", repr(asked), hint))
    reasons = {name: why_off(name, known[name]) for name in exact | swept}
    off = {name: reason for name, reason in reasons.items() if reason is not None}
    for name in exact & off.keys() if gated != "skip" else ():
        raise ValueError(
            broken_rule(who, "a point", f"be switched on ({off[name]})", name, "Switch it on, or leave it.")
        )
    if off:
        warnings.warn(f"{who}: skipped points that are switched off: {', '.join(sorted(off))}", stacklevel=4)
    return {name: point for name, point in known.items() if name in reasons and name not in off}


def named_filter(who: str, model: nn.Module, names_filter: NamesFilter, known: dict[str, Any] | None = None) -> Any:
    """The filter in words: each hook point that was given itself by its name. It is callable, and no predicate."""
    single = isinstance(names_filter, nn.Module)
    if not single and (names_filter is None or callable(names_filter) or isinstance(names_filter, str)):
        return names_filter
    given: list[Any] = [names_filter] if single else list(names_filter)  # type: ignore[arg-type]
    if not any(isinstance(point, nn.Module) for point in given):
        return names_filter
    names: dict[int, str] = {}
    for name, point in (hook_points(who, model) if known is None else known).items():
        names.setdefault(id(point), getattr(point, "name", None) or name)
    for place, point in enumerate(given):
        if isinstance(point, nn.Module):
            if id(point) not in names:
                rule, got = "be hook points of the model", f"a {type(point).__name__} that isn't in its hook_dict"
                raise ValueError(broken_rule(who, "names_filter", rule, got, "See model.hook_dict."))
            given[place] = names[id(point)]
    return given[0] if single else given


def exact_names(model: nn.Module, names_filter: NamesFilter, found: dict[str, Any]) -> set[str]:
    """The names among those found that were asked for as they are, and not by None, a glob or a predicate."""
    if names_filter is None or callable(names_filter):
        return set()
    asked: Any = [names_filter] if isinstance(names_filter, str) or is_short_name(names_filter) else names_filter
    return {
        name if isinstance(name, str) and name in found else spelled_out(model, name)
        for name in asked
        if not isinstance(name, str) or name in found or not is_glob(name)
    }


def by_identity(found: dict[str, Any]) -> dict[str, Any]:
    """One name for each hook point: its own if that is among them, else the first."""
    chosen: dict[int, str] = {}
    for name, point in found.items():
        if id(point) not in chosen or name == point.name:
            chosen[id(point)] = name
    return {name: point for name, point in found.items() if chosen[id(point)] == name}


def conversion_of(point: Any) -> Callable[[Any], Any] | None:
    """What TransformerLens makes of a tensor at this point before a hook sees it, or None."""
    conversion = getattr(point, "hook_conversion", None)
    return None if conversion is None else conversion.convert


def is_by_head(known: dict[str, Any], name: str, point: Any) -> bool:
    """Whether a point's tensors are [batch, position, head, d_head]."""
    conversion = getattr(point, "hook_conversion", None)
    if name.endswith(_BY_HEAD) or getattr(conversion, "splits_attention_heads", False):
        return True
    # A bridge before 3.8 doesn't say what it converts: an alias does.
    return conversion is not None and any(other is point and alias.endswith(_BY_HEAD) for alias, other in known.items())


def position_dim(model: nn.Module, name: str, point: Any, by_head: bool, n_dims: int) -> int | None:
    """The dimension that the model's own `pos_slice` takes for the positions of a tensor at this point, if any."""
    declared = getattr(model, "_pos_slice_dim", None)  # bridges from 4.0 on
    if callable(declared):
        return int(declared(name, point)) if n_dims >= 2 else None
    dim = -3 if by_head else -2
    if isinstance(model, root_module_type()):
        return dim if n_dims >= -dim else None
    return dim if n_dims > -dim else 1 if n_dims == 2 else None  # bridges before 4.0
