"""Which examples form which unit, and what is known of one example."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import dataset_error

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

    Raises:
        DatasetError: where a number is not a positive int.

    Example:
        >>> from tlfast.dataset.plan import Plan
        >>> Plan(n_examples=5, rows_per_unit=2).units[-1]
        Unit(name='u000002', start=4, stop=5)
    """

    n_examples: int
    rows_per_unit: int

    def __post_init__(self) -> None:
        for argument in ("n_examples", "rows_per_unit"):
            value = getattr(self, argument)
            if type(value) is not int or not 1 <= value < 2**60:
                raise dataset_error("Plan", argument, "be a positive int", repr(value), "Count the examples first.")

    @property
    def n_units(self) -> int:
        """How many units there are."""
        return -(-self.n_examples // self.rows_per_unit)

    @property
    def units(self) -> list[Unit]:
        """All units in the order of their examples."""
        return [self.unit(k) for k in range(self.n_units)]

    def unit(self, k: int) -> Unit:
        """Return unit number ``k``; IndexError outside 0..n_units-1."""
        if not 0 <= k < self.n_units:
            raise IndexError(f"Plan: unit must be in 0..{self.n_units - 1}, got {k}. See Plan.n_units.")
        start = k * self.rows_per_unit
        return Unit(f"u{k:06d}", start, min(start + self.rows_per_unit, self.n_examples))

    def unit_named(self, name: str) -> Unit:
        """Return the unit called ``name``; DatasetError where the plan has none of that name."""
        match = _UNIT_NAME.fullmatch(name)
        if match is None or int(match[1]) >= self.n_units:
            remedy = "It may belong to another dataset."
            rule = f"be one of the plan's {self.n_units} units (u000000, u000001, ...)"
            raise dataset_error("Plan", "unit", rule, repr(name), remedy)
        return self.unit(int(match[1]))

    def to_json(self) -> dict[str, int]:
        """Return the plan as it stands in dataset.json."""
        return {"n_examples": self.n_examples, "rows_per_unit": self.rows_per_unit}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Read what to_json wrote; DatasetError for anything else."""
        if not isinstance(value, dict) or set(value) != {"n_examples", "rows_per_unit"}:
            rule = "be an object with n_examples and rows_per_unit"
            raise dataset_error(
                "Plan", "plan", rule, repr(value)[:200], "dataset.json is damaged or of another format."
            )
        return cls(value["n_examples"], value["rows_per_unit"])
