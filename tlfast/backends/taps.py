"""Taps in plain Python: what `tlfast._C.Tap` does natively, call for call and error for error."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ..errors import broken_rule
from ..spec import one_of
from .backwards import Backwards, Point
from .calls import Call
from .checkpoints import Heard, unheard
from .interface import See
from .keepers import Keeper
from .no_graph import no_graph
from .outputs import alias, no_tensor, other_outputs, replace_output, select_output, the_input
from .plain import GRADIENT, OUTPUT, SIDES, check_output, plain
from .recipe import Seen


class _Identity(torch.autograd.Function):
    """Identity whose backward fires a tap: the gradient through this module alone, for outputs that are inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tap: Tap, anchor: torch.Tensor | None, *of_input: torch.Tensor
    ) -> torch.Tensor:
        ctx.call = Call(tap)
        # Without its history: of an output that is changed in place later, by this one's, our node is a part of it.
        output = [alias(x)] if tap.reads_outputs else []
        if output or of_input:
            ctx.save_for_backward(*output, *of_input)
        return alias(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tap: Tap = ctx.call.tap
        reads = (tap.reads_outputs or tap.reads_inputs) and tap.backwards.active
        saved: tuple[torch.Tensor, ...] = (
            ctx.saved_tensors if reads else ()
        )  # else nobody asks for what may be changed, or freed
        n_outputs = int(reads and tap.reads_outputs)
        tap.fire(grad, ctx.call, saved[0] if n_outputs else None, saved[n_outputs:])
        return (grad, *[None] * (len(ctx.needs_input_grad) - 1))

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        return tangent


class _KeptIdentity(_Identity):
    """For a keeper of outputs: where no gradient comes it fires no tap and passes zeros on, as a full backward hook."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, tap: Tap, anchor: torch.Tensor | None, *of_input: torch.Tensor
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.zeros = partial(torch.zeros, x.shape, dtype=x.dtype, device=x.device)
        return _Identity.forward(ctx, x, tap, anchor, *of_input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return ctx.zeros(), *[None] * (len(ctx.needs_input_grad) - 1)
        return _Identity.backward(ctx, grad)


_NUMBERS = itertools.count()
_ALIVE: weakref.WeakValueDictionary[int, Tap] = weakref.WeakValueDictionary()


@torch.library.custom_op("tlfast_python::fire", mutates_args={"token"})
def _fire(
    token: torch.Tensor, grad: torch.Tensor, number: int, output: torch.Tensor | None = None,
    input: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fire a tap from compiled code, where a tap is a number; ``token`` only keeps the call from being dropped."""
    tap = _ALIVE.get(number)
    if tap is not None:
        kept = [] if input is None or not tap.backwards.active else tap.keep_of_input(input, compiled=True)
        tap.fire(grad, Call(tap, "compiled"), output, kept)


@_fire.register_fake
def _(
    token: torch.Tensor, grad: torch.Tensor, number: int, output: torch.Tensor | None = None,
    input: torch.Tensor | None = None,
) -> None:  # fmt: skip
    return None


class Tap:
    """Sits at one point, and gives its keeper what it finds there."""

    def __init__(self, backwards: Backwards, name: str, keeper: Keeper, output: int | str | None):
        self.backwards, self.name, self.keeper, self.output = backwards, name, keeper, output
        self.point = Point(name, list(keeper.columns), len(backwards.points))
        self.who = self.point.who
        self.run = 0  # of which the following is
        self.n_in_flight = 0  # calls whose gradients may still come
        # When the module ran without a graph: calls whose gradients come of another forward, of a reentrant checkpoint,
        # or by a full backward hook, are among none that are counted.
        self._unseen_since = -1
        self._entered = False  # whether the module was entered outside of a backward
        self._heard = Heard()
        self.recomputed = False  # with full hooks: whether the last call was a recomputation
        self._seen_ended = -1  # and when the calls in flight were counted from 0
        self._key: int | str | None = None  # where in the output the tensor was, for the full hook
        self.convert: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._see: See | None = None
        self._side = OUTPUT  # of its module at which it sits, for errors
        self.number = next(_NUMBERS)  # how compiled code names this tap
        _ALIVE[self.number] = self
        backwards.add(self.point)

    @property
    def last_call(self) -> int:
        """When the module was entered last, counted over the capture."""
        return self.point.last_call

    @property
    def reads_outputs(self) -> bool:
        """Whether each call keeps its output for its backward."""
        return self.keeper.reads_outputs

    @property
    def reads_inputs(self) -> bool:
        """Whether each call keeps something of its input for its backward."""
        return self.keeper.reads_inputs

    def keep_of_input(self, given: torch.Tensor, compiled: bool = False) -> list[torch.Tensor]:
        """What a call is to keep of its input. In compiled code a tensor may be changed without a new version, so that
        nothing of it is shared with other modules.
        """
        sharing = None if compiled else self.backwards
        return self.keeper.keep_of_input(self.who, plain(self.who, SIDES["input"], given), sharing)

    @property
    def others(self) -> str | None:
        """Which other outputs have a graph, as the first call has shown."""
        return self.point.others

    def forward_pre(self) -> None:
        """The module is entered."""
        if not self.backwards.active:
            return
        if self.run != self.backwards.run:
            self.run, self.n_in_flight, self._unseen_since, self._entered = self.backwards.run, 0, -1, False
        self.backwards.enter_forward()
        self._entered |= torch._C._current_graph_task_id() == -1
        self.backwards.n_calls += 1
        self.point.last_call = self.backwards.n_calls
        if not torch.is_grad_enabled():
            self._unseen_since = self.backwards.ledger.n_ended

    @property
    def unseen(self) -> bool:
        """Whether the module ran without a graph since the last step."""
        return self._unseen_since == self.backwards.ledger.n_ended

    def forward(self, inputs: tuple[object, ...], output: object) -> object | None:
        """Attach to the output's autograd edge; return the output to use instead where an identity is needed."""
        return self.forward_of_layer((), {}, output)

    def forward_of_layer(self, inputs: tuple[object, ...], named: dict[str, object], output: object) -> object | None:
        """The same, with what the module was given, of which a call may keep something."""
        if self.keeper.keeps_outputs:
            return self._forward_kept(output)
        if not self.backwards.active or not torch.is_grad_enabled():
            return None
        given = the_input(self.who, inputs, named) if self.reads_inputs else None
        tensor = self.checked_output(output)
        if tensor is None:
            return None
        kept = [] if given is None else self.keep_of_input(given)
        # Always a node of our own: whether somebody else uses the output too (a penalty on it inside the module, say)
        # can't be seen from here, and a hook on the output's own node would see that gradient as well.
        key = self._place_of(output)
        through: object = replace_output(output, key, self.identity(tensor, *kept))
        return through

    def _forward_kept(self, output: object) -> object | None:
        """A keeper of outputs keeps them also where no gradient can reach them. Its one hook counts the call, too."""
        if not self.backwards.runs_here:
            return None
        self.forward_pre()
        if not self.backwards.active:
            return None
        in_tuple = isinstance(output, tuple) and len(output) > 0
        found = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(found, torch.Tensor):
            if output is None:
                self.keeper.output(None)
            return None
        with torch.no_grad():
            self.keeper.output(self.converted(alias(found)))
        if self.backwards.anchor is None or not torch.is_grad_enabled() or self.checked_output(found) is None:
            return None
        replaced: object = replace_output(output, 0 if in_tuple else None, self.identity(found))
        return replaced

    def identity(self, tensor: torch.Tensor, *of_input: torch.Tensor) -> Any:
        """The tensor behind an identity node that fires this tap."""
        kind = _KeptIdentity if self.keeper.keeps_outputs else _Identity
        # A checkpoint that runs a forward from before the capture again goes by the order of what it saves: one more,
        # and the model would take our output for a tensor of its own.
        heard = not (self.reads_outputs or of_input) or self._heard.hears(self._entered)
        with nullcontext() if heard else unheard():
            return kind.apply(tensor, self, self.backwards.anchor, *of_input)  # type: ignore[no-untyped-call]

    def set_convert(self, convert: Callable[[torch.Tensor], torch.Tensor] | None, see: See | None) -> None:
        """What is to be made of each gradient, and of an output that is kept, before anything else; and what is shown
        them then."""
        self.convert, self._see = convert, see

    def set_side(self, side: str) -> None:
        """Of a module's "output" or "input", as errors call it."""
        self._side = SIDES[one_of("capture", "side", side, tuple(SIDES))]

    def converted(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.convert is None:
            return tensor
        changed: object = self.convert(tensor)
        if not isinstance(changed, torch.Tensor):
            rule = "return a tensor"
            raise TypeError(broken_rule("capture", "a conversion", rule, type(changed).__name__, "Check it."))
        return changed

    def taken(self, given: torch.Tensor, what: str = GRADIENT) -> torch.Tensor:
        """A gradient, or an output, as it is kept: plain memory, and converted."""
        given = plain(self.who, what, given).detach()
        return given if self.convert is None else plain(self.who, what, self.converted(given))

    def checked_output(self, output: object) -> torch.Tensor | None:
        """The output tensor if it can have a gradient; an error, or None, where it can't."""
        tensor, _ = select_output(output, self.output)
        if tensor is None:
            raise no_tensor(self.who, self._side, output, self.output)
        check_output(self.who, self._side, tensor)
        if not tensor.requires_grad:
            if self.backwards.missing == "nan":
                return None
            raise no_graph(self.who, self._side, output, self.output)
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
        if self.backwards.active:
            if self.checked_output(output) is not None:
                ended = self.backwards.ledger.n_ended
                self.n_in_flight = self.n_in_flight + 1 if self._seen_ended == ended else 1
                self._seen_ended = ended
                self.recomputed = torch._C._current_graph_task_id() != -1
            self._key = self._place_of(output)

    def _place_of(self, output: object) -> int | str | None:
        _, key = select_output(output, self.output)
        if key is not None and self.point.others is None:
            self.point.others = other_outputs(output, key)
        return key

    def full(self, grad_output: tuple[torch.Tensor | None, ...]) -> None:
        """The body of a full backward hook."""
        if not self.backwards.active:
            return
        grad = grad_output[self._key if isinstance(self._key, int) else 0]
        if grad is not None:
            self.fire(grad, Call(self, "full_hook"))

    @torch.no_grad()
    def fire(
        self, grad: torch.Tensor, call: Call, output: torch.Tensor | None = None, kept: Sequence[torch.Tensor] = ()
    ) -> None:
        """Give the keeper the gradient of a call, and its output where the keeper reads that."""
        if not self.backwards.active or call.run != self.backwards.run:
            return
        seen = Seen(self.taken(grad), None if output is None else self.taken(output, self._side), kept)
        if seen.act is not None:
            _check_kept(self.who, self._side, seen.act, seen.grad)
        if self._see is not None:
            self._see(seen.grad, seen.act, list(kept))
        self.keeper.gradient(call, seen)


def _check_kept(who: str, side: str, act: torch.Tensor, grad: torch.Tensor) -> None:
    """ValueError: the rows of a step are reserved by the shape of its gradients, and hooks on saved tensors may return
    anything."""
    if act.shape != grad.shape or act.device != grad.device:
        given, wanted = (f"{list(tensor.shape)} on {tensor.device}" for tensor in (act, grad))
        remedy = "Let the hooks on saved tensors give back what they were given."
        rule = f"be as its gradient is, {wanted}"
        raise ValueError(broken_rule(who, f"{side} that was kept", rule, given, remedy))


def fire_op(tap: Any) -> Any:
    """The op by which compiled code fires a tap, of either backend."""
    return torch.ops.tlfast_python.fire if isinstance(tap, Tap) else torch.ops.tlfast.fire
