"""The ways to bring gradients from a GPU to the disk that are compared: no hook, hooks by hand, tlfast, graphs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import tlfast
from tlfast.collecting.batches import Batch
from tlfast.collecting.drain import Drain, streams_for
from tlfast.dataset import BackgroundWriter, DatasetWriter, Example, Plan
from tlfast.dataset.format.layout import Column
from tlfast.hooks.captured import Capture

from .clock import Clock
from .gpu_work import Timed
from .rivals import first_tensor
from .storing import hooked, read_dataset, read_saved

FLOOR = "forward and backward (floor)"
EMPTY = "empty full hooks"
FULL_CPU = "full hooks, .cpu(), torch.save"
TENSOR = "tensor hooks, rows on the GPU, torch.save"
EAGER = "tlfast, drained to disk"
GRAPH = "tlfast, CUDA graph, drained to disk"
GRAPH_FLOOR = "CUDA graph of the bare step"
Lend = Callable[[Capture, Timed], Callable[[torch.Tensor], object]]


@dataclass(frozen=True)
class Way:
    """One way to do the work into a folder, and to read a point's rows back."""

    run: Callable[[Timed, Path], object]
    read: Callable[[Timed, Path, str], torch.Tensor] | None


def floor(work: Timed, out: Path) -> None:
    """The frozen forward and backward; nothing is captured."""
    with tlfast.freeze(work.model):
        for batch in work.stepping():
            work.backward(batch)
        work.end()


def empty_full_hooks(work: Timed, out: Path) -> None:
    """What full hooks cost before anything is done in them."""
    handles = [
        work.model.get_submodule(name).register_full_backward_hook(lambda module, grad_input, grad: None)
        for name in work.points
    ]
    with hooked(handles):
        floor(work, out)


def save(held: dict[str, torch.Tensor], out: Path, n_rows: int) -> None:
    """One durable file a unit."""
    with (out / f"{n_rows:08d}.pt").open("wb") as file:
        torch.save(held, file)
        file.flush()
        os.fsync(file.fileno())


def full_hooks_cpu(work: Timed, out: Path) -> None:
    """What a user writes today: every hook brings its gradient to the host, and waits for it."""
    held: dict[str, list[torch.Tensor]] = {name: [] for name in work.points}

    def hook(name: str) -> Callable[[nn.Module, object, tuple[torch.Tensor]], None]:
        return lambda module, grad_input, grad: held[name].append(work.kept(grad[0]).to(torch.bfloat16).cpu())

    handles = [work.model.get_submodule(name).register_full_backward_hook(hook(name)) for name in work.points]
    n_rows = 0
    with tlfast.freeze(work.model), hooked(handles):
        for batch in work.stepping():
            work.backward(batch)
            n_rows += len(batch.input_ids)
            if n_rows % work.rows_per_unit == 0 or n_rows == work.n_examples:
                save({name: torch.cat(rows) for name, rows in held.items()}, out, n_rows)
                for rows in held.values():
                    rows.clear()
        work.end()


def tensor_hooks_on_device(work: Timed, out: Path) -> None:
    """The best simple rival: tensor hooks into rows on the device, one copy a unit."""
    device = work.batches[0].input_ids.device
    shape = (work.rows_per_unit, *work.row_shape)
    rows = {name: torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device) for name in work.points}
    start = stop = n_rows = 0

    def attach(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(grad: torch.Tensor) -> None:
            rows[name][start:stop].copy_(work.kept(grad))

        return lambda module, args, output: (first_tensor(output).register_hook(hook), None)[1]

    handles = [work.model.get_submodule(name).register_forward_hook(attach(name)) for name in work.points]
    with tlfast.freeze(work.model), hooked(handles):
        for batch in work.stepping():
            start, stop = stop, stop + len(batch.input_ids)
            work.backward(batch)
            n_rows += stop - start
            if stop == work.rows_per_unit or n_rows == work.n_examples:
                save({name: held[:stop].cpu() for name, held in rows.items()}, out, n_rows)
                stop = 0
        work.end()


def drained(work: Timed, out: Path, lend: Lend) -> None:
    """A capture whose ring is drained to a dataset while the model goes on, as `collect` does; no set-up of a model."""
    columns = {name: Column(torch.bfloat16, work.row_shape) for name in work.points}
    plan = Plan(work.n_examples, work.rows_per_unit)
    device = work.batches[0].input_ids.device
    writer = DatasetWriter(out, header={}, columns=columns, plan=plan)
    batches = work.stepping()
    with (
        BackgroundWriter(writer, 2) as background,
        tlfast.freeze(work.model),
        tlfast.capture(work.model, list(work.points), reduce=work.reduce, dtype=torch.bfloat16,
                       rows=work.rows_per_unit) as cap,
    ):  # fmt: skip
        step = lend(cap, work)
        drain = Drain(streams_for({device}), columns, work.rows_per_unit)
        for unit in plan.units:
            cap.clear()
            while cap.rows < len(unit):
                step(next(batches).input_ids)
            rings = {name: cap[name] for name in cap.names}
            arrived = drain.drain(rings, cap.counters, torch.arange(len(unit)), background.wait_for_room)
            examples = [Example(i, [0], "", 0, 1) for i in range(unit.start, unit.stop)]
            background.submit_unfinished(unit, lambda arrived=arrived: (arrived()[0], None), examples)  # type: ignore[misc]
        work.end()


def graph_floor(work: Timed, out: Path, clock: Clock) -> None:
    """The bare step as a graph: what a graph gains without any capture."""
    with tlfast.freeze(work.model):
        step = clock.graphed(lambda tokens: work.backward(Batch(tokens, None)), work.batches[0].input_ids)
        for batch in work.stepping():
            step(batch.input_ids)
        work.end()


def make_variants(clock: Clock) -> dict[str, Way]:
    """All of them; FLOOR first."""

    def eager(cap: Capture, work: Timed) -> Callable[[torch.Tensor], object]:
        return lambda tokens: work.backward(Batch(tokens, None))

    def graph(cap: Capture, work: Timed) -> Callable[[torch.Tensor], object]:
        return clock.graph_step(cap, eager(cap, work), work.batches[0].input_ids)

    return {
        FLOOR: Way(floor, None),
        EMPTY: Way(empty_full_hooks, None),
        FULL_CPU: Way(full_hooks_cpu, read_saved),
        TENSOR: Way(tensor_hooks_on_device, read_saved),
        EAGER: Way(partial(drained, lend=eager), read_dataset),
        GRAPH_FLOOR: Way(partial(graph_floor, clock=clock), None),
        GRAPH: Way(partial(drained, lend=graph), read_dataset),
    }
