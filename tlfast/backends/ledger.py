"""What all taps of a capture share, in plain Python: which backward is running, which rows are whose.

Does what `tlfast._C.Step` does natively, call for call and error for error.
"""

from __future__ import annotations

import sys
import threading
import weakref
from contextlib import suppress
from types import FrameType
from typing import Protocol

import torch
from torch.autograd.graph import _engine_run_backward

from ..errors import broken_rule
from .rows import Ring
from .streams import Mask, current_stream


class Point(Protocol):
    """What a step knows of a tap."""

    name: str
    who: str
    index: int
    calls: str
    rings: list[Ring]
    last_call: int
    others: str | None

    def finish(self, held: list[list[torch.Tensor]], run: Backward) -> None: ...


class Block:
    """The rows of one backward: reserved at its first gradient, counted once it has ended well."""

    def __init__(self, base: int, n: int):
        self.base, self.n = base, n
        self.state = "open"  # open -> committed | aborted
        self.missing: list[int] = []


class Backward:
    """One outermost backward: those that run inside it (of reentrant checkpoints, or in hooks) are part of it."""

    def __init__(self, root: int, n_taps: int, mask: Mask | None, n_expected: int, scale: float):
        self.root = root  # the graph task at whose end the rows are committed
        self.spoilt = False  # a part of it has failed, and the error was caught
        self.fired = [0] * n_taps
        self.pending: dict[int, list[list[torch.Tensor]]] = {}  # tap -> what waits for the end of the step
        self.block: Block | None = None
        self.mask, self.n_expected, self.scale = mask, n_expected, scale
        self._masks = {} if mask is None else {mask.tensor.device: mask}
        self._streams: list[torch.cuda.Stream] = []  # on which gradients were written
        self._waited: list[torch.cuda.Event] = []  # what they have come after

    def mask_on(self, device: torch.device) -> torch.Tensor | None:
        """The mask where a gradient is: a model may be spread over several devices of one kind."""
        if self.mask is None:
            return None
        if self.mask.tensor.device.type != device.type:
            return self.mask.tensor
        if device not in self._masks:
            self._masks[device] = Mask(self.mask.here().to(device, non_blocking=True))
        return self._masks[device].here()

    def write_on(self, stream: torch.cuda.Stream | None, again: bool, failed: list[torch.cuda.Event]) -> None:
        """Note that a gradient is written on a stream, after what a backward that failed has begun to write. One of
        another call of the same point, whose rows or sum it may change, was perhaps written on another stream.
        """
        if stream is None:
            return
        if stream not in self._streams:
            self._streams.append(stream)
            for done in failed:
                stream.wait_event(done)
            self._waited = self._waited or list(failed)
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

    def give_up(self, failed: list[torch.cuda.Event]) -> None:
        """Put into ``failed`` what happens when all is written that was begun and not joined, in place of what that has
        waited for.
        """
        with suppress(RuntimeError):  # the device itself has failed, and does nothing more
            written = [stream.record_event() for stream in self._streams]
            if written:
                failed[:] = [done for done in failed if done not in self._waited] + written


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

    step: Step | None = None  # for one that was dropped before it was made

    def __init__(self, step: Step, task: int, nested: bool):
        self.step, self.task, self.nested, self.called = step, task, nested, False

    def __call__(self) -> None:
        self.called = True
        if self.step is not None and not self.nested:
            self.step.end(self.task)  # may raise; the end of a nested one commits nothing

    def __del__(self) -> None:
        if self.step is not None:
            if self.nested:
                self.step.leave(self.task, self.called)
            else:
                self.step.abort(self.task)


class _Ended:
    """Runs when a backward around a capture ends, or fails."""

    def __init__(self, step: Step):
        self._step = weakref.ref(step)

    def __call__(self) -> None: ...

    def __del__(self) -> None:
        if (step := self._step()) is not None:
            step.look_around(n_leaving=1)


class Step:
    """What all taps of one capture share: which backward is running, which rows are whose, what is committed."""

    def __init__(self, capacity: int, missing: str):
        self.capacity, self.missing = capacity, missing
        self.active = True
        self.taps: list[Point] = []
        self.blocks: list[Block] = []
        self.n_rows = 0  # of the committed ones
        self.running: dict[int, Backward] = {}  # by the ids of its graph tasks
        # The backward that was last met in each thread: what runs inside another one in this thread is a part of it.
        self._met: dict[int, Backward] = {}
        self.n_ended = 0
        self.n_calls = 0
        self._calls_before = 0  # those until the last backward ended
        self._batch: tuple[Mask | None, int, float] = (None, -1, 1.0)
        self._failed: list[torch.cuda.Event] = []  # the work of a backward that failed: the next may write its rows
        self._lock = threading.RLock()
        self.look_around(n_leaving=0)

    def look_around(self, n_leaving: int) -> None:
        """A capture may be made inside a backward, in a hook: that one and those around it hold its steps, and are
        none. This finds them, and is called again as each of them ends.
        """
        self._task_around = torch._C._current_graph_task_id()
        self._n_around = 0 if self._task_around == -1 else _n_backwards(_CPU) - n_leaving
        if self._task_around != -1:
            torch.autograd.Variable._execution_engine.queue_callback(_Ended(self))

    def set_batch(self, mask: torch.Tensor | None, n_expected: int, scale: float) -> None:
        """What holds for the next backwards: the mask, the number of examples (-1: unknown), the factor on rows."""
        self._batch = (None if mask is None else Mask(mask), n_expected, scale)

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
        opened = Backward(task, len(self.taps), *self._batch)
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

    def begin(self, tap: Point, shape: torch.Size, device: torch.device) -> tuple[Backward, Block]:
        """Find the running backward and its rows; every check that needs no gradient values is made here."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            raise RuntimeError(
                broken_rule(tap.who, "a tap", "fire inside a backward", "a call outside one", "Call backward().")
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
                            tap.who, "a gradient", "be one of an outermost backward, or come after one of it",
                            "the first of a backward inside another one",
                            "Capture a point nearer to the loss, too, or leave this one out.",
                        )
                    )  # fmt: skip
                run = self._open(task, device)
            run.fired[tap.index] += 1
            if run.fired[tap.index] > 1 and tap.calls == "raise":
                raise RuntimeError(
                    broken_rule(
                        tap.who, "a point", "fire once in a backward", "a second time",
                        'Choose calls="sum", "last" or "stack".',
                    )
                )  # fmt: skip
            for n in (ring.n_rows(shape) for ring in tap.rings):
                self._check_rows(tap, run, n)
            assert run.block is not None
            run.write_on(current_stream(device), run.fired[tap.index] > 1, self._failed)
            return run, run.block

    def _check_rows(self, tap: Point, run: Backward, n: int) -> None:
        if run.n_expected >= 0 and n != run.n_expected:
            raise ValueError(
                broken_rule(
                    tap.who, "a step", f"have the {run.n_expected} rows that batch() announced", n,
                    "Check mask and ids; a reduced batch makes one row.",
                )
            )  # fmt: skip
        if run.block is None:
            run.block = self._reserve(tap, n)
        elif run.block.n != n:
            raise ValueError(
                broken_rule(
                    tap.who, "a step", f"have the same number of rows at every point ({run.block.n})", n,
                    "Leave this point out, or capture it on its own.",
                )
            )  # fmt: skip

    def _reserve(self, tap: Point, n: int) -> Block:
        base = self.blocks[-1].base + self.blocks[-1].n if self.blocks else 0
        if base + n > self.capacity:
            raise RuntimeError(
                broken_rule(
                    tap.who, "rows", f"hold the {base} rows written and {n} more", self.capacity,
                    "Give capture more rows, or read them and call clear().",
                )
            )  # fmt: skip
        self.blocks.append(Block(base, n))
        return self.blocks[-1]

    @torch.no_grad()
    def end(self, task: int) -> None:
        """The end of the outermost backward: commit its rows at all points together, or none of them."""
        with self._lock:
            run = self.running.get(task)
            if run is None or run.block is None or not self.active:
                self.abort(task)
                return
            for caller in run.join_streams():
                for ring in (ring for tap in self.taps for ring in tap.rings):
                    ring.used_on(caller)
            if run.spoilt:
                self.abort(task)
                raise RuntimeError(
                    broken_rule(
                        "capture", "a backward", "hold no other one that failed",
                        "one whose error was caught after it had reached a point",
                        "Let the error out, or run that one after this.",
                    )
                )  # fmt: skip
            absent = [tap for tap in self.taps if not run.fired[tap.index]]
            if absent and self.missing == "raise":
                error = self._no_gradient(run, absent)
                self.abort(task)
                raise error
            if absent:
                self._come_after_failed()
            for tap in absent:
                for ring in tap.rings:
                    ring.fill_nan(run.block.base, run.block.n)
            for index, held in run.pending.items():
                self.taps[index].finish(held, run)
            run.block.missing = [tap.index for tap in absent]
            run.block.state = "committed"
            self.n_rows += run.block.n
            self.n_ended += 1
            self._calls_before = self.n_calls
            self._failed = []
            self._forget(run)

    def _no_gradient(self, run: Backward, absent: list[Point]) -> RuntimeError:
        """The error for points without a gradient: which were not called, and which were to no effect."""

        def seen(tap: Point) -> bool:
            return tap.last_call > self._calls_before

        # Compiled code makes calls that none count, and with several forwards in flight they were before the last step.
        counted = all(seen(tap) for tap in self.taps if run.fired[tap.index])
        idle = [tap.name for tap in absent if counted and not seen(tap)]
        called = [tap for tap in absent if tap.name not in idle]
        got = [f"no call of {', '.join(idle)} since the last step (none is seen in compiled code)"] if idle else []
        if called:
            why = " (called, but the backward does not go through the output)" if counted else ""
            got.append(f"no gradient at {', '.join(tap.name for tap in called)}{why}")
        other = next((f"Choose {tap.others} at {tap.name}, or leave" for tap in called if tap.others), "Leave")
        remedy = f'{other} these points out, or pass missing="nan" for NaN rows.'
        return RuntimeError(broken_rule("capture", "every point", "fire in a backward", "; ".join(got), remedy))

    def abort(self, task: int) -> None:
        """Forget a backward that failed: its rows are void."""
        with self._lock:
            run = self.running.get(task)
            if run is None:
                return
            self._calls_before = self.n_calls
            run.give_up(self._failed)
            self._forget(run)
            if run.block is not None and run.block.state == "open":
                run.block.state = "aborted"
                while self.blocks and self.blocks[-1].state == "aborted":
                    self.blocks.pop()

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

    @property
    def extent(self) -> tuple[int, int]:
        """The rows of all committed backwards, and where the last of them ends: more only where others left holes."""
        with self._lock:
            last = next((block for block in reversed(self.blocks) if block.state == "committed"), None)
            return self.n_rows, 0 if last is None else last.base + last.n

    def committed(self) -> list[tuple[int, int, list[int]]]:
        """(first row, rows, taps that did not fire) of every committed backward, in order."""
        with self._lock:
            return [(b.base, b.n, b.missing) for b in self.blocks if b.state == "committed"]

    def clear(self) -> None:
        """Forget all rows and their shapes; RuntimeError while a backward is running."""
        with self._lock:
            if any(run.block is not None for run in self.running.values()):
                raise RuntimeError(
                    broken_rule(
                        "clear", "the capture", "be at rest", "a running backward", "Call it after backward() returned."
                    )
                )
            self.blocks.clear()
            self.n_rows = 0
            for tap in self.taps:
                for ring in tap.rings:
                    ring.clear()

    def _come_after_failed(self) -> None:
        """Let the current streams of the devices that hold rows wait for what failed backwards have begun to write."""
        for rows in (ring.rows for tap in self.taps for ring in tap.rings if self._failed):
            stream = None if rows is None else current_stream(rows.device)
            if stream is not None:
                for done in self._failed:
                    stream.wait_event(done)

    def settle(self) -> None:
        """Let the current streams see all that was counted, also by backwards that failed."""
        with self._lock:
            self._come_after_failed()

    def close(self) -> None:
        """From now on a firing tap does nothing."""
        self.active = False
