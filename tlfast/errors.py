"""The one form of an error text: who, which argument, what rule, what was given, what to do."""

from __future__ import annotations


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
