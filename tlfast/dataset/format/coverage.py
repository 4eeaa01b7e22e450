"""How much of a dataset is there: of its first plan, and of each extension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice, pairwise
from typing import NamedTuple

from .plan import Plan, Unit


class Part(NamedTuple):
    """The first plan (number 0) or an extension: how many examples and units are there, of how many."""

    number: int
    n_examples: int
    planned_examples: int
    n_units: int
    planned_units: int


def completeness(plan: Plan, units: Iterable[Unit]) -> list[Part]:
    """Return what the committed ``units`` are of each part of the plan."""
    examples, counts = Counter[int](), Counter[int]()
    for unit in units:
        part = plan.extension_of(unit.start)
        examples[part] += len(unit)
        counts[part] += 1
    bounds = [0, *plan.extended_at, plan.n_examples]
    return [
        Part(k, examples[k], stop - start, counts[k], -(-(stop - start) // plan.rows_per_unit))
        for k, (start, stop) in enumerate(pairwise(bounds))
    ]


def missing_units(plan: Plan, units: Iterable[Unit], most: int) -> list[str]:
    """Return the names of up to ``most`` planned units that are not among ``units``."""
    there = {unit.name for unit in units}
    planned = (plan.unit(k).name for k in range(plan.n_units))
    return list(islice((name for name in planned if name not in there), most))
