"""The loop of a collection: one unit after the other through the model, to the host, to the writing thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ..dataset.format.layout import Column
from ..dataset.format.plan import Example, Unit
from ..dataset.write.background import BackgroundWriter, Contents
from ..dataset.write.writer import DatasetWriter
from ..hooks.captured import Capture
from .drain import Arrived, Drain
from .progress import Progress
from .signals import LeaveAtOnce
from .unit import Oddities, Runner
from .unit_queue import Todo


class _Overtaken(Exception):
    """Another process has committed the unit at hand: the rest of it would be work for nothing."""


def run_units(
    runner: Runner,
    drain: Drain,
    todo: Todo,
    examples: Sequence[Example],
    background: BackgroundWriter,
    writer: DatasetWriter,
    shown: Progress,
    oddities: Oddities,
    with_missing: bool,
    stop_if_asked: Callable[[], None],
) -> None:
    """Take the units ``todo`` through; returns when the last is durable where it belongs.

    Between two batches, and while it waits, ``stop_if_asked`` may raise, and so does a write that has failed.
    """
    cap = runner.cap

    def step_done(n_examples: int, n_tokens: int) -> None:
        shown.full_s = background.full_s
        shown.n_bytes, shown.waited_s = background.bytes_written, background.waited_s + writer.waited_s
        shown.n_nonfinite, shown.n_saturated = oddities.n_nonfinite_rows, oddities.n_saturated
        shown.n_elsewhere = todo.n_rows_elsewhere
        shown.step(n_examples, n_tokens)
        background.check()
        stop_if_asked()

    def batch_done(n_examples: int, n_tokens: int) -> None:
        step_done(n_examples, n_tokens)
        if todo.overtaken():
            raise _Overtaken

    def wait_for_room() -> None:
        while not background.wait_for_room(1.0):
            step_done(0, 0)

    try:
        for unit in todo:
            part = examples[unit.start : unit.stop]
            n_done = shown.n_done
            try:
                places = runner.fill_ring(part, batch_done)
            except _Overtaken:
                shown.n_done = n_done
                continue
            rings = rings_of(cap, writer.columns)
            submit_unit(cap, rings, drain, background, oddities, unit, part, places, with_missing, wait_for_room)
        while not (background.flush(1.0) and writer.flush(1.0)):
            step_done(0, 0)
    except LeaveAtOnce:
        background.abandon()
        writer.abandon()
        raise


def rings_of(cap: Capture, columns: Mapping[str, Column]) -> dict[str, torch.Tensor]:
    """The rows of each column of a capture that holds some; NaN where its point has never fired.

    ``columns`` say what a row is there: a run that continues another may begin with examples that don't reach it.
    """
    rings = {name: cap[name] for name in cap.names if cap.is_known(name)}
    device = next(iter(rings.values())).device
    for name in cap.names:
        if name not in rings:
            column = columns[name]
            nan = torch.full((), math.nan, dtype=column.dtype, device=device)
            rings[name] = nan.expand(cap.rows, *column.row_shape)
    return {name: rings[name] for name in cap.names}


def submit_unit(
    cap: Capture,
    rings: Mapping[str, torch.Tensor],
    drain: Drain,
    background: BackgroundWriter,
    oddities: Oddities,
    unit: Unit,
    examples: Sequence[Example],
    places: torch.Tensor,
    with_missing: bool,
    wait_for_room: Callable[[], object],
) -> None:
    """Let the rows of a unit be written; those in the capture may be overwritten by what is queued after this.

    ``rings`` are the rows by column, as `rings_of` gives them;
    ``places`` is where the row of each example lies in the capture, int64 [examples], on the host.
    """
    missing = torch.stack(list(cap.missing.values())).any(0)[places] if with_missing else None
    arrived = drain.drain(rings, cap.counters, places, wait_for_room)
    background.submit_unfinished(unit, partial(_finish, oddities, unit, arrived, missing, cap.n_writes), examples)


def _finish(
    oddities: Oddities, unit: Unit, arrived: Arrived, missing: torch.Tensor | None, n_writes: list[int]
) -> Contents:
    block, counters = arrived()  # in the thread that writes
    return block, oddities.flags(block, counters, missing, n_writes, unit)
