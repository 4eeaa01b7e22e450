"""What a bench says: tables, claims with their targets, JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from .measure import Measured, cpu_model, machine, slug

RESULTS = Path(__file__).parent / "results"
TIMED = {"total", "forward", "backward", "free", "cpu"}  # the sections that cost_rows compares
Cell = str | float | int | None


@dataclass
class Table:
    """Rows of figures under one title; ``floor`` names the row that the others are compared with."""

    title: str
    floor: str
    columns: list[str]
    rows: list[dict[str, Cell]]
    note: str = ""


@dataclass
class Claim:
    """One figure beside its target; a missed target is reported, never raised."""

    what: str
    sense: Literal["at least", "at most"]
    target: float
    figure: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the figure keeps the target; NaN doesn't."""
        return self.figure >= self.target if self.sense == "at least" else self.figure <= self.target


@dataclass
class Findings:
    """What a part of a bench measured."""

    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)


@dataclass
class Result:
    """Everything that one bench measured in one run."""

    bench: str
    prediction: str
    settings: dict[str, object]
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    machine: dict[str, object] = field(default_factory=machine)
    failures: list[str] = field(default_factory=list)  # parts that found a wrong value, or broke

    def as_json(self) -> dict[str, object]:
        """The result as plain data; claims carry ``met``."""
        return {**asdict(self), "claims": [asdict(claim) | {"met": claim.met} for claim in self.claims]}


def cost_rows(measured: Measured, floor: str, n_points: int = 1, unit: float = 1e6) -> list[dict[str, Cell]]:
    """One row a variant: the time of a call, its share of the floor's, and what a point costs above the floor."""
    rows: list[dict[str, Cell]] = []
    base = measured[floor]
    for name, times in measured.items():
        row: dict[str, Cell] = {"variant": name}
        row["median"] = times["total"].median * unit
        row["min"] = times["total"].min * unit
        row["ratio_to_floor"] = times["total"].ratio(base["total"])
        for section in TIMED & times.keys():
            row[f"{section}_above_floor"] = times[section].above(base[section]) * unit / n_points
        row["min_above_floor"] = (times["total"].min - base["total"].min) * unit / n_points
        rows.append(row)
    return rows


def rate_rows(measured: Measured, floor: str, n: int, what: str = "examples") -> list[dict[str, Cell]]:
    """One row a variant, which does ``n`` things in a step: its rates, and its CPU time beside the floor's."""
    base = measured[floor]["cpu"]
    return [
        {"variant": name, f"{what}/s": n / times["total"].median, f"{what}/s_cpu": n / times["cpu"].median,
         "percent_of_floor_cpu": times["cpu"].ratio(base) * 100,
         "overhead_percent_cpu": None if name == floor else (times["cpu"].ratio(base) - 1) * 100,
         "set_up_s": times["set_up"].median}
        for name, times in measured.items()
    ]  # fmt: skip


def show(result: Result) -> str:
    """The result as text for a terminal."""
    facts = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    lines = ["", f"== {result.bench} ==", facts, f"predicted before measuring: {result.prediction}"]
    lines.append(", ".join(f"{key} {value}" for key, value in result.settings.items()))
    for table in result.tables:
        lines += ["", table.title, *_aligned(table)]
        if table.note:
            lines.append(f"  {table.note}")
    lines += [f"FAILED: {failure}" for failure in result.failures]
    if result.claims:
        lines.append("")
    width = max((len(claim.what) for claim in result.claims), default=0)
    for claim in result.claims:
        figure, target = f"{claim.figure:.3g}{claim.unit}", f"{claim.sense} {claim.target:g}{claim.unit}"
        lines.append(f"  {claim.what:<{width}}  {figure:>9}  target {target:<15} {'met' if claim.met else 'missed'}")
    return "\n".join(lines)


def _aligned(table: Table) -> list[str]:
    cells = [table.columns] + [[_text(row.get(column)) for column in table.columns] for row in table.rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.columns))]
    return [
        "  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))  # noqa: B905
        for line in cells
    ]


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return (
        f"{cell:.4g}"
        if isinstance(cell, float) and abs(cell) < 1e4
        else f"{cell:.0f}"
        if isinstance(cell, float)
        else str(cell)
    )


def save(results: list[Result], out: Path | None) -> list[Path]:
    """Write each result to results/<bench>-<cpu or gpu>.json, or there in a folder ``out``, or all to one file."""
    if out is not None and not out.is_dir():
        out.write_text(json.dumps({r.bench: r.as_json() for r in results}, indent=1) + "\n", encoding="utf-8")
        return [out]
    paths = []
    for result in results:
        paths.append((out or RESULTS) / f"{result.bench}-{slug(str(result.machine.get('gpu') or cpu_model()))}.json")
        paths[-1].write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    return paths
