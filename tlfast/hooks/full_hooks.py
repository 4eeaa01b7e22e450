"""PyTorch's full backward hooks, run natively: for one module, for a model, or for the whole process.

A module looks for `torch.utils.hooks.BackwardHook` in the namespace of `torch.nn.modules.module` whenever it is called
with such hooks. While anybody wants native ones, something else stands under that name. So PyTorch keeps the hooks:
their registration, order, handles, copies and pickles are its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import BackwardHook, RemovableHandle

from ..backends.backwards import refuse_compiled_autograd
from ..backends.choice import native
from ..backends.plain import check_full_hook
from ..errors import broken_rule
from .inert import Hook
from .patches import Patch, Patches

BackwardHooks = Callable[[nn.Module, Any, Any], Any]
BackwardPreHooks = Callable[[nn.Module, Any], Any]


class FullHook(Hook):
    """A capture's own full backward hook."""

    def __call__(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        refuse_compiled_autograd()
        self.tap.full(grad_output)


class NativeFullHook(FullHook):
    """The same. Native code looks for its tap, and it is called only where the hooks are PyTorch's own."""


class CheckedBackwardHook(BackwardHook):
    """PyTorch's own, where hooks of captures are among them: can it take these inputs and outputs?"""

    def _taps(self) -> Iterator[Any]:
        return (hook.tap for hook in self.user_hooks if isinstance(hook, NativeFullHook))

    def setup_input_hook(self, args: Any) -> Any:
        for tap in self._taps():
            tap.forward_pre()
            check_full_hook(f"capture at {tap.name}", "an input", args)
        return super().setup_input_hook(args)  # type: ignore[no-untyped-call]

    def setup_output_hook(self, args: Any) -> Any:
        for tap in self._taps() if torch.is_grad_enabled() else ():
            tap.check_full(args)
            check_full_hook(f"capture at {tap.name}", "the output", args if isinstance(args, tuple) else (args,))
        return super().setup_output_hook(args)  # type: ignore[no-untyped-call]


class _Chooser:
    """Stands under the name BackwardHook. Called, it is native and makes hooks of ours, or PyTorch's.

    Dynamo reads this Python.
    """

    def __call__(self, module: nn.Module, hooks: list[Any], pre_hooks: list[Any]) -> Any:
        return BackwardHook(module, hooks, pre_hooks)


class _NativeHooks(Patches):
    """For which modules hooks are native: by themselves, or by their class."""

    def changed(self) -> None:
        native_code = native()
        if native_code is not None:
            native_code.choose_for(self._everywhere > 0, self._only)


_in_force = _NativeHooks()


@lru_cache(maxsize=1)
def _chooser() -> _Chooser | None:
    """What makes native hooks, or None where there is no native code."""
    native_code = native()
    if native_code is None:
        return None
    native_code.choose_natively(_Chooser, NativeFullHook, BackwardHook, CheckedBackwardHook)
    return _Chooser()


def _replacements() -> list[Patch]:
    chooser = _chooser()
    return [] if chooser is None else [(torch_module, "BackwardHook", chooser)]


def enter(owners: Sequence[object] | None) -> None:
    """One more wants native hooks: for these modules, for those of these classes, or, under None, for all."""
    _in_force.enter(_replacements, owners)
    _learn()


def leave(owners: Sequence[object] | None) -> None:
    """One fewer; after the last PyTorch is as it was."""
    _in_force.leave(owners)


@lru_cache(maxsize=1)
def _learn() -> None:
    """Let native hooks learn how often an input and an output are referenced that nobody else holds.

    Only such an output may be changed in place behind a hook, and only such an input later than by the module: known by
    another name, they would lose the change there.
    """
    native_code = native()
    if native_code is None or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    probe = Doubled()
    probe.register_full_backward_hook(_does_nothing)
    _in_force.enter(_replacements, [probe])
    native_code.learn_outputs(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            probe(torch.zeros(1, requires_grad=True) * 1)
    finally:
        native_code.learn_outputs(False)
        leave([probe])


def _does_nothing(*_: object) -> None:
    pass


class TakenNative:
    """Keeps hooks of captures native as long as they are registered: a handle among the others of a tap."""

    def __init__(self) -> None:
        enter([])

    def remove(self) -> None:
        leave([])


def _check(who: str, module: object, hook: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(broken_rule(who, "module", "be an nn.Module", type(module).__name__, "Pass the module."))
    if not callable(hook):
        raise TypeError(broken_rule(who, "hook", "be callable", type(hook).__name__, "Pass a function."))


_marked: set[int] = set()  # the ids of modules that live


def _mark(module: nn.Module) -> None:
    """Let a module's hooks be native as long as it lives. Hooks come and go: it is marked once."""
    if id(module) in _marked:
        return
    _marked.add(id(module))
    enter([module])
    weakref.finalize(module, _forget, id(module)).atexit = False


def _forget(module_id: int) -> None:
    _marked.discard(module_id)
    _in_force.leave_by_id(module_id)


def register_full_backward_hook(module: nn.Module, hook: BackwardHooks, prepend: bool = False) -> RemovableHandle:
    """Register a full backward hook that PyTorch calls by native code: ``module.register_full_backward_hook``, faster.

    Args:
        module: where it is registered. From then on all of the module's full backward hooks are called natively.
        hook: ``hook(module, grad_input, grad_output)``, called when the gradients with respect to the module's inputs
            are there. Both are tuples, with None for what is no tensor or needs no gradient. It returns None, or a
            tuple that takes the place of ``grad_input``.
        prepend: call it before the module's other full backward hooks.

    Returns:
        A handle; ``handle.remove()`` takes the hook off.

    Raises:
        RuntimeError: if the module has backward hooks of the old kind.
        TypeError: if ``module`` is no module or ``hook`` can't be called.

    Example:
        >>> import torch, tlfast
        >>> layer, x = torch.nn.Linear(2, 3), torch.ones(4, 2, requires_grad=True)
        >>> def no_gradient(module, grad_input, grad_output):
        ...     return (grad_input[0] * 0,)
        >>> handle = tlfast.register_full_backward_hook(layer, no_gradient)
        >>> layer(x).sum().backward()
        >>> handle.remove()
        >>> x.grad.count_nonzero()
        tensor(0)
    """
    _check("register_full_backward_hook", module, hook)
    handle = module.register_full_backward_hook(hook, prepend=prepend)
    _mark(module)
    return handle


def register_full_backward_pre_hook(
    module: nn.Module, hook: BackwardPreHooks, prepend: bool = False
) -> RemovableHandle:
    """Register ``hook(module, grad_output)``: ``module.register_full_backward_pre_hook``, called by native code.

    Args:
        module: where it is registered. From then on all of the module's full backward hooks are called natively.
        hook: called when the gradients with respect to the module's outputs are there. It returns None, or a tuple
            that takes their place.
        prepend: call it before the module's other full backward pre-hooks.

    Returns:
        A handle; ``handle.remove()`` takes the hook off.

    Raises:
        TypeError: if ``module`` is no module or ``hook`` can't be called.

    Example:
        >>> import torch, tlfast
        >>> layer, x = torch.nn.Identity(), torch.ones(2, requires_grad=True)
        >>> handle = tlfast.register_full_backward_pre_hook(layer, lambda module, grads: (2 * grads[0],))
        >>> layer(x).sum().backward()
        >>> x.grad
        tensor([2., 2.])
    """
    _check("register_full_backward_pre_hook", module, hook)
    handle = module.register_full_backward_pre_hook(hook, prepend=prepend)
    _mark(module)
    return handle


def hooks_installed() -> bool:
    """Whether `install_hooks` is in force."""
    return _in_force.everywhere()


def install_hooks() -> None:
    """Let every full backward hook of this process be called by native code, from now on, until `uninstall_hooks`.

    Whoever registered them, and when: the hooks of other libraries get faster without a change of theirs. Calls are
    counted: it is in force until as many calls of `uninstall_hooks`. Where there is no native code, nothing changes.

    Example:
        >>> import tlfast
        >>> tlfast.install_hooks()
        >>> tlfast.uninstall_hooks()
    """
    enter(None)


def uninstall_hooks() -> None:
    """Take back one `install_hooks`. With the last PyTorch is as it was; without any nothing happens.

    Example:
        >>> import tlfast
        >>> tlfast.install_hooks()
        >>> tlfast.uninstall_hooks()
    """
    if hooks_installed():
        leave(None)


@contextmanager
def accelerate_hooks(model: nn.Module | None = None) -> Iterator[None]:
    """Let full backward hooks be called by native code inside the context.

    Args:
        model: for the hooks of its modules alone, those that are in it now; None means every module of the process.

    Raises:
        TypeError: if ``model`` is no module.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
        >>> with tlfast.accelerate_hooks(model):
        ...     handle = model[1].register_full_backward_hook(lambda *_: None)
        ...     model(torch.ones(4, 2)).sum().backward()
        >>> handle.remove()
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            broken_rule("accelerate_hooks", "model", "be an nn.Module", type(model).__name__, "Pass it, or nothing.")
        )
    modules = None if model is None else list(model.modules())
    enter(modules)
    try:
        yield
    finally:
        leave(modules)
