"""Put a tap on a module: the hooks that PyTorch calls, for both attachments, eager and compiled."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.nn.modules.module import (
    _global_forward_hooks,
    _global_forward_hooks_always_called,
    _global_forward_hooks_with_kwargs,
)
from torch.utils.hooks import BackwardHook, RemovableHandle

from ..backends.interface import Backend
from ..backends.outputs import replace_output, select_output, the_input
from ..backends.plain import check_full_hook
from ..backends.taps import fire_op
from ..errors import broken_rule
from .freeze import StartGraph
from .full_hooks import FullHook, NativeFullHook, TakenNative
from .inert import Hook
from .inert import _copied as _copied  # as it is named in pickles


class ForwardPreHook(Hook):
    """Tells the tap that its module is entered, and keeps its forward hook the last one.

    A full backward hook wraps the output after all forward hooks have run, so a tap that fires on the same gradient
    must attach after all of them, also those registered after it.
    """

    hook_id = -1

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.take_place(module)
        if not torch.compiler.is_compiling():
            self.tap.forward_pre()

    def take_place(self, module: nn.Module) -> None:
        hooks: Any = module._forward_hooks  # an OrderedDict
        if next(reversed(hooks), -1) != self.hook_id and self.hook_id in hooks:
            hooks.move_to_end(self.hook_id)


class _LayerPreHook(ForwardPreHook):
    """Keeps the forward hook the first one: a weight's gradient is made of that at the output of the layer itself,
    which other hooks may change. Only what `freeze` starts the graph with comes before."""

    def take_place(self, module: nn.Module) -> None:
        hooks: Any = module._forward_hooks
        starts = [hook_id for hook_id, hook in hooks.items() if isinstance(hook, StartGraph)]
        first = [*starts, self.hook_id]
        if self.hook_id in hooks and list(hooks)[: len(first)] != first:
            for hook_id in reversed(first):
                hooks.move_to_end(hook_id, last=False)


class _Traced(torch.autograd.Function):
    """In compiled code: an edge of its own, so that the gradient through this module alone fires the tap.

    Not a tensor hook: for one on a tensor inside of a graph, Dynamo of torch 2.11 moves all that the hook uses behind
    that tensor. A module called twice would use its token before it is there.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, given: torch.Tensor | None, reads: bool, *firing: Any) -> torch.Tensor:
        ctx.firing, ctx.reads, ctx.reads_input = firing, reads, given is not None
        kept = ([tensor] if reads else []) + ([] if given is None else [given])
        if kept:
            ctx.save_for_backward(*kept)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        fire_op, token, number = ctx.firing
        if ctx.reads_input:
            fire_op(token, grad, number, ctx.saved_tensors[0] if ctx.reads else None, ctx.saved_tensors[-1])
        elif ctx.reads:
            fire_op(token, grad, number, ctx.saved_tensors[0])
        else:
            fire_op(token, grad, number)
        return grad, None, None, None, None, None


class _ForwardHook(Hook):
    def __init__(self, tap: Any):
        super().__init__(tap)
        # For compiled code, which can't look into a native object: the tap is a number, and the op that fires it must
        # change a tensor from outside the graph, or it would be dropped as unused.
        self.output, self.number, self.fire_op, self.token = tap.output, tap.number, fire_op(tap), torch.zeros(1)
        self.reads = bool(tap.reads_outputs)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._trace(output)
        return self.tap.forward(args, output)

    def _trace(self, output: Any, given: torch.Tensor | None = None) -> Any:
        """The compiled path: an identity whose backward calls a registered op."""
        tensor, key = select_output(output, self.output)
        if tensor is None or not tensor.requires_grad:
            return None
        firing = self.fire_op, self.token, self.number
        traced = _Traced.apply(tensor, given, self.reads, *firing)  # type: ignore[no-untyped-call]
        return replace_output(output, key, traced)


class _LayerHook(_ForwardHook):
    """Of a tap that keeps something of what its layer is given, by place or by name."""

    def __call__(self, module: nn.Module, args: Any, *more: Any) -> Any:
        kwargs, output = more
        if torch.compiler.is_compiling():
            return self._trace(output, the_input("capture", args, kwargs))
        return self.tap.forward_of_layer(args, kwargs, output)


class InputHook(_ForwardHook):
    """Before a module: its tap gets the input, as it is behind all pre-hooks that were there before this one."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        by_name = isinstance(self.output, str) or (self.output is None and select_output(args, None)[0] is None)
        given = kwargs if by_name and kwargs else args
        if torch.compiler.is_compiling():
            replaced = self._trace(given)
        else:
            self.tap.forward_pre()
            replaced = self.tap.forward((), given)
        if replaced is None:
            return None
        return (replaced, kwargs) if given is args else (args, replaced)


class _NativePreHook(ForwardPreHook):
    """The same; `_C.call_natively` makes the interpreter call native code, and Dynamo still reads `__call__`."""


class _NativeForwardHook(_ForwardHook):
    """The same."""


class _NativeLayerPreHook(_LayerPreHook):
    """The same."""


class _NativeLayerHook(_LayerHook):
    """The same."""


class ModuleCall(Hook):
    """The call of a module on which no hook is but a tap's: what its `__call__` calls in place of `_call_impl`.

    PyTorch's path of hooks costs more than a tap does. A module looks for a compiled call first; this one calls the
    module and its tap natively, and goes PyTorch's way as soon as there is anything else. The hooks are registered all
    the same: others see them there, and add theirs. It isn't copied or pickled with the module, as PyTorch sees to.
    """

    def __init__(self, module: nn.Module, hook: Hook, before: Hook | None, native: Any, holders: int = 0):
        super().__init__(hook.tap)
        self.native = native.ModuleCall(module, hook, before, holders)
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As Dynamo reads it; called by the interpreter it runs natively."""
        module: Any = self._module()
        return module._call_impl(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the module has no compiled call."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def rest(self, module: nn.Module, args: Any, kwargs: Any, result: Any, error: Exception | None) -> Any:
        """What is left of `_call_impl` where others have registered forward hooks while the module ran."""
        hooks = {**_global_forward_hooks, **module._forward_hooks}
        with_kwargs = {**_global_forward_hooks_with_kwargs, **module._forward_hooks_with_kwargs}
        always = {**_global_forward_hooks_always_called, **module._forward_hooks_always_called}
        called = set()

        def call(hook_id: int) -> Any:
            called.add(hook_id)
            given = (args, kwargs) if hook_id in with_kwargs else (args,)
            other = hooks[hook_id](module, *given, result)
            return result if other is None else other

        def call_silently(hook_id: int) -> Any:
            try:
                return call(hook_id)
            except Exception as silenced:
                text = "module forward hook with ``always_call=True`` raised an exception that was silenced as another "
                warnings.warn(f"{text}error was raised in forward: {silenced}", stacklevel=3)
                return result

        try:
            if error is not None:
                raise error
            for hook_id in hooks:
                result = call(hook_id)
            return result
        except Exception:
            for hook_id in [one for one in hooks if one in always and one not in called]:
                result = call_silently(hook_id)
            raise


class CallHandle:
    """Takes such a call from its module. It doesn't hold it: see `_C.ModuleCall`."""

    def __init__(self, module: nn.Module, call: ModuleCall):
        self._module, self._call = weakref.ref(module), weakref.ref(call)

    def remove(self) -> None:
        """Take it away; somebody's compiled call in its place stays."""
        module, call = self._module(), self._call()
        if module is not None and call is not None and vars(module).get(_CALL) is call:
            del module.__dict__[_CALL]


_CALL = "_compiled_call_impl"


def call_natively(module: nn.Module, hook: Hook, before: Hook | None, native: Any) -> list[Any]:
    """Let a module with these hooks be called natively as long as there are no others; a handle takes it back."""
    if vars(module).get(_CALL) is not None or not hasattr(nn.Module, _CALL):
        return []
    call = module.__dict__[_CALL] = ModuleCall(module, hook, before, native)
    return [CallHandle(module, call)]


def fires_at_output(args: Any, output: Any) -> bool:
    """Whether a full backward hook of a module fires at its output, with a warning of PyTorch's.

    There is a gradient in the output, and in nothing that the module was given, as PyTorch looks for it: a tensor in a
    tuple or by keyword counts for none.
    """
    if not torch.is_grad_enabled() or any(isinstance(one, torch.Tensor) and one.requires_grad for one in args):
        return False
    items = output if isinstance(output, tuple) else (output,)
    return any(isinstance(one, torch.Tensor) and one.requires_grad for one in items)


def behind_full_hook(module: nn.Module, hooks: list[Any], args: Any, output: Any, *more: torch.Tensor) -> Any:
    """The output of such a module behind full backward hooks, as PyTorch puts it there.

    All tensors of a tuple go through one node, which leads to ``more``, too.
    """
    full = BackwardHook(module, hooks, [])
    full.setup_input_hook(args)
    items = output if isinstance(output, tuple) else (output,)
    behind = full.setup_output_hook((*items, *more))[: len(items)]
    if not isinstance(output, tuple):
        return behind[0]
    return behind if type(output) is tuple else type(output)(*behind)


class CacheHook(Hook):
    """The forward hook of a tap that caches; it isn't for compiled code."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        backwards = self.tap.backwards
        if not backwards.runs_here:
            return None
        if backwards.anchor is None or not fires_at_output(args, output):
            return self.tap.forward(args, output)
        run = backwards.run
        self.tap.forward_pre()
        with torch.no_grad():  # to keep the output, and to attach nowhere
            self.tap.forward((), output)

        def full(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            if backwards.run == run:
                self.tap.full(grad_output[:-1])

        return behind_full_hook(module, [full], args, output, backwards.anchor)


class _NativeCacheHook(CacheHook):
    """The same, called natively where the module puts out the one tensor that it was given."""


class _CheckInputsHook(Hook):
    """Before a full hook wraps the inputs: can it?"""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            check_full_hook(f"capture at {self.tap.name}", "an input", args)


class _CheckHook(Hook):
    """Before a full hook wraps the output: can it, and can the output have a gradient at all?"""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self.tap.check_full(output)
        if not torch.compiler.is_compiling():
            outputs = output if isinstance(output, tuple) else (output,)
            check_full_hook(f"capture at {self.tap.name}", "the output", outputs)


# Dynamo traces these where they lie inside a graph, and is kept from compiling them as frames of their own: a hook that
# runs outside of all graphs, on the output of the whole compiled module, has to attach as in eager code. (A graph of
# its own would return a view of its input, for which AOTAutograd drops the tensor hook.)
for _hook in (ForwardPreHook, _ForwardHook, _LayerHook, InputHook, CacheHook, _CheckInputsHook, _CheckHook, FullHook):
    set_code_exec_strategy(_hook.__call__.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


@lru_cache(maxsize=1)
def _learn_references(native: Any) -> None:
    """Let the native hooks learn how often an output is referenced that nobody else holds.

    Only such an output's own node may be hooked: whoever else holds the tensor can send it gradients that did not pass
    through the module, as a penalty that the module keeps for itself does.
    """

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    probe = Doubled()
    tap = native.Tap(native.Backwards(native.Ledger(1), "raise"), "probe", native.ColumnsKeeper([]), None)
    tap.learn_references()
    hook = _NativeForwardHook(tap)
    probe.register_forward_hook(hook)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        probe(x)
        call_natively(probe, hook, None, native)
        probe(x)


def _prepare(native: Any) -> None:
    """Make the native hooks native; without what is learnt here, every output gets an identity node."""
    native.call_natively(_NativePreHook, _NativeForwardHook)
    native.call_natively(_NativeLayerPreHook, _NativeLayerHook)
    native.call_natively(_NativePreHook, _NativeCacheHook)
    native.call_modules_natively(ModuleCall)
    if not _global_forward_hooks:  # one that keeps what it sees would be taken for nobody
        _learn_references(native)


def hook_module(module: nn.Module, tap: Any, attach: str, backend: Backend) -> list[Any]:
    """Register a tap's hooks on a module; the handles remove them.

    "auto" is "tensor": it is equal to "full" wherever both exist, and works where full hooks don't (in-place
    operations, mapping outputs).
    """
    native = backend.NAME == "native"
    if native:
        _prepare(backend)
        if attach == "full":  # at whose nodes all is done that is done here otherwise
            return [TakenNative(), module.register_full_backward_hook(NativeFullHook(tap))]
    if tap.reads_inputs:
        pre: ForwardPreHook = _NativeLayerPreHook(tap) if native else _LayerPreHook(tap)
    else:
        pre = _NativePreHook(tap) if native else ForwardPreHook(tap)
    handles = [module.register_forward_pre_hook(pre)]
    if attach == "full":
        handles.append(module.register_forward_hook(_CheckHook(tap)))
        handles.append(module.register_forward_pre_hook(_CheckInputsHook(tap)))
        handles.append(module.register_full_backward_hook(FullHook(tap)))
    elif tap.reads_inputs:
        hook: _ForwardHook = _NativeLayerHook(tap) if native else _LayerHook(tap)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    else:
        hook = _NativeForwardHook(tap) if native else _ForwardHook(tap)
        handles.append(module.register_forward_hook(hook))
    pre.hook_id = handles[1].id
    if native:
        handles[:0] = call_natively(module, hook, pre, backend)
    return handles


def hook_input(module: nn.Module, tap: Any) -> list[Any]:
    """Register a tap's hook before a module; its handle removes it."""
    return [module.register_forward_pre_hook(InputHook(tap), with_kwargs=True)]


class CachingHooks:
    """The hooks of a caching tap on its module; `remove` takes it off.

    A run hooks every point of a model and unhooks it again. Registering hooks one by one costs more than what they do,
    so all of a run's hooks stand under the one ``id`` of a handle that was made for it. There is no pre-hook that keeps
    this one the last: it is registered when the run begins, behind all that are there. And the hook counts the call.
    """

    __slots__ = ("hook", "id", "module")

    def __init__(self, hook: CacheHook, handle_id: int):
        self.hook, self.id = hook, handle_id
        self.module: nn.Module | None = None  # while it is on one

    def register(self, module: nn.Module) -> None:
        """Stand behind the hooks that are there."""
        self.module = module
        module._forward_hooks[self.id] = self.hook

    def remove(self) -> None:
        if self.module is not None:
            self.module._forward_hooks.pop(self.id, None)
            self.module = None


def caching_hook(tap: Any, backend: Backend) -> CacheHook:
    """The forward hook of a tap that caches."""
    return _NativeCacheHook(tap) if backend.NAME == "native" else CacheHook(tap)


def caching_id(backend: Any) -> int:
    """The id under which a run's hooks stand."""
    if backend.NAME == "native":
        _prepare(backend)
    handle: int = RemovableHandle(OrderedDict()).id
    return handle


def check_not_compiled(who: str, model: nn.Module) -> None:
    """RuntimeError if a compiled call of the model exists already: hooks added now would silently never fire."""
    if "torch._dynamo" not in sys.modules:  # nothing was ever compiled, and the import would cost a second
        return
    from torch._dynamo import eval_frame

    for name, module in model.named_modules():
        compiled = isinstance(module, eval_frame.OptimizedModule) or not isinstance(
            module._compiled_call_impl, ModuleCall | None
        )
        inner = getattr(module, "_orig_mod", module)
        if compiled and _has_compiled_code(inner):
            raise RuntimeError(
                broken_rule(
                    who, "a compiled model", "be captured before its first call", f"{name or type(inner).__name__}",
                    "Enter the capture first, or call torch._dynamo.reset().",
                )
            )  # fmt: skip


def anything_compiled() -> bool:
    """Whether Dynamo has compiled any code since its last reset; which modules it holds can't be seen."""
    if "torch._dynamo" not in sys.modules:
        return False
    from torch._dynamo import convert_frame

    return any(code() is not None for code in convert_frame.input_codes.seen)


def _has_compiled_code(module: nn.Module) -> bool:
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    functions = [type(module).forward, type(module)._call_impl, type(module)._wrapped_call_impl]
    return any(_debug_get_cache_entry_list(f.__code__) for f in functions if hasattr(f, "__code__"))
