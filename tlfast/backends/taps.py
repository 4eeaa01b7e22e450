"""Taps in plain Python: what `tlfast._C.Tap` does natively, call for call and error for error."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..errors import broken_rule
from .ledger import Backward, Step
from .no_graph import no_graph
from .outputs import alias, no_tensor, other_outputs, replace_output, select_output
from .plain import GRADIENT, check_output, plain
from .reference import accumulator
from .rows import Ring
from .streams import current_stream, read_on


class _Identity(torch.autograd.Function):
    """Identity whose backward fires a tap: the gradient through this module alone, for outputs that are inputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tap: Tap, anchor: torch.Tensor | None) -> torch.Tensor:
        ctx.tap = tap
        return alias(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.tap.fire(grad)
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        return tangent


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
        self.others: str | None = None  # which other outputs have a graph, as the first call has shown
        self.convert: Callable[[torch.Tensor], torch.Tensor] | None = None
        # A leaf to which every identity node leads too: backward(inputs=[anchor]) runs whatever leads to the node, and
        # makes no gradient of a parameter.
        self.anchor: torch.Tensor | None = None
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
        key = self._place_of(output)
        through: object = replace_output(output, key, self.identity(tensor))
        return through

    def identity(self, tensor: torch.Tensor) -> Any:
        """The tensor behind an identity node that fires this tap."""
        return _Identity.apply(tensor, self, self.anchor)  # type: ignore[no-untyped-call]

    def set_convert(self, convert: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """What is to be made of each gradient before anything else."""
        self.convert = convert

    def converted(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.convert is None:
            return tensor
        changed: object = self.convert(tensor)
        if not isinstance(changed, torch.Tensor):
            rule = "return a tensor"
            raise TypeError(broken_rule("capture", "a conversion", rule, type(changed).__name__, "Check it."))
        return changed

    def taken(self, grad: torch.Tensor) -> torch.Tensor:
        """A gradient as it is kept: plain memory, and converted."""
        grad = plain(self.who, GRADIENT, grad).detach()
        return grad if self.convert is None else plain(self.who, GRADIENT, self.converted(grad))

    def checked_output(self, output: object) -> torch.Tensor | None:
        """The output tensor if it can have a gradient; an error, or None, where it can't."""
        tensor, _ = select_output(output, self.output)
        if tensor is None:
            raise no_tensor(self.who, output, self.output)
        check_output(self.who, tensor)
        if not tensor.requires_grad:
            if self.step.missing == "nan":
                return None
            raise no_graph(self.who, output, self.output)
        return tensor

    def check_full(self, output: object) -> None:
        """What a full backward hook needs of an output; called before the hook wraps it."""
        # PyTorch makes such an output anew of its items, which no other kind of tuple takes one by one.
        if not (isinstance(output, torch.Tensor) or type(output) is tuple or hasattr(output, "_make")):
            raise TypeError(
                broken_rule(
                    self.who, "the output", 'be a tensor or a tuple with attach="full"', type(output).__name__,
                    'Use attach="tensor".',
                )
            )  # fmt: skip
        if self.step.active:
            self.checked_output(output)
            self._key = self._place_of(output)

    def _place_of(self, output: object) -> int | str | None:
        _, key = select_output(output, self.output)
        if key is not None and self.others is None:
            self.others = other_outputs(output, key)
        return key

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
        grad = self.taken(grad)
        run, block = self.step.begin(self, grad.shape, grad.device)
        mask = run.mask_on(grad.device)
        held = run.pending.setdefault(self.index, []) if self.calls == "stack" or self.sums() else []
        if self.calls == "stack":
            held.append([ring.part(grad, mask, run.scale) for ring in self.rings])
        elif self.sums():
            for ring in self.rings:
                ring.check(grad)
            if held and held[0][0].shape != grad.shape:  # which += would broadcast
                raise ValueError(
                    broken_rule(
                        self.who, "a point", f"have one shape in all calls to be summed ({list(held[0][0].shape)})",
                        list(grad.shape), 'Choose calls="last" or "stack".',
                    )
                )  # fmt: skip
            if held:
                if (stream := current_stream(grad.device)) is not None:
                    read_on(stream, held[0][0])  # memory of the first call's stream
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
                ring.write(block.base, grad, mask, run.scale)

    def sums(self) -> bool:
        """Whether the gradients of several calls are to be added up before they are reduced."""
        return self.calls == "sum" and (self.n_called != 1 or self._recomputed)

    def finish(self, held: list[list[torch.Tensor]], run: Backward) -> None:
        """Write what had to wait for the end of the step: the sum of several calls, or their stack."""
        assert run.block is not None
        for tensor in (tensor for tensors in held for tensor in tensors):
            if (stream := current_stream(tensor.device)) is not None:
                read_on(stream, tensor)  # the backward's nodes may have run on another one
        for number, ring in enumerate(self.rings):
            if self.calls == "stack":
                # The last call of the forward fires first: turned around, index k is call k.
                ring.put_stack(run.block.base, run.block.n, [parts[number] for parts in reversed(held)])
            else:
                ring.write(run.block.base, held[0][0], run.mask_on(held[0][0].device), run.scale)


class SinkTap(Tap):
    """A tap that hands each gradient to a callable and keeps no rows."""

    def __init__(self, step: Step, name: str, sink: Callable[[torch.Tensor], Any], output: int | str | None):
        super().__init__(step, name, [], output, "last")
        self.sink = sink

    @torch.no_grad()
    def fire(self, grad: torch.Tensor) -> None:
        if self.step.active:
            self.sink(self.taken(grad))


def fire_op(tap: Any) -> Any:
    """The op by which compiled code fires a tap, of either backend."""
    return torch.ops.tlfast_python.fire if isinstance(tap, Tap) else torch.ops.tlfast.fire
