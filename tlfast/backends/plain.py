"""Plain memory: what every gradient, mask and destination is made, or must be, before its data is read."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ..errors import broken_rule

GRADIENT, OUTPUT, INPUT = "the gradient", "the output", "the input"
SIDES = {"output": OUTPUT, "input": INPUT}
_NO_CLASS = (torch.Tensor, nn.Parameter)


def _keys_of_plain_memory() -> int:
    """The dispatch keys that a dense tensor with memory of its own may have, on any device."""
    keys = torch._C.DispatchKey
    names = ["Dense", "ADInplaceOrView", "AutogradFunctionality", "AutogradOther"]
    names += [name for name in dir(keys) if name.startswith("Autocast")]
    devices = [name.removeprefix("Quantized") for name in dir(keys) if name.startswith("Quantized")]
    names += [name for name in devices if name]
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(keys, name)).raw_repr()
    return bits


# A list of what is plain, not of what isn't: a kind of tensor that nobody thought of is refused.
_OTHER_KEYS = ~_keys_of_plain_memory()
_BATCHED = "Batched"  # the vmap of autograd.grad(is_grads_batched=True)


def _has_other_keys(tensor: torch.Tensor) -> bool:
    return bool(torch._C._dispatch_keys(tensor).raw_repr() & _OTHER_KEYS)


def plain(who: str, argument: str, given: torch.Tensor) -> torch.Tensor:
    """Return what ``given`` means as a `torch.Tensor` of plain strided memory: ``given`` itself, wherever it is that.

    A ZeroTensor is filled, a lazy negation or conjugation is done, and of a DTensor that lies whole on this rank the
    local tensor is taken. The native code comes here too with whatever isn't plain.

    Raises:
        ValueError: for another layout than a dense one.
        RuntimeError: for what has no memory, or not the whole value in it.
    """
    as_it_is = _if_plain(who, argument, given)
    if as_it_is is not None:
        return as_it_is
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        local = _local_tensor(who, argument, given)
        if local is None and type(given) not in _NO_CLASS and _has_memory(given):
            local = _without_class(given)
        if local is not None:
            return plain(who, argument, local)
        if given._is_zerotensor():
            return torch.zeros(given.shape, dtype=given.dtype, device=given.device)
        if given.is_neg() or given.is_conj():
            return given.resolve_conj().resolve_neg()
    got = f"a {type(given).__name__}, which wraps others"
    at_point = argument in (OUTPUT, INPUT, GRADIENT)
    remedy = "Capture a point whose output is a plain tensor." if at_point else "Pass a plain tensor."
    raise RuntimeError(_no_memory(who, argument, got, remedy))


def destination(who: str, argument: str, given: torch.Tensor) -> torch.Tensor:
    """Return ``given`` as plain memory that may be written to; errors as of `plain`.

    Nothing is resolved: what is written to the resolved copy would be lost.
    """
    as_it_is = _if_plain(who, argument, given)
    if as_it_is is not None:
        return as_it_is
    with torch._C.DisableTorchFunctionSubclass():
        is_lazy = given.is_neg() or given.is_conj()
        lazy = {"a ZeroTensor": given._is_zerotensor(), "a lazy view": is_lazy}
    got = next((kind for kind, is_it in lazy.items() if is_it), f"a {type(given).__name__}")
    raise RuntimeError(_no_memory(who, argument, got, "Pass a plain tensor."))


def check_output(who: str, side: str, output: torch.Tensor) -> None:
    """Check what can be told of an output, or an input, before there is a gradient; errors as of `plain`."""
    if _has_other_keys(output):
        _check_dense(who, side, output)


def check_full_hook(who: str, argument: str, values: Iterable[object]) -> None:
    """Check that PyTorch's full backward hook can wrap these inputs or outputs; errors as of `plain`.

    It sends all of them through an autograd function, which has no rule for transforms and tangents.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return
    for tensor in tensors:
        if (tensor.is_nested and tensor.layout == torch.strided) or _is_transformed(tensor):
            _check_dense(who, argument, tensor)
        if forward_ad.unpack_dual(tensor).tangent is not None:
            rule, got = 'carry no tangent with attach="full"', "one of forward-mode AD"
            raise RuntimeError(broken_rule(who, argument, rule, got, 'Use attach="tensor".'))


def _is_transformed(tensor: torch.Tensor) -> bool:
    batched = torch._C._dispatch_keys(tensor).has(_BATCHED)
    return batched or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _if_plain(who: str, argument: str, given: torch.Tensor) -> torch.Tensor | None:
    """``given``, as `torch.Tensor`, if it is plain; None where it may be made so, an error where it can't."""
    if torch.compiler.is_compiling():  # Dynamo knows no keys; what it compiles calls the op, which looks for itself
        return given
    if type(given) in _NO_CLASS and not _has_other_keys(given):
        return given
    if not isinstance(given, torch.Tensor):
        raise TypeError(broken_rule(who, argument, "be a tensor", type(given).__name__, "Pass a plain one."))
    if not _has_other_keys(given):
        return _without_class(given)
    _check_dense(who, argument, given)
    return None


def _no_memory(who: str, argument: str, got: str, remedy: str) -> str:
    return broken_rule(who, argument, "be a tensor with memory of its own", got, remedy)


def _check_dense(who: str, argument: str, given: torch.Tensor) -> None:
    """An error for tensors of transforms, and for layouts that have no strides."""
    with torch._C.DisableTorchFunctionSubclass():
        _refuse_layout(who, argument, given)


def _refuse_layout(who: str, argument: str, given: torch.Tensor) -> None:
    if _is_transformed(given):
        got, remedy = "one inside a torch.func transform", "Use loss.backward() or torch.autograd.grad instead."
        if argument == GRADIENT:
            got = "one of a batch of gradients (is_grads_batched=True or vectorize=True)"
            remedy = "Run one backward for each of them."
        raise RuntimeError(_no_memory(who, argument, got, remedy))
    at_point = argument in (OUTPUT, INPUT, GRADIENT)
    if given.is_nested:
        remedy = "Capture a point whose output is padded" if at_point else "Pad it"
        got, remedy = f"a nested tensor of layout {given.layout}", f"{remedy} (to_padded_tensor)."
    elif given.is_quantized:
        got, remedy = "a quantized tensor", "Capture a point before it." if at_point else "Dequantize it."
    elif given.layout != torch.strided:
        sparse = given.layout in (torch.sparse_coo, torch.sparse_csr)
        got, remedy = str(given.layout), "Use to_dense()."
        if sparse and argument in (GRADIENT, "grad"):
            remedy = "Turn sparse=True off in the embedding."
    else:
        return
    raise ValueError(broken_rule(who, argument, "be dense", got, remedy))


def _local_tensor(who: str, argument: str, given: torch.Tensor) -> torch.Tensor | None:
    """What a DTensor has on this rank, where that is all of it; None for any other tensor."""
    pending = sys.modules.get("torch.distributed._functional_collectives")
    if pending is not None and isinstance(given, pending.AsyncCollectiveTensor):
        arrived: torch.Tensor = given.trigger_wait()
        return arrived
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None or not isinstance(given, distributed.DTensor):
        return None
    shared: Any = given
    mesh = shared.device_mesh
    whole = [p.is_replicate() or mesh.size(dim) == 1 for dim, p in enumerate(shared.placements)]
    if not all(whole):
        got = f"a DTensor with placements {tuple(shared.placements)} over {mesh.size()} ranks"
        remedy = f"Pass {argument}.to_local(), or redistribute it."
        if argument in (OUTPUT, INPUT, GRADIENT):
            remedy = "Capture a point with a local output (use_local_output=True), or a replicated one."
        raise RuntimeError(broken_rule(who, argument, "lie whole on this rank", got, remedy))
    local: torch.Tensor = shared.to_local()
    return local


def _has_memory(given: torch.Tensor) -> bool:
    """Whether a tensor whose class takes over dispatch has memory all the same."""
    try:
        return given.layout == torch.strided and not given.is_meta and (given.data_ptr() != 0 or not given.numel())
    except RuntimeError:  # a fake tensor
        return False


def _without_class(given: torch.Tensor) -> torch.Tensor:
    """The same memory as a `torch.Tensor`, whose methods nobody has overridden."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        return given.detach()
