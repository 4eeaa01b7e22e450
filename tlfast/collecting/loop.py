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
from ..hooks.tokens import Tokens
from .drain import Arrived, Drain
from .pack import Pack
from .progress import Progress
from .signals import LeaveAtOnce
from .unit import Filled, Oddities, Runner
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
            part = list(examples[unit.start : unit.stop])
            n_done = shown.n_done
            try:
                filled = runner.fill_ring(part, batch_done)
            except _Overtaken:
                shown.n_done = n_done
                continue
            rings = rings_of(cap, writer.columns, filled.tokens)
            submit_unit(cap, rings, drain, background, oddities, unit, part, filled, with_missing, wait_for_room)
        while not (background.flush(1.0) and writer.flush(1.0)):
            step_done(0, 0)
    except LeaveAtOnce:
        background.abandon()
        writer.abandon()
        raise


def rings_of(cap: Capture, columns: Mapping[str, Column], tokens: Tokens | None = None) -> dict[str, torch.Tensor]:
    """The rows of each column of a capture that holds some, as they were written; NaN where its point has never fired.

    ``columns`` say what a row is there: a run that continues another may begin with examples that don't reach it.
    """
    rings = {name: cap.ring(name) for name in cap.names if cap.is_known(name)}
    device = next(iter(rings.values())).device
    for name in cap.names:
        if name not in rings:
            column = columns[name]
            nan = torch.full((), math.nan, dtype=column.dtype, device=device)
            positions = [tokens.width] if tokens is not None and column.per == "token" else []
            rings[name] = nan.expand(cap.rows, *positions, *column.row_shape)
    return {name: rings[name] for name in cap.names}


def submit_unit(
    cap: Capture,
    rings: Mapping[str, torch.Tensor],
    drain: Drain,
    background: BackgroundWriter,
    oddities: Oddities,
    unit: Unit,
    examples: Sequence[Example],
    filled: Filled,
    with_missing: bool,
    wait_for_room: Callable[[], object],
) -> None:
    """Let the rows of a unit be written; those in the capture may be overwritten by what is queued after this.

    ``rings`` are the rows by column, as `rings_of` gives them; ``filled`` says whose they are.
    """
    missing = torch.stack(list(cap.missing.values())).any(0)[filled.places] if with_missing else None
    arrived = drain.drain(rings, cap.counters, filled.places, wait_for_room, filled.tokens, unit.start)
    finish = partial(_finish, oddities, unit, arrived, drain.pack, missing, cap.n_writes, filled.tokens)
    background.submit_unfinished(unit, finish, examples)


def _finish(
    oddities: Oddities,
    unit: Unit,
    arrived: Arrived,
    pack: Pack,
    missing: torch.Tensor | None,
    n_writes: list[int],
    tokens: Tokens | None,
) -> Contents:
    block, counters = arrived()  # in the thread that writes
    contents = pack.contents(block)
    lengths = dict.fromkeys(pack.per_token, tokens.lengths) if tokens is not None else None
    return contents, oddities.flags(contents, counters, missing, n_writes, unit, lengths)
