"""What a collection would do, without doing it: the model, its points, the examples, how much and how long."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..dataset.format.layout import DTYPE_NAMES, Column
from ..dataset.format.plan import Example, Plan
from ..hooks.second_moments import kinds_of
from ..spec import Spec
from .batches import unit_rows_of
from .identity import describe_loss
from .probe import Probed
from .resume import has_units
from .run import Run
from .tasks import task_of, unwrapped
from .unit import Runner

_TRIED = 8  # batches that are timed, behind one that isn't: the first is slower
_MOST_TRIED_S = 20.0


@dataclass(frozen=True)
class Rehearsal:
    """What `rehearse` found; it prints as a table."""

    model: str
    task: str | None
    device: str
    loss: str
    columns: dict[str, Column]
    classes: dict[str, str]  # of modules, by column, and what normalizes their gradients
    plan: Plan
    n_tokens: int
    n_skipped: int
    n_batches: int
    seconds: float  # that the model will need, by what was tried
    n_tried: int
    out: str
    is_begun: bool
    unused: Sequence[str] = ()  # columns of the data that nobody asks for

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows; the row tables come to that."""
        rows = {"example": self.plan.n_examples, "token": self.n_tokens}
        return sum(rows[column.per] * column.row_bytes for column in self.columns.values())

    def __str__(self) -> str:
        left_out = f", {self.n_skipped} left out" if self.n_skipped else ""
        tokens = f", {self.n_tokens} tokens" if self.n_tokens else ""
        units = f"{self.plan.n_units} unit{'s' * (self.plan.n_units != 1)} of {self.plan.rows_per_unit} rows at most"
        lines = [
            f"model     {self.model}, {self.task or 'of a class that tells no task'}, on {self.device}",
            f"loss      {self.loss}",
            f"examples  {self.plan.n_examples}{tokens}{left_out}, in {self.n_batches} batches",
            f"out       {self.out}: {units}, {_bytes(self.n_bytes)}{', begun before' if self.is_begun else ''}",
            f"time      about {_duration(self.seconds)} by {self.n_tried} batches that were tried",
            f"points    {len(self.columns)}, a row of each",
        ]
        if self.unused:
            lines.insert(3, f"not used  {', '.join(self.unused)}: columns of the data")
        width = max(map(len, self.columns))
        for name, column in self.columns.items():
            shape = f"{DTYPE_NAMES[column.dtype]} {list(column.row_shape)}{column.notes}"
            lines.append(f"  {name:<{width}}  {self.classes[name]}, {shape}")
        return "\n".join(lines)


def _bytes(n: int) -> str:
    for size, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if n >= size:
            return f"{n / size:.1f} {name}"
    return f"{n} bytes"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def rehearse(run: Run, unused: Sequence[str] = ()) -> Rehearsal:
    """Check and try all that a run would, and time a few of its batches; nothing is written.

    ``unused`` are columns of the data that nobody asks for, to be named.

    Raises:
        ValueError, TypeError: as `collect` would before it writes.
    """
    options = run.options
    with run.at_work():
        probed = run.look(options.rows_per_unit)
        n_rows = options.rows_per_unit or unit_rows_of(probed.columns.values(), run.examples)
        plan = Plan(len(run.examples), n_rows)
        parts = [_sizes(run, list(run.examples[unit.start : unit.stop])) for unit in plan.units]
        seconds, n_tried, n_timed = _timed(run, probed, list(run.examples[: len(plan.unit(0))]))
    model, names = unwrapped(run.model), dict(run.model.named_modules())
    entered = run.enter(1, run.specs)
    points, summed = entered.wanted, entered.summed_points
    n_positions = sum(sum(part) for part in parts)
    return Rehearsal(
        type(model).__name__, task_of(run.model), ", ".join(sorted(map(str, probed.devices))),
        describe_loss(run.loss, options.identity, options.header)[0]["loss"], probed.columns,
        {
            column: (f"{len(summed[column])} modules" if column in summed else _kind(names, point))
            + _normalized(spec, summed.get(column, [point]))
            for column, (point, spec) in points.items()
        },
        plan, sum(run.examples.lengths()), len(run.bad), sum(map(len, parts)),
        seconds * n_positions / n_timed, n_tried, str(run.out), has_units(run.out), unused,
    )  # fmt: skip


def _kind(names: Mapping[str, Any], point: str) -> str:
    """What a point is: a module, or that of the experts of which it is one's matrix."""
    return type(names.get(point, names.get(point.rpartition(".expert_")[0]))).__name__


def _normalized(spec: Spec, points: Sequence[str]) -> str:
    """By which kind of second moments a spec divides the gradients of its points."""
    given: Any = spec.normalizer
    if given is None:
        return ""
    return f", normalized by {kinds_of([given[p] for p in points] if isinstance(given, Mapping) else [given])}"


def _sizes(run: Run, examples: Sequence[Example]) -> list[int]:
    """The positions of each batch of a unit, or its examples where they have none."""
    parts = run.batching.parts(examples, run.batching.order(examples))
    return [len(rows) * max(1, n_positions) for rows, n_positions in parts]


def _timed(run: Run, probed: Probed, examples: Sequence[Example]) -> tuple[float, int, int]:
    """How long some batches of a unit take, how many they are, and of how many positions together."""
    batching, cap = run.batching, run.enter(len(examples), run.specs).unmasked(probed.unmasked)
    order = batching.order(examples)
    sizes = _sizes(run, examples)
    seconds, tried, n_timed = 0.0, 0, 0
    with cap:
        runner = Runner(run.model, cap, batching, run.loss, run.options.grad_scale, decoding=probed.decoding)
        for number, (_, batch) in enumerate(batching.batches(examples, order)):
            begun = time.perf_counter()
            runner.step(batch.to(runner.device))
            for device in probed.devices:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            took = time.perf_counter() - begun
            if number == 0 and len(sizes) > 1:
                continue
            seconds, tried, n_timed = seconds + took, tried + 1, n_timed + sizes[number]
            if tried == _TRIED or seconds > _MOST_TRIED_S:
                break
    return seconds, tried, n_timed
