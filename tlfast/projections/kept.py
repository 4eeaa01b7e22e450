"""What is made of a projection once for several captures of one run: matrices, and what applies sketches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
Kept = MutableMapping[Any, Any]
_open: ContextVar[Kept | None] = ContextVar("tlfast projections", default=None)


@contextmanager
def keeping(made: Kept) -> Iterator[None]:
    """Within, `once` keeps in ``made`` what it makes, and looks there first."""
    token = _open.set(made)
    try:
        yield
    finally:
        _open.reset(token)


def once(make: Callable[_Given, _Made], *given: _Given.args, **named: _Given.kwargs) -> _Made:
    """What a function makes of hashable arguments; nobody may change it. Outside of `keeping` it is made anew."""
    made = _open.get()
    if made is None:
        return make(*given, **named)
    key = (make, *given, *sorted(named.items()))
    if key not in made:
        made[key] = make(*given, **named)
    found: _Made = made[key]
    return found
