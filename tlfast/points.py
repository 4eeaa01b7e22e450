"""Find the modules that a spec means, by name, glob or predicate."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from .errors import broken_rule
from .spec import Points


def glob_to_regex(glob: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within one part of a dotted name, ``**`` crosses dots, ``[...]`` is a character class."""
    out = ""
    for token in re.findall(r"\*\*|\*|\?|\[[^\]]+\]|[^*?\[]+|\[", glob):
        if token == "**":
            out += ".*"
        elif token == "*":
            out += r"[^.]*"
        elif token == "?":
            out += r"[^.]"
        elif token.startswith("[") and token.endswith("]") and len(token) > 2:
            out += token.replace("[!", "[^")
        else:
            out += re.escape(token)
    return re.compile(out)


def is_glob(name: str) -> bool:
    """Whether a name holds wildcards."""
    return any(c in name for c in "*?[")


def match_names(who: str, names: Iterable[str], points: Points) -> list[str]:
    """The names that ``points`` means, in the order of ``names``; ValueError for one that matches nothing."""
    known = list(names)
    if callable(points):
        wanted = {name for name in known if points(name)}
        if not wanted:
            raise ValueError(
                broken_rule(who, "points", "match a module", "a predicate that is false for all", _some(known))
            )
        return [name for name in known if name in wanted]
    patterns = [points] if isinstance(points, str) else list(points)
    if not patterns:
        raise ValueError(broken_rule(who, "points", "name at least one module", patterns, _some(known)))
    wanted = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(broken_rule(who, "points", "be names or globs", repr(pattern), "Pass strings."))
        regex = glob_to_regex(pattern)
        found = [n for n in known if (regex.fullmatch(n) if is_glob(pattern) else n == pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            hint = f"Nearest: {', '.join(near)}." if near else _some(known)
            raise ValueError(broken_rule(who, "points", "match a module", repr(pattern), hint))
        wanted.update(found)
    return [name for name in known if name in wanted]


def _some(known: list[str]) -> str:
    shown = ", ".join(known[:5])
    return f"The model has {len(known)} modules: {shown}{', ...' if len(known) > 5 else ''}."


def find_points(who: str, model: nn.Module, points: Points) -> dict[str, nn.Module]:
    """The modules that ``points`` means, keyed by name, in the model's order.

    A module that is known under two names is found under each of them by name, once by a glob.
    """
    names = [points] if isinstance(points, str) else [] if callable(points) else list(points)
    exact = bool(names) and not any(is_glob(str(name)) for name in names)
    modules = dict(model.named_modules(remove_duplicate=not exact))
    if "" not in names:  # the model itself is a point only by its name
        modules.pop("", None)
    return {name: modules[name] for name in match_names(who, modules, points)}
