"""Put a tap on a hook point so that TransformerLens sees it: a LensHandle among the point's backward hooks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backends.choice import pick_backend
from ..backends.interface import Backend
from ..errors import broken_rule
from ..hooks.attachment import (
    CacheHook,
    ForwardPreHook,
    behind_full_hook,
    fires_at_output,
    hook_module,
)
from ..hooks.inert import Hook
from .library import lens_handle
from .names import conversion_of


class TapHandle:
    """Takes a tap's hooks off; what TransformerLens calls where it resets hooks.

    A backward whose forward ran before still reaches the tap, as it does a full backward hook that is removed.
    """

    def __init__(self, module: Any, tap: Any, attach: str, engine: Backend):
        self._handles = hook_module(module, tap, attach, engine)
        self.id = self._handles[-1].id  # as a RemovableHandle has it

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def passes_on(inputs: Any, output: Any) -> bool:
    """Whether a gradient at a point's output reaches what the point was given, where a full backward hook fires.

    It doesn't where a hook put another tensor in its place. Where nothing that was given has a gradient at all, a full
    backward hook fires at the output.
    """
    found = output[0] if isinstance(output, tuple) and output else output
    given = [one for one in inputs if isinstance(one, torch.Tensor) and one.requires_grad]
    if not isinstance(found, torch.Tensor) or not given or any(found is one for one in given):
        return True
    wanted = [one.grad_fn for one in given]
    leaves = {id(one) for one in given if one.grad_fn is None}
    # What was made of a tensor was made after it, and so has a higher number. A leaf's node has none to compare.
    since = 0 if leaves else min(node._sequence_nr() for node in wanted if node is not None)
    seen: set[Any] = set()
    nodes = [found.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted or id(getattr(node, "variable", None)) in leaves:
            return True
        if node._sequence_nr() >= since:
            nodes += [following for following, _ in node.next_functions]
    return False


class CheckedCacheHook(CacheHook):
    """For a point where somebody's hook may put another tensor in the place of the point's: then it has no gradient."""

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and passes_on(args, output)):
            return super().__call__(module, args, output)


class OwnHooks:
    """The hooks of a tap that caches, registered by the point's own `add_hook`.

    For a point of a user's class, where it says what a hook sees, and for one that must be hooked as TransformerLens
    hooks it, since somebody's hooks are there.
    """

    def __init__(self, point: Any, tap: Any, backward: bool):
        def keep(value: Any, hook: Any = None) -> None:
            with torch.no_grad():  # to keep it, and to attach nowhere
                tap.forward((), value)

        run, thread = tap.backwards.run, threading.get_ident()

        def keep_grad(grad: Any, hook: Any = None) -> None:
            # Of a call in another thread; a GPU has a thread of its own.
            elsewhere = threading.get_ident() != thread and grad is not None and grad.device.type == "cpu"
            if tap.backwards.run == run and not elsewhere:
                tap.full((grad,))

        self._point = point
        before = {id(handle) for handle in (*point.fwd_hooks, *point.bwd_hooks)}
        point.add_hook(keep, "fwd")
        if backward:
            point.add_hook(keep_grad, "bwd")
        self._handles = [handle for handle in (*point.fwd_hooks, *point.bwd_hooks) if id(handle) not in before]

    def remove(self) -> None:
        for handle in self._handles:
            handle.hook.remove()
            for listed in (self._point.fwd_hooks, self._point.bwd_hooks):
                listed[:] = [one for one in listed if one is not handle]


class Sinks:
    """A point's caching hooks, which one tap serves in their order: of two taps the later one would fire first.

    They are called by a backward whose forward found them there, also where they are removed by then, as full backward
    hooks are. So there is another tap after each change.
    """

    def __init__(self, point: Any):
        self._point, self._name = point, str(point.name)
        self._tap: Any = None
        self._engine = pick_backend("transformer_lens", "auto", set())
        self.handles: list[SinkHandle] = []
        pre, hook = _SinkPreHook(self), _SinkHook(self)
        self._hooked = [point.register_forward_pre_hook(pre), point.register_forward_hook(hook)]
        pre.hook_id = self._hooked[1].id

    @staticmethod
    def at(point: Any) -> Sinks | None:
        """What serves this point already."""
        return next((hook.tap for hook in point._forward_hooks.values() if isinstance(hook, _SinkHook)), None)

    def add(self, handle: SinkHandle, prepend: bool) -> None:
        self.handles.insert(0 if prepend else len(self.handles), handle)
        self._tap = None

    def drop(self, handle: SinkHandle) -> None:
        self.handles = [one for one in self.handles if one is not handle]
        self._tap = None
        for hook in self._hooked if not self.handles else ():
            hook.remove()

    def forward(self, args: Any, output: Any) -> Any:
        if fires_at_output(args, output):
            return behind_full_hook(self._point, [handle.sink for handle in self.handles], args, output)
        found = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(found, torch.Tensor) or not passes_on(args, output):
            return None  # a full backward hook isn't called here
        if self._tap is None:
            self._tap = self._make()
        return self._tap.forward(args, output)

    def forward_pre(self) -> None:
        """A tap that keeps no rows counts no calls."""

    def _make(self) -> Any:
        hooks, point = [handle.sink for handle in self.handles], self._point

        def sink(grad: torch.Tensor) -> None:
            for hook in hooks:
                hook(point, (), (grad,))  # TransformerLens' own wrapping: conversions, alias names

        backwards = self._engine.Backwards(self._engine.Ledger(1), "nan")
        return self._engine.Tap(backwards, self._name, self._engine.SinkKeeper(sink, "none", ()), None)


class _SinkPreHook(ForwardPreHook):
    """Keeps the hook that attaches the last one: somebody's may be added later."""


class _SinkHook(CacheHook):
    """Attaches the tap to what the hooks before it have made of the output."""

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        return self.tap.forward(args, output)


class SinkHandle(RemovableHandle):
    """Takes a caching hook off its point; TransformerLens calls it where it resets hooks. A copy takes off nothing."""

    sink: Callable[..., Any]
    _sinks: Sinks | None = None

    def __init__(self, sinks: Sinks, sink: Callable[..., Any], prepend: bool):
        super().__init__(OrderedDict())
        self.sink, self._sinks = sink, sinks
        sinks.add(self, prepend)

    def remove(self) -> None:
        if self._sinks is not None:
            self._sinks.drop(self)
            self._sinks = None


def convert_at(point: Any, tap: Any) -> None:
    """Let a tap see what a hook of TransformerLens would see at this point."""
    convert = conversion_of(point)
    if convert is not None:
        tap.set_convert(convert, None)


class ListedTap:
    """A tap's handle in lists of its point, where TransformerLens' components look to choose their path."""

    __slots__ = ("handle", "lists", "point")

    def __init__(self, handle: Any, lists: tuple[str, ...], permanent: bool):
        self.lists, self.handle = lists, lens_handle(handle, permanent, None)
        self.point: Any = None  # while it stands in the lists of one

    def hook(self, point: Any) -> ListedTap:
        """Put the hooks on a point, and stand in its lists."""
        self.handle.hook.register(point)
        return self.list(point)

    def list(self, point: Any) -> ListedTap:
        """Stand in the lists of a point."""
        self.point = point
        for name in self.lists:
            getattr(point, name).append(self.handle)
        return self

    def remove(self) -> None:
        """Take the hooks off, and the handle out of the lists."""
        self.handle.hook.remove()
        self.unlist()
        self.point = None

    def unlist(self) -> None:
        """Take exactly this one out of the lists: by identity, since handles compare by value."""
        for name in self.lists if self.point is not None else ():
            listed = getattr(self.point, name)  # TransformerLens replaces the list when it removes hooks
            if listed and listed[-1] is self.handle:
                listed.pop()
            else:
                listed[:] = [handle for handle in listed if handle is not self.handle]


class ListedWithGradients(Hook):
    """On a norm, before it looks at the hooks of its points: a tap is listed while there are gradients alone."""

    def __call__(self, norm: Any, args: Any) -> None:
        self.tap.unlist()
        if torch.is_grad_enabled():
            self.tap.list(self.tap.point)


class SameNorm(Hook):
    """On such a norm, behind its first forward with gradients: a RuntimeError where its other path is another norm."""

    looked = False

    def __call__(self, norm: Any, args: Any, output: Any) -> None:
        points = (norm.hook_in, norm.hook_scale, norm.hook_normalized, norm.hook_out)
        if self.looked or not torch.is_grad_enabled() or not args or any(point.fwd_hooks for point in points):
            return  # somebody's hook may make it another on purpose
        self.looked = True
        with torch.no_grad():
            plain = norm.original_component(args[0])
            off = ((output - plain).norm() / plain.norm()).item()
        if off > torch.finfo(plain.dtype).eps ** 0.5:  # far beyond rounding, in whichever order it adds up
            name = self.tap.point.name
            raise RuntimeError(
                broken_rule(
                    f"capture at {name}", "the norm", "be the same with a backward hook there",
                    f"an output that is {off:.2g} of its size off",
                    f"Capture {name.rpartition('.')[0]}.hook_in or .hook_out.",
                )
            )  # fmt: skip


def norm_of(model: nn.Module, point: Any) -> nn.Module | None:
    """The norm of a bridge that takes another path, whose values may differ, where this point has a backward hook."""
    if not str(point.name).endswith((".hook_scale", ".hook_normalized")):
        return None
    looking = [norm for norm in model.modules() if getattr(norm, "use_native_layernorm_autograd", False)]
    return next((norm for norm in looking if point in (norm.hook_scale, norm.hook_normalized)), None)
