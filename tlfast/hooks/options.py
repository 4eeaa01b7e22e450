"""The settings of a capture, once: `tlfast.capture`, a collection and `Capture` itself read these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import broken_rule
from ..spec import Attach, Backend, Calls, Missing, Spec, one_of


@dataclass(frozen=True, kw_only=True)
class TapOptions:
    """How gradients are taken, whatever is kept of them."""

    attach: Attach = "auto"
    """auto, tensor or full"""
    backend: Backend = "auto"
    """auto, native or python"""
    calls: Calls = "raise"
    """for a point that is called several times in a forward: raise, sum, last or stack"""
    missing: Missing = "raise"
    """for a point without a gradient: raise, or nan rows"""


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(TapOptions):
    """What a `Capture` is made of, beside its model.

    Raises:
        ValueError: for ``rows`` that are no positive number, and for a word that is none of those there are.

    Example:
        >>> from tlfast import Spec
        >>> from tlfast.hooks.options import CaptureOptions
        >>> CaptureOptions(specs=[Spec("0")], rows=8).calls
        'raise'
    """

    specs: Sequence[Spec]
    rows: int

    def __post_init__(self) -> None:
        if type(self.rows) is not int or self.rows < 1:
            got = repr(self.rows)
            raise ValueError(broken_rule("capture", "rows", "be a positive number", got, "Give the rows to hold."))
        check_words("capture", self)
        if self.calls == "stack" and any(spec.per == "token" for spec in self.specs):
            rule, remedy = 'not be "stack" with per="token"', 'A stack has the calls before the positions: use "sum".'
            raise ValueError(broken_rule("capture", "calls", rule, "'stack'", remedy))
        if self.calls == "stack" and any(spec.summed for spec in self.specs):
            rule, remedy = 'not be "stack" with summed=True', 'A sum has no place for them: use "sum".'
            raise ValueError(broken_rule("capture", "calls", rule, "'stack'", remedy))
        for spec in self.specs if self.calls in ("sum", "stack") else ():
            factors = spec.per == "token" and spec.queries is None
            if spec.of == "weight" and (spec.reduce == "norm" or (factors and self.calls == "sum")):
                rule = 'be "raise" or "last" for norms of weight gradients, and for their factors'
                remedy = "The norm of a sum isn't a sum of norms: keep the gradients themselves."
                raise ValueError(broken_rule("capture", "calls", rule, repr(self.calls), remedy))
        for spec in self.specs if self.attach == "full" else ():  # at whose nodes nothing is kept
            if spec.reads_act or spec.side != "output" or spec.of == "weight":
                rule = 'be "auto" or "tensor" where activations or inputs are read'
                got = f"'full' with of={spec.of!r}, side={spec.side!r}"
                raise ValueError(broken_rule("capture", "attach", rule, got, "Leave attach= out."))


def check_words(who: str, options: Any) -> None:
    """ValueError for the first field that holds none of the words that its type names."""
    kind: type = type(options)
    for name, known in words_of(kind).items():
        one_of(who, name, getattr(options, name), known)


@cache
def words_of(kind: type) -> dict[str, tuple[str, ...]]:
    """The words that each field may hold whose type is a Literal."""
    hints = get_type_hints(kind)
    return {
        field.name: get_args(hints[field.name]) for field in fields(kind) if get_origin(hints[field.name]) is Literal
    }


def taken(kind: type, options: Any) -> dict[str, Any]:
    """The fields of ``kind`` as ``options`` have them, which hold these and others."""
    return {field.name: getattr(options, field.name) for field in fields(kind)}
