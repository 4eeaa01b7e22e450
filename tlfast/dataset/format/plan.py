"""Which examples form which unit, and what is known of one example."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from ..errors import dataset_error

FLAG_NON_FINITE = 1  # some stored value of the row is NaN or infinite, at any point
FLAG_MISSING = 2  # the row is NaN at a point that did not fire
FLAG_SATURATED = 4  # a value of the row became infinite in the cast to the stored dtype

_UNIT_NAME = re.compile(r"u([0-9]{6}|[1-9][0-9]{6,17})", re.ASCII)


@dataclass(frozen=True)
class Example:
    """One sequence of tokens: its number in the plan, its tokens, and where they came from.

    ``start`` is the position of the first token in ``source``, ``length`` the number of real tokens.
    """

    id: int
    input_ids: Sequence[int]
    source: str
    start: int
    length: int


@dataclass(frozen=True)
class FieldExample(Example):
    """An example that is more than tokens, or none: an image has no ``input_ids`` and the length 0.

    ``kept`` are the fields that its row table keeps, by name; ``digest`` stands for names and values of all its fields
    beside the tokens.
    """

    kept: Mapping[str, Any] = field(default_factory=dict)
    digest: bytes = b""


@dataclass(frozen=True)
class Unit:
    """The examples ``start <= id < stop``: the piece of work that one process does whole, and its file."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Split examples 0..n_examples-1 into units of ``rows_per_unit`` rows; the last may be shorter.

    Args:
        n_examples: how many there are, those of extensions included.
        rows_per_unit: examples of a whole unit.
        extended_at: the first example of each extension, rising. An extension begins a unit, so that the last unit
            before it stays as short as it was.

    Raises:
        DatasetError: where a number is not a positive int, or an extension without examples.

    Example:
        >>> from tlfast.dataset.format.plan import Plan
        >>> Plan(n_examples=5, rows_per_unit=2).units[-1]
        Unit(name='u000002', start=4, stop=5)
        >>> Plan(n_examples=5, rows_per_unit=2).extended(3).units[-1]
        Unit(name='u000004', start=7, stop=8)
    """

    n_examples: int
    rows_per_unit: int
    extended_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for argument in ("n_examples", "rows_per_unit"):
            value = getattr(self, argument)
            if type(value) is not int or not 1 <= value < 2**60:
                raise dataset_error("Plan", argument, "be a positive int", repr(value), "Count the examples first.")
        if any(start >= stop for start, stop in pairwise(self._bounds)):
            rule = f"rise between 0 and {self.n_examples}"
            raise dataset_error("Plan", "extended_at", rule, self.extended_at, "Extend by one example at least.")

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        return (0, *self.extended_at, self.n_examples)

    @cached_property
    def _first_units(self) -> tuple[int, ...]:
        # Of dataset.json's own plan, of each extension, and behind the last one how many there are.
        counts = (-(-(stop - start) // self.rows_per_unit) for start, stop in pairwise(self._bounds))
        return tuple(accumulate(counts, initial=0))

    @property
    def n_units(self) -> int:
        """How many units there are."""
        return self._first_units[-1]

    @property
    def units(self) -> list[Unit]:
        """All units in the order of their examples."""
        return [self.unit(k) for k in range(self.n_units)]

    def unit(self, k: int) -> Unit:
        """Return unit number ``k``; IndexError outside 0..n_units-1."""
        if not 0 <= k < self.n_units:
            raise IndexError(f"Plan: unit must be in 0..{self.n_units - 1}, got {k}. See Plan.n_units.")
        part = bisect_right(self._first_units, k) - 1
        start = self._bounds[part] + (k - self._first_units[part]) * self.rows_per_unit
        return Unit(f"u{k:06d}", start, min(start + self.rows_per_unit, self._bounds[part + 1]))

    def has(self, name: str) -> bool:
        """Whether there is a unit called ``name``."""
        match = _UNIT_NAME.fullmatch(name)
        return match is not None and int(match[1]) < self.n_units

    def unit_named(self, name: str) -> Unit:
        """Return the unit called ``name``; DatasetError where the plan has none of that name."""
        if not self.has(name):
            remedy = "It may belong to another dataset."
            rule = f"be one of the plan's {self.n_units} units (u000000, u000001, ...)"
            raise dataset_error("Plan", "unit", rule, repr(name), remedy)
        return self.unit(int(name[1:]))

    def extension_of(self, example: int) -> int:
        """Return the number of the extension that an example came with, 0 for none."""
        return bisect_right(self.extended_at, example)

    def extended(self, n_examples: int) -> Plan:
        """Return the plan with so many more examples, in units of their own."""
        return Plan(self.n_examples + n_examples, self.rows_per_unit, (*self.extended_at, self.n_examples))

    def to_json(self) -> dict[str, int]:
        """Return the plan as it stands in dataset.json, where extensions do not."""
        return {"n_examples": self._bounds[1], "rows_per_unit": self.rows_per_unit}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Read what to_json wrote; DatasetError for anything else."""
        if not isinstance(value, dict) or set(value) != {"n_examples", "rows_per_unit"}:
            rule = "be an object with n_examples and rows_per_unit"
            raise dataset_error(
                "Plan", "plan", rule, repr(value)[:200], "dataset.json is damaged or of another format."
            )
        return cls(value["n_examples"], value["rows_per_unit"])
