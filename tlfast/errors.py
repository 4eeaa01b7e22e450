"""The one form of an error text: who, which argument, what rule, what was given, what to do."""

from __future__ import annotations

from contextlib import ContextDecorator
from types import TracebackType


def broken_rule(who: str, argument: str, rule: str, got: object, remedy: str) -> str:
    """Return ``<who>: <argument> must <rule>, got <value>. <what to do>``."""
    return f"{who}: {argument} must {rule}, got {got}. {remedy}"


def one_of(who: str, argument: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``allowed``; ValueError otherwise."""
    if value not in allowed:
        raise ValueError(
            broken_rule(who, argument, f"be one of {', '.join(allowed)}", repr(value), "Check the spelling.")
        )
    return str(value)


class SpeakingAs(ContextDecorator):
    """Within its block, or the function that it decorates, an error of one of ``others`` begins with ``who`` instead.

    A function that is built on another one says of its own arguments what that one has found: the error stays the same
    object, with its type, cause and traceback.

    Example:
        >>> from tlfast.errors import SpeakingAs
        >>> with SpeakingAs("stream", "collect"):
        ...     raise ValueError("collect: model must be an nn.Module, got int. Pass the model.")
        Traceback (most recent call last):
        ValueError: stream: model must be an nn.Module, got int. Pass the model.
    """

    def __init__(self, who: str, *others: str) -> None:
        self._who, self._others = who, others

    def __enter__(self) -> SpeakingAs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        text = error.args[0] if error is not None and error.args else None
        for other in self._others if isinstance(text, str) else ():
            if error is not None and str(text).startswith((f"{other}: ", f"{other} at ")):  # a point
                error.args = (f"{self._who}{str(text)[len(other) :]}", *error.args[1:])
                return
