"""Which backward of a capture is running, in plain Python; and what was said of its batch.

Does what `tlfast._C.Backwards` does natively, call for call and error for error.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch.autograd.graph import _engine_run_backward

from ..errors import broken_rule
from .column import Column, OwnInputs, Step
from .interface import OwnOfColumn
from .ledger import Block, Ledger
from .recipe import Seen
from .shared_inputs import SharedInputs
from .streams import StepInput, current_stream, read_on


@dataclass
class Point:
    """What is known of a tap's place, to name it in errors."""

    name: str
    columns: list[Column]
    index: int
    last_call: int = 0  # when the module was entered last, counted over the capture
    others: str | None = None  # which other outputs have a graph, as the first call has shown

    @property
    def who(self) -> str:
        return f"capture at {self.name}"


@dataclass
class Pending:
    """What waits for the end of a backward at one point, where it is called several times."""

    sum: torch.Tensor | None = None  # of the gradients, for the columns that keep that
    sums: dict[int, torch.Tensor] = field(default_factory=dict)  # of each column that adds up the rows of its calls
    parts: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # column -> those of its calls
    totals: dict[int, torch.Tensor] = field(default_factory=dict)  # of each that is added to those of other points

    @property
    def adds(self) -> bool:
        """Whether a call was added up, or is to be with others."""
        return self.sum is not None or bool(self.sums)


@dataclass(frozen=True)
class Batch:
    """What a batch says of the backwards that begin in it. It stays as it was for each, whatever batch is next."""

    mask: StepInput | None = None
    n_expected: int = -1  # examples; -1: unknown
    scale: float = 1.0  # of rows
    own: dict[Column, OwnInputs] = field(default_factory=dict)


class Backward:
    """One outermost backward: those that run inside it (of reentrant checkpoints, or in hooks) are part of it."""

    def __init__(self, root: int, n_points: int, batch: Batch):
        self.root = root  # the graph task at whose end the rows are committed
        self.spoilt = False  # a part of it has failed, and the error was caught
        self.fired = [0] * n_points
        self.pending: dict[int, Pending] = {}  # by points
        self.block: Block | None = None
        self.batch = batch
        self._masks = {} if batch.mask is None else {batch.mask.tensor.device: batch.mask}
        self._streams: list[torch.cuda.Stream] = []  # on which gradients were written
        self._waited: list[torch.cuda.Event] = []  # what they have come after

    def mask_on(self, device: torch.device) -> torch.Tensor | None:
        """The mask where a gradient is: a model may be spread over several devices of one kind."""
        mask = self.batch.mask
        if mask is None:
            return None
        if mask.tensor.device.type != device.type:
            return mask.tensor
        if device not in self._masks:
            self._masks[device] = StepInput(mask.here().to(device, non_blocking=True))
        return self._masks[device].here()

    def step_at(self, column: Column, mask: torch.Tensor | None) -> Step:
        """What a column is given, whose gradient is on the device of ``mask``."""
        return Step(mask, self.batch.scale, self.batch.own.get(column, OwnInputs()))

    def write_on(self, stream: torch.cuda.Stream | None, again: bool, ledger: Ledger) -> None:
        """Note that a gradient is written on a stream, after what a backward that failed has begun to write. One of
        another call of the same point, whose rows or sum it may change, was perhaps written on another stream.
        """
        if stream is None:
            return
        if stream not in self._streams:
            self._streams.append(stream)
            for done in ledger.failed:
                stream.wait_event(done)
            self._waited = self._waited or list(ledger.failed)
        for other in self._streams if again else ():
            if other != stream:
                stream.wait_event(other.record_event())

    def join_streams(self) -> list[torch.cuda.Stream]:
        """Let the current streams, those of the caller, wait for all that was written: the engine does so for the
        streams of the leaves alone. Returns those that had to wait.
        """
        joined = []
        for stream in self._streams:
            caller = current_stream(stream.device)
            if caller is not None and caller != stream:
                caller.wait_event(stream.record_event())
                joined.append(caller)
        self._streams = []
        return joined

    def give_up(self, ledger: Ledger) -> None:
        """Tell the ledger what happens when all is written that was begun and not joined."""
        with suppress(RuntimeError):  # the device itself has failed, and does nothing more
            written = [stream.record_event() for stream in self._streams]
            if written:
                ledger.note_failed(self._waited, written)


def refuse_compiled_autograd() -> None:
    """RuntimeError in compiled autograd: it never calls what is to run at the end, so no row would be committed."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and compiled.in_compiled_autograd_region:
        raise RuntimeError(
            broken_rule("capture", "the backward", "run in the eager engine", "compiled autograd", "Turn it off.")
        )


_CPU = torch.device("cpu")
_OF_THE_CALLER = ("cpu", "meta", "lazy")  # the devices whose nodes run in the thread that called backward


def _n_backwards(device: torch.device) -> int:
    """How many backwards run in this thread, one inside the other, where a gradient is on ``device``.

    They are counted by the frames of the one function by which Python enters the engine. The frame of the outermost one
    is in the thread that called it: for the CPU that is this thread, and another device has a thread of its own.
    """
    n = int(device.type not in _OF_THE_CALLER)
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        n += frame.f_code is _engine_run_backward.__code__
        frame = frame.f_back
    return n


class _End:
    """Runs when a backward ends. If the engine drops it without a call, the backward failed."""

    backwards: Backwards | None = None  # for one that was dropped before it was made

    def __init__(self, backwards: Backwards, task: int, nested: bool):
        self.backwards, self.task, self.nested, self.called = backwards, task, nested, False

    def __call__(self) -> None:
        self.called = True
        if self.backwards is not None and not self.nested:
            self.backwards.end(self.task)  # may raise; the end of a nested one commits nothing

    def __del__(self) -> None:
        if self.backwards is not None:
            if self.nested:
                self.backwards.leave(self.task, self.called)
            else:
                self.backwards.abort(self.task)


class _Ended:
    """Runs when a backward around a capture ends, or fails."""

    def __init__(self, backwards: Backwards):
        self._backwards = weakref.ref(backwards)

    def __call__(self) -> None: ...

    def __del__(self) -> None:
        if (backwards := self._backwards()) is not None:
            backwards.look_around(n_leaving=1)


class Backwards:
    """Which backward is running, by the engine's graph tasks; and what holds for the next ones."""

    def __init__(self, ledger: Ledger, missing: str):
        self.ledger, self.missing = ledger, missing
        self.points: list[Point] = []
        self.active = True
        self.run = 0
        self.anchor: torch.Tensor | None = None  # of the run
        self._opened_in = threading.get_ident()
        self.n_calls = 0  # of the modules of all points
        self.running: dict[int, Backward] = {}  # by the ids of its graph tasks
        # The backward that was last met in each thread: what runs inside another one in this thread is a part of it.
        self._met: dict[int, Backward] = {}
        self._batch = Batch()
        self._calls_before = 0  # those until the last backward ended
        self._lock = threading.RLock()
        self.shared_inputs = SharedInputs()
        self.look_around(n_leaving=0)

    def add(self, point: Point) -> None:
        """Count a point, before the first backward."""
        self.points.append(point)
        for column in point.columns:
            held = column.total or column
            if held not in self.ledger.columns:
                self.ledger.columns.append(held)

    def look_around(self, n_leaving: int) -> None:
        """A capture may be made inside a backward, in a hook: that one and those around it hold its steps, and are
        none. This finds them, and is called again as each of them ends.
        """
        self._task_around = torch._C._current_graph_task_id()
        self._n_around = 0 if self._task_around == -1 else _n_backwards(_CPU) - n_leaving
        if self._task_around != -1:
            torch.autograd.Variable._execution_engine.queue_callback(_Ended(self))

    def set_batch(self, mask: torch.Tensor | None, n_expected: int, scale: float, own: Sequence[OwnOfColumn]) -> None:
        """What holds for the next backwards: the mask, the number of examples (-1: unknown), the factor on rows, and
        what columns are given of their own.
        """
        inputs = {
            column: OwnInputs(_input(own_mask), _input(ref), positions) for column, own_mask, ref, positions in own
        }
        self._batch = Batch(_input(mask), n_expected, scale, inputs)

    def enter_forward(self) -> None:
        """A captured module runs forward; inside a backward (of a checkpoint, a hook) that is the step to come."""
        task = torch._C._current_graph_task_id()
        if task != -1 and self.active:
            with self._lock:
                # One inside another that isn't known waits for its first gradient.
                if self._find(task, _CPU) is None and not self._nested(_CPU) and task != self._task_around:
                    self._open(task, _CPU)

    def _nested(self, device: torch.device, n_leaving: int = 0) -> bool:
        """Whether another backward of this capture is around; the frame of one that is just gone is still there."""
        return _n_backwards(device) - n_leaving > self._n_around + 1

    def _find(self, task: int, device: torch.device) -> Backward | None:
        """The backward to which the running graph task belongs, or None if that isn't known yet."""
        here = threading.get_ident()
        run = self.running.get(task)
        if run is not None:
            self._met[here] = run
        elif here in self._met and self._nested(device):
            run = self._met[here]
            self._follow(task, run, nested=True)
        return run

    def _open(self, task: int, device: torch.device) -> Backward:
        refuse_compiled_autograd()
        opened = Backward(task, len(self.points), self._batch)
        self._follow(task, opened, self._nested(device))
        self._met[threading.get_ident()] = opened
        return opened

    def _follow(self, task: int, run: Backward, nested: bool) -> None:
        """Count a graph task, the running one, as a part of a backward."""
        self.running[task] = run
        torch.autograd.Variable._execution_engine.queue_callback(_End(self, task, nested))

    def _forget(self, run: Backward) -> None:
        self.running = {task: other for task, other in self.running.items() if other is not run}
        self._met = {thread: other for thread, other in self._met.items() if other is not run}

    def begin(self, point: Point, shape: torch.Size, device: torch.device) -> tuple[Backward, Block]:
        """Find the running backward and its rows; every check that needs no gradient values is made here."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            raise RuntimeError(
                broken_rule(point.who, "a tap", "fire inside a backward", "a call outside one", "Call backward().")
            )
        with self._lock:
            run = self._find(task, device)
            if run is None:
                # What may end in another thread can't be passed on there. Nor are there frames in a thread of the
                # pool, to which the engine goes over where more than 60 backwards lie inside each other.
                elsewhere = self._nested(device) and device.type not in _OF_THE_CALLER
                if elsewhere or _n_backwards(device) == 0:
                    raise RuntimeError(
                        broken_rule(
                            point.who, "a gradient", "be one of an outermost backward, or come after one of it",
                            "the first of a backward inside another one",
                            "Capture a point nearer to the loss, too, or leave this one out.",
                        )
                    )  # fmt: skip
                run = self._open(task, device)
            run.fired[point.index] += 1
            if run.fired[point.index] > 1 and any(column.calls == "raise" for column in point.columns):
                raise RuntimeError(
                    broken_rule(
                        point.who, "a point", "fire once in a backward", "a second time",
                        'Choose calls="sum", "last" or "stack".',
                    )
                )  # fmt: skip
            for column in point.columns:
                self._check_rows(point, run, column.recipe.n_rows(shape))
            assert run.block is not None
            run.write_on(current_stream(device), run.fired[point.index] > 1, self.ledger)
            return run, run.block

    def _check_rows(self, point: Point, run: Backward, n: int) -> None:
        if run.batch.n_expected >= 0 and n != run.batch.n_expected:
            raise ValueError(
                broken_rule(
                    point.who, "a step", f"have the {run.batch.n_expected} rows that batch() announced", n,
                    "Check mask and ids; a reduced batch makes one row.",
                )
            )  # fmt: skip
        if run.block is None:
            run.block = self.ledger.reserve(point.who, n)
        elif run.block.n != n:
            raise ValueError(
                broken_rule(
                    point.who, "a step", f"have the same number of rows at every point ({run.block.n})", n,
                    "Leave this point out, or capture it on its own.",
                )
            )  # fmt: skip

    @torch.no_grad()
    def end(self, task: int) -> None:
        """The end of the outermost backward: commit its rows at all points together, or none of them."""
        with self._lock:
            run = self.running.get(task)
            if run is None or run.block is None or not self.active:
                self.abort(task)
                return
            for caller in run.join_streams():
                for column in self.ledger.columns:
                    column.memory.used_on(caller)
            missing = [point.index for point in self.points if not run.fired[point.index]]
            self._check_whole(task, run, missing)
            if missing:
                self.ledger.settle()
            for column in (column for index in missing for column in self.points[index].columns):
                if column.total is None:
                    column.memory.fill_nan(run.block.base, run.block.n)
            for index, held in run.pending.items():
                _finish(self.points[index], held, run)
            _finish_totals(self.points, run)
            self.ledger.commit(run.block, missing)
            self._calls_before = self.n_calls
            self._forget(run)

    def _check_whole(self, task: int, run: Backward, missing: list[int]) -> None:
        """RuntimeError, after which nothing of it is left, for a backward whose rows are not those of all points."""
        error = None
        if run.spoilt:
            error = RuntimeError(
                broken_rule(
                    "capture", "a backward", "hold no other one that failed",
                    "one whose error was caught after it had reached a point",
                    "Let the error out, or run that one after this.",
                )
            )  # fmt: skip
        elif missing and self.missing == "raise":
            error = self._no_gradient(run, [self.points[index] for index in missing])
        if error is not None:
            self.abort(task)
            raise error

    def _no_gradient(self, run: Backward, absent: list[Point]) -> RuntimeError:
        """The error for points without a gradient: which were not called, and which were to no effect."""

        def seen(point: Point) -> bool:
            return point.last_call > self._calls_before

        # Compiled code makes calls that none count, and with several forwards in flight they were before the last step.
        counted = all(seen(point) for point in self.points if run.fired[point.index])
        idle = [point.name for point in absent if counted and not seen(point)]
        called = [point for point in absent if point.name not in idle]
        got = [f"no call of {', '.join(idle)} since the last step (none is seen in compiled code)"] if idle else []
        if called:
            why = " (called, but the backward does not go through the output)" if counted else ""
            got.append(f"no gradient at {', '.join(point.name for point in called)}{why}")
        other = next((f"Choose {point.others} at {point.name}, or leave" for point in called if point.others), "Leave")
        remedy = f'{other} these points out, or pass missing="nan" for NaN rows.'
        return RuntimeError(broken_rule("capture", "every point", "fire in a backward", "; ".join(got), remedy))

    def abort(self, task: int) -> None:
        """Forget a backward that failed: its rows are void."""
        self.shared_inputs.forget()
        with self._lock:
            run = self.running.get(task)
            if run is None:
                return
            self._calls_before = self.n_calls
            run.give_up(self.ledger)
            self._forget(run)
            if run.block is not None:
                self.ledger.abort(run.block)

    def leave(self, task: int, ended_well: bool) -> None:
        """A backward inside another one is gone, after it ended well or not. What it has begun goes on as a part of the
        one around it, which is the current one of this thread again.
        """
        with self._lock:
            run = self.running.get(task)
            if run is None:
                return
            if run.root != task:
                run.spoilt |= not ended_well  # its gradients lie among the others
                del self.running[task]
                return
            around = torch._C._current_graph_task_id()
            if not ended_well or around == -1 or not self.active:
                self.abort(task)
            elif around in self.running:
                self.running[around].spoilt = True  # two blocks for one backward: begun in a device's thread meanwhile
                self.abort(task)
            else:
                del self.running[task]
                run.root = around
                self._follow(around, run, self._nested(_CPU, n_leaving=1))

    def open(self, anchor: torch.Tensor | None) -> None:
        """A run begins, with taps that were in one before, perhaps: what earlier calls left in a graph fires nothing.

        With an anchor, a leaf to which every identity node of the run leads, ``backward(inputs=[anchor])`` runs
        whatever leads to one, and makes no gradient of a parameter.
        """
        self.look_around(n_leaving=0)
        self.anchor = anchor
        self._opened_in = threading.get_ident()
        self.run += 1
        self.active = True

    @property
    def runs_here(self) -> bool:
        """Whether a call is one of the run: of the thread that has opened it, or made again in a backward. What another
        thread does with the model meanwhile is none.
        """
        return self._opened_in == threading.get_ident() or torch._C._current_graph_task_id() != -1

    def close(self) -> None:
        """From now on a firing tap does nothing."""
        self.active = False


def _input(given: torch.Tensor | None) -> StepInput | None:
    return None if given is None else StepInput(given)


def _finish(point: Point, held: Pending, run: Backward) -> None:
    """Write what had to wait for the end of the step: the sum of several calls, or their stack."""
    assert run.block is not None
    for tensor in (held.sum, *held.sums.values(), *(part for parts in held.parts.values() for part in parts)):
        if tensor is not None and (stream := current_stream(tensor.device)) is not None:
            read_on(stream, tensor)  # the backward's nodes may have run on another one
    for number, column in enumerate(point.columns):
        if number in held.sums:
            column.put_sum(run.block.base, held.sums[number])
        elif column.calls == "sum" and column.recipe.adds_gradients and held.sum is not None:
            step = run.step_at(column, run.mask_on(held.sum.device))
            column.write(run.block.base, Seen(held.sum), step)
        elif number in held.parts:
            # The last call of the forward fires first: turned around, index k is call k.
            column.put_stack(run.block.base, run.block.n, held.parts[number][::-1])


def _finish_totals(points: Sequence[Point], run: Backward) -> None:
    """Write the sums of the rows of several points, in their order; NaN where one of these has none."""
    assert run.block is not None
    sums: dict[int, tuple[Column, list[torch.Tensor | None]]] = {}
    for point in points:
        for number, column in enumerate(point.columns):
            if column.total is not None:
                part = run.pending[point.index].totals[number] if run.fired[point.index] else None
                sums.setdefault(id(column.total), (column.total, []))[1].append(part)
    for total, parts in sums.values():
        there = [part for part in parts if part is not None]
        if len(there) < len(parts):
            total.memory.fill_nan(run.block.base, run.block.n)
            continue
        summed = there[0]
        for part in there:
            if (stream := current_stream(part.device)) is not None:
                read_on(stream, part)
        for part in there[1:]:
            summed = summed + part.to(summed.device)
        total.put_sum(run.block.base, summed)
