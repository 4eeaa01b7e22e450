"""A small dataset with a column of each kind that version 2 of the format has, whose every value is known."""

from __future__ import annotations

import torch

from tlfast.dataset import Column, DatasetWriter, Example, Plan

COLUMNS = {
    "h": (torch.bfloat16, (3,)),
    "h:act": Column(torch.float32, (2, 2), of="act"),
    "t": Column(torch.float16, (5,), per="token"),
    "q": Column(torch.float32, (70,), encoding="int8:64"),
    "tq": Column(torch.float32, (2, 3), of="act", per="token", encoding="int8"),
}
PLAN = Plan(n_examples=7, rows_per_unit=3)
LENGTHS = [2, 0, 3, 1, 4, 0, 5]  # real tokens of each example; in the last unit one alone has any


def example(i: int) -> Example:
    """Example number ``i``."""
    return Example(i, list(range(LENGTHS[i])), "a.txt", 10 * i, LENGTHS[i])


def n_rows(name: str, i: int, columns=COLUMNS) -> int:
    """How many rows example ``i`` has at a point."""
    return LENGTHS[i] if Column(*columns[name]).per == "token" else 1


def truth(columns=COLUMNS) -> dict[str, list[torch.Tensor]]:
    """What each example has at each point, [rows, *row shape], before it is encoded."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in columns:
        column = Column(*columns[name])
        sizes = [(n_rows(name, i, columns), *column.row_shape) for i in range(len(LENGTHS))]
        found[name] = [torch.randn(size, generator=generator).to(column.dtype) for size in sizes]
    return found


def rows_of(unit, values) -> dict[str, torch.Tensor]:
    """What a writer is given for a unit."""
    return {name: torch.cat(parts[unit.start : unit.stop]) for name, parts in values.items()}


def make_writer(out, **changes) -> DatasetWriter:
    """A writer with the arguments above, some of them changed."""
    return DatasetWriter(out, **({"header": {}, "columns": COLUMNS, "plan": PLAN} | changes))


def write_units(writer: DatasetWriter, values=None) -> None:
    """Write every unit that is not committed."""
    values = truth(writer.columns) if values is None else values
    for unit in writer.plan.units:
        if unit.name not in writer.done:
            assert writer.write_unit(unit, rows_of(unit, values), [example(i) for i in range(unit.start, unit.stop)])
