"""Step and Tap in plain Python: what `tlfast._C` does natively, call for call and error for error."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from .errors import broken_rule
from .reference import accumulator
from .ring import Ring


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
        self.taps: list[Tap] = []
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
        torch.autograd.Variable._execution_engine.queue_callback(_End(self, task))  # type: ignore[attr-defined]
        return opened

    def begin(self, tap: Tap, shape: torch.Size) -> tuple[Backward, Block]:
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

    def _check_rows(self, tap: Tap, run: Backward, n: int) -> None:
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

    def _reserve(self, tap: Tap, n: int) -> Block:
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


class _Identity(torch.autograd.Function):
    """Identity whose backward fires a tap: the gradient through this module alone, for outputs that are inputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tap: Tap) -> torch.Tensor:  # type: ignore[override]
        ctx.tap = tap
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.tap.fire(grad)
        return grad, None


def select_output(output: object, which: int | str | None) -> tuple[torch.Tensor | None, int | str | None]:
    """The tensor to capture among a module's outputs, and where it is (None: the output is the tensor)."""
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, Mapping):
        keys: list[Any] = list(output.keys())
        if which is not None:  # an index counts the keys, as in a ModelOutput
            by_index = isinstance(which, int) and which not in output and -len(keys) <= which < len(keys)
            keys = [keys[which] if by_index else which]  # type: ignore[index]
        items = output
    elif isinstance(output, (tuple, list)):
        keys = list(range(len(output))) if which is None else [which]
        items = output  # type: ignore[assignment]
    else:
        return None, None
    for key in keys:
        try:
            value = items[key]
        except (KeyError, IndexError, TypeError):
            return None, None
        if isinstance(value, torch.Tensor) and (which is not None or value.is_floating_point()):
            return value, key
    return None, None


def replace_output(output: Any, key: int | str | None, tensor: torch.Tensor) -> Any:
    """A shallow copy of a module's output with one tensor replaced."""
    if key is None:
        return tensor
    if isinstance(output, Mapping):
        copied: Any = output.copy() if hasattr(output, "copy") else dict(output)
        copied[key] = tensor
        return copied
    items = list(output)
    items[int(key)] = tensor
    if isinstance(output, tuple):
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    return items


_NUMBERS = itertools.count()
_ALIVE: weakref.WeakValueDictionary[int, Tap] = weakref.WeakValueDictionary()


@torch.library.custom_op("tlfast_python::fire", mutates_args={"token"})
def _fire(token: torch.Tensor, grad: torch.Tensor, number: int) -> None:
    """Fire a tap from compiled code, where a tap is a number; ``token`` only keeps the call from being dropped."""
    tap = _ALIVE.get(number)
    if tap is not None:
        tap.fire(grad)


@_fire.register_fake
def _(token: torch.Tensor, grad: torch.Tensor, number: int) -> None:
    return None


class Tap:
    """Sits at one point and writes its gradients into the rings of its columns."""

    def __init__(self, step: Step, name: str, rings: list[Ring], output: int | str | None, calls: str):
        self.step, self.name, self.rings, self.output, self.calls = step, name, rings, output, calls
        self.who = f"capture at {name}"
        self.index = len(step.taps)
        self.n_called = 0  # forwards since the last committed step; 0 in compiled code, which doesn't count them
        self._recomputed = False  # entered inside a backward: a checkpoint, whose other calls may still be to come
        self._key: int | str | None = None  # where in the output the tensor was, for the full hook
        self._seen_ended = -1
        self.last_call = 0  # when the module was entered last, counted over the capture
        self.number = next(_NUMBERS)  # how compiled code names this tap
        _ALIVE[self.number] = self
        step.taps.append(self)

    def forward_pre(self) -> None:
        """The module is entered."""
        if not self.step.active:
            return
        self.step.enter_forward()
        self.step.n_calls += 1
        self.last_call = self.step.n_calls
        if not torch.is_grad_enabled():
            return
        if self._seen_ended != self.step.n_ended:
            self._seen_ended, self.n_called = self.step.n_ended, 0
        self.n_called += 1
        self._recomputed = torch._C._current_graph_task_id() != -1

    def forward(self, inputs: tuple[object, ...], output: object) -> object | None:
        """Attach to the output's autograd edge; return the output to use instead where an identity is needed."""
        if not self.step.active or not torch.is_grad_enabled():
            return None
        tensor = self.checked_output(output)
        if tensor is None:
            return None
        # Always a node of our own: whether somebody else uses the output too (a penalty on it inside the module, say)
        # can't be seen from here, and a hook on the output's own node would see that gradient as well.
        _, key = select_output(output, self.output)
        through: object = replace_output(output, key, _Identity.apply(tensor, self))  # type: ignore[no-untyped-call]
        return through

    def checked_output(self, output: object) -> torch.Tensor | None:
        """The output tensor if it can have a gradient; an error, or None, where it can't."""
        tensor, _ = select_output(output, self.output)
        if tensor is None:
            raise TypeError(
                broken_rule(
                    self.who, "the output", "hold a tensor" if self.output is None else f"hold {self.output!r}",
                    type(output).__name__, "Choose it with output=<index or key>.",
                )
            )  # fmt: skip
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(
                broken_rule(
                    self.who, "the output", "be a tensor with memory of its own", "one inside a torch.func transform",
                    "Use loss.backward() or torch.autograd.grad instead.",
                )
            )  # fmt: skip
        if not tensor.requires_grad:
            if self.step.missing == "nan":
                return None
            raise RuntimeError(
                broken_rule(
                    self.who, "the output", "require grad", "a tensor without a graph: no gradient can reach it",
                    'Use freeze(model) to start the graph at the embedding, or pass missing="nan".',
                )
            )  # fmt: skip
        return tensor

    def check_full(self, output: object) -> None:
        """What a full backward hook needs of an output; called before the hook wraps it."""
        if not isinstance(output, (torch.Tensor, tuple)):
            raise TypeError(
                broken_rule(
                    self.who, "the output", 'be a tensor or a tuple with attach="full"', type(output).__name__,
                    'Use attach="tensor".',
                )
            )  # fmt: skip
        if self.step.active:
            self.checked_output(output)
            _, self._key = select_output(output, self.output)

    def full(self, grad_output: tuple[torch.Tensor | None, ...]) -> None:
        """The body of a full backward hook."""
        if not self.step.active:
            return
        grad = grad_output[self._key if isinstance(self._key, int) else 0]
        if grad is not None:
            self.fire(grad)

    @torch.no_grad()
    def fire(self, grad: torch.Tensor) -> None:
        """Write one gradient into the rows of the running step."""
        if not self.step.active:
            return
        grad = grad.detach()
        run, block = self.step.begin(self, grad.shape)
        held = run.pending.setdefault(self.index, []) if self.calls == "stack" or self._sums() else []
        if self.calls == "stack":
            held.append([ring.part(grad, run.mask, run.scale) for ring in self.rings])
        elif self._sums():
            for ring in self.rings:
                ring.check(grad)
            if held:
                held[0][0] += grad
            else:
                held.append([grad.to(accumulator(grad.dtype), copy=True)])
        elif self.calls == "sum" and run.fired[self.index] > 1:
            raise RuntimeError(
                broken_rule(
                    self.who, "a point", "fire as often as it was called since the last step", "once more",
                    "Run one backward for each forward.",
                )
            )  # fmt: skip
        else:
            for ring in self.rings:
                ring.write(block.base, grad, run.mask, run.scale)

    def _sums(self) -> bool:
        """Whether the gradients of several calls are to be added up before they are reduced."""
        return self.calls == "sum" and (self.n_called != 1 or self._recomputed)

    def finish(self, held: list[list[torch.Tensor]], run: Backward) -> None:
        """Write what had to wait for the end of the step: the sum of several calls, or their stack."""
        assert run.block is not None
        for number, ring in enumerate(self.rings):
            if self.calls == "stack":
                # The last call of the forward fires first: turned around, index k is call k.
                ring.put_stack(run.block.base, run.block.n, [parts[number] for parts in reversed(held)])
            else:
                ring.write(run.block.base, held[0][0], run.mask, run.scale)


def fire_op(tap: Any) -> Any:
    """The op by which compiled code fires a tap, of either backend."""
    return torch.ops.tlfast_python.fire if isinstance(tap, Tap) else torch.ops.tlfast.fire
