"""What all taps of a capture share, in plain Python: which backward is running, which rows are whose.

Does what `tlfast._C.Step` does natively, call for call and error for error.
"""

from __future__ import annotations

import sys
import threading
from typing import Protocol

import torch

from .errors import broken_rule
from .ring import Ring


class Point(Protocol):
    """What a step knows of a tap."""

    name: str
    who: str
    index: int
    calls: str
    rings: list[Ring]

    def finish(self, held: list[list[torch.Tensor]], run: Backward) -> None: ...


class Block:
    """The rows of one backward: reserved at its first gradient, counted once it has ended well."""

    def __init__(self, base: int, n: int):
        self.base, self.n = base, n
        self.state = "open"  # open -> committed | aborted
        self.missing: list[int] = []


class Backward:
    """One outermost backward: nested ones (reentrant checkpoints) are part of it."""

    def __init__(self, n_taps: int, mask: torch.Tensor | None, n_expected: int, scale: float):
        self.threads: set[int] = set()
        self.fired = [0] * n_taps
        self.pending: dict[int, list[list[torch.Tensor]]] = {}  # tap -> what waits for the end of the step
        self.block: Block | None = None
        self.mask, self.n_expected, self.scale = mask, n_expected, scale
        self._masks = {} if mask is None else {mask.device: mask}

    def mask_on(self, device: torch.device) -> torch.Tensor | None:
        """The mask where a gradient is: a model may be spread over several devices of one kind."""
        if self.mask is None or self.mask.device.type != device.type:
            return self.mask
        if device not in self._masks:
            self._masks[device] = self.mask.to(device, non_blocking=True)
        return self._masks[device]


def refuse_compiled_autograd() -> None:
    """RuntimeError in compiled autograd: it never calls what is to run at the end, so no row would be committed."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and compiled.in_compiled_autograd_region:
        raise RuntimeError(
            broken_rule("capture", "the backward", "run in the eager engine", "compiled autograd", "Turn it off.")
        )


class _End:
    """Runs when a backward ends; if the engine drops it without a call, the backward failed and its rows are void."""

    step: Step | None = None  # for one that was dropped before it was made

    def __init__(self, step: Step, task: int):
        self.step, self.task = step, task

    def __call__(self) -> None:
        if self.step is not None:
            self.step.end(self.task)

    def __del__(self) -> None:
        if self.step is not None:
            self.step.abort(self.task)


class Step:
    """What all taps of one capture share: which backward is running, which rows are whose, what is committed."""

    def __init__(self, capacity: int, missing: str):
        self.capacity, self.missing = capacity, missing
        self.active = True
        self.taps: list[Point] = []
        self.blocks: list[Block] = []
        self.running: dict[int, Backward] = {}
        self.n_ended = 0
        self.n_calls = 0
        self._batch: tuple[torch.Tensor | None, int, float] = (None, -1, 1.0)
        self._lock = threading.RLock()

    def set_batch(self, mask: torch.Tensor | None, n_expected: int, scale: float) -> None:
        """What holds for the next backwards: the mask, the number of examples (-1: unknown), the factor on rows."""
        self._batch = (mask, n_expected, scale)

    def enter_forward(self) -> None:
        """A captured module runs forward; inside a backward (a checkpoint) that backward is the step to come."""
        task = torch._C._current_graph_task_id()
        if task != -1 and self.active:
            with self._lock:
                (self._find(task) or self._open(task)).threads.add(threading.get_ident())

    def _find(self, task: int) -> Backward | None:
        found = self.running.get(task)
        if found is None:
            here = threading.get_ident()
            found = next((b for b in self.running.values() if here in b.threads), None)
        return found

    def _open(self, task: int) -> Backward:
        refuse_compiled_autograd()
        self.running[task] = opened = Backward(len(self.taps), *self._batch)
        torch.autograd.Variable._execution_engine.queue_callback(_End(self, task))
        return opened

    def begin(self, tap: Point, shape: torch.Size) -> tuple[Backward, Block]:
        """Find the running backward and its rows; every check that needs no gradient values is made here."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            raise RuntimeError(
                broken_rule(tap.who, "a tap", "fire inside a backward", "a call outside one", "Call backward().")
            )
        with self._lock:
            run = self._find(task) or self._open(task)
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
            absent = [tap for tap in self.taps if not run.fired[tap.index]]
            if absent and self.missing == "raise":
                self.abort(task)
                names = ", ".join(tap.name for tap in absent)
                raise RuntimeError(
                    broken_rule(
                        "capture", "every point", "fire in a backward", f"no gradient at {names}",
                        'Leave these points out, or pass missing="nan" for NaN rows.',
                    )
                )  # fmt: skip
            for tap in absent:
                for ring in tap.rings:
                    ring.fill_nan(run.block.base, run.block.n)
            for index, held in run.pending.items():
                self.taps[index].finish(held, run)
            run.block.missing = [tap.index for tap in absent]
            run.block.state = "committed"
            self.n_ended += 1
            del self.running[task]

    def abort(self, task: int) -> None:
        """Forget a backward that failed: its rows are void."""
        with self._lock:
            run = self.running.pop(task, None)
            if run is not None and run.block is not None and run.block.state == "open":
                run.block.state = "aborted"
                while self.blocks and self.blocks[-1].state == "aborted":
                    self.blocks.pop()

    def committed(self) -> list[tuple[int, int, list[int]]]:
        """(first row, rows, taps that did not fire) of every committed backward, in order."""
        with self._lock:
            return [(b.base, b.n, b.missing) for b in self.blocks if b.state == "committed"]

    def clear(self) -> None:
        """Forget all rows; RuntimeError while a backward is running."""
        with self._lock:
            if any(b.state == "open" for b in self.blocks):
                raise RuntimeError(
                    broken_rule(
                        "clear", "the capture", "be at rest", "a running backward", "Call it after backward() returned."
                    )
                )
            self.blocks.clear()

    def close(self) -> None:
        """From now on a firing tap does nothing."""
        self.active = False
