"""Programs drawn at random tell the same with native full backward hooks as with PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from told_hooks import Told, same
from torch import nn
from torch.nn.modules import module as torch_module

import tlfast
from tlfast.backends.choice import loaded

pytestmark = pytest.mark.sanitize
needs_native = pytest.mark.skipif(loaded() is None, reason="no native code")


class Made(nn.Module):
    """A module of one function; `weight` is there for some of them to use."""

    def __init__(self, function: Callable[..., Any], frozen: bool = False) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(3) + 0.5, requires_grad=not frozen)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@torch.no_grad()
def without_grad(module: Any, x: Any) -> Any:
    return x * module.weight


def changed_inside(module: Any, x: Any) -> Any:
    y = x * module.weight
    y.mul_(2)
    y[:1].add_(x[:1].detach())
    return y


def keeping(module: Any, x: Any) -> Any:
    module.kept = x * module.weight
    return module.kept


# What a module computes of x. Each is called by `CALLS` of the same name, or with x alone.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "product": lambda module, x: x * module.weight,
    "tanh": lambda module, x: x.tanh(),
    "identity": lambda module, x: x,
    "in a tuple": lambda module, x: (x * module.weight,),
    "in a list": lambda module, x: [x * module.weight],
    "in a mapping": lambda module, x: {"y": x * module.weight},
    "a constant": lambda module, x: torch.ones(2, 3),
    "parameter": lambda module, x: module.weight,
    "no output": lambda module, x: None,
    "detached": lambda module, x: x.detach() * module.weight,
    "without grad": without_grad,
    "view": lambda module, x: x.view(-1)[:3] * 1,
    "of a view": lambda module, x: x.t().t(),
    "changed inside": changed_inside,
    "kept": keeping,
    "numbers": lambda module, x: (x.argmax(), x * module.weight),
    "input twice": lambda module, x, y: (x, y * module.weight, x),
    "two": lambda module, x, y: (x * y.mean(), None, "text", y * module.weight),
    "nothing of the second": lambda module, x, y: x * module.weight,
    "with None": lambda module, x, y: (x * 2, y),
    "keyword": lambda module, x, *, y: x * y,
    "only keyword": lambda module, *, x: x * module.weight,
    "wide": lambda module, *xs: xs,
}
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "input twice": lambda module, x, other: module(x, x),
    "two": lambda module, x, other: module(x, other),
    "nothing of the second": lambda module, x, other: module(other, x),
    "with None": lambda module, x, other: module(x, None),
    "keyword": lambda module, x, other: module(x, y=other),
    "only keyword": lambda module, x, other: module(x=x),
    "wide": lambda module, x, other: module(x, 3, other, other.detach(), [x]),
}


def tensors_in(out: Any) -> list[torch.Tensor]:
    items = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else [out]
    return [item for item in items if isinstance(item, torch.Tensor) and item.is_floating_point()]


class Model(nn.Module):
    """Calls its modules one after the other; those at `inner` call the one before them once more, inside."""

    def __init__(self, plan: list[tuple[str, bool, int, bool]], use: int) -> None:
        super().__init__()
        self.plan, self.use = plan, use
        self.parts = nn.ModuleList(Made(FUNCTIONS[kind], frozen) for kind, frozen, _, _ in plan)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        total = x.new_zeros(())
        for (kind, _, times, before), part in zip(self.plan, self.parts, strict=True):
            call = CALLS.get(kind, lambda module, x, other: module(x))
            for time in range(times):
                outs = tensors_in(call(part, x * 1 if before else x, other))
                used = [out for index, out in enumerate(outs) if self.use >> (index + time) & 1]
                for out in used:
                    total = total + out.square().sum() / 8
                x = next((out for out in outs[::-1] if out.shape == x.shape), x)
        return total + x.sum()


RETURNS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "nothing": lambda grads: None,
    "twice": lambda grads: tuple(grad if grad is None else grad * 2 for grad in grads),
    "the same": lambda grads: grads,
    "a list": lambda grads: [grad if grad is None else grad + 1 for grad in grads],
    "None for each": lambda grads: (None,) * len(grads),
    "None for the first": lambda grads: (None, *grads[1:]),
    "too few": lambda grads: grads[1:],
    "too many": lambda grads: (*grads, None),
    "a number": lambda grads: 3,
    "numbers": lambda grads: (3.0,) * len(grads),
    "other shapes": lambda grads: tuple(grad if grad is None else grad.flatten()[:2] for grad in grads),
    "other types": lambda grads: tuple(grad if grad is None else grad.double() for grad in grads),
    "broadcast": lambda grads: tuple(grad if grad is None else grad.sum() for grad in grads),
    "a tensor": lambda grads: next((grad for grad in grads if grad is not None), None),
    "for each": lambda grads: tuple(torch.ones(2, 3) for _ in grads),
    "an error": lambda grads: 1 / 0,
}
WHERE = ("full", "pre", "everywhere", "everywhere pre")


def register(seen: Told, module: nn.Module, plan: Any, name: str, handles: list[Any]) -> Any:
    """Register a hook that does what the plan says."""
    where, returns, prepend, then = plan[1:]

    def does(grads: Any) -> Any:
        if then == "removes itself":
            handle.remove()
        elif then == "removes the first":
            handles[0].remove()
        elif then == "adds another":
            handles.append(module.register_full_backward_hook(seen.hook(name + " added")))
        return RETURNS[returns](grads)

    make = seen.pre_hook(name, does) if "pre" in where else seen.hook(name, lambda grads, _: does(grads))
    if where == "full":
        handle = module.register_full_backward_hook(make, prepend=prepend)
    elif where == "pre":
        handle = module.register_full_backward_pre_hook(make, prepend=prepend)
    elif where == "everywhere":
        handle = torch_module.register_module_full_backward_hook(make)
    else:
        handle = torch_module.register_module_full_backward_pre_hook(make)
    handles.append(handle)
    return handle


def go_back(kind: str, loss: torch.Tensor, model: Model, x: torch.Tensor, other: torch.Tensor) -> Any:
    leaves = [leaf for leaf in (x, other, *model.parameters()) if leaf.requires_grad]
    if kind == "twice":
        loss.backward(retain_graph=True)
        return loss.backward()
    if kind == "some":
        return torch.autograd.grad(loss, leaves[-1:], allow_unused=True)
    if kind == "first":
        return torch.autograd.grad(loss, leaves[:1], allow_unused=True)
    if kind == "again":
        grads = [
            grad for grad in torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True) if grad is not None
        ]
        torch.stack([grad.square().sum() for grad in grads]).sum().backward()
        return [grad.detach() for grad in grads]
    return loss.backward(inputs=leaves[:2]) if kind == "inputs" else loss.backward()


part = st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.booleans(), st.integers(1, 2), st.booleans())
hook = st.tuples(
    st.integers(0, 3),
    st.sampled_from(WHERE[:2] * 3 + WHERE),
    st.sampled_from(["nothing"] * 4 + ["twice"] * 2 + sorted(RETURNS)),
    st.booleans(),
    st.sampled_from(["goes on"] * 4 + ["removes itself", "removes the first", "adds another"]),
)
programs = st.fixed_dictionaries(
    {
        "parts": st.lists(part, min_size=1, max_size=3),
        "hooks": st.lists(hook, min_size=1, max_size=4),
        "back": st.sampled_from(["plain", "twice", "some", "first", "again", "inputs"]),
        "use": st.integers(0, 7),
        "grads": st.tuples(st.booleans(), st.booleans()),
        "steps": st.integers(1, 2),
    }
)


def program(plan: dict[str, Any]) -> Callable[[Told], Any]:
    def run(seen: Told) -> Any:
        model = Model(plan["parts"], plan["use"])
        modules = [model, *model.parts]
        x, other = (torch.rand(2, 3).requires_grad_(needed) for needed in plan["grads"])
        handles: list[Any] = []
        with ExitStack() as stack:
            stack.callback(lambda: [handle.remove() for handle in handles])
            for number, one in enumerate(plan["hooks"]):
                register(seen, modules[one[0] % len(modules)], one, str(number), handles)
            try:
                for _ in range(plan["steps"]):
                    seen.result(go_back(plan["back"], model(x, other), model, x, other))
            finally:
                seen.result([leaf.grad for leaf in (x, other, *model.parameters())])

    return run


@needs_native
@given(programs)
@settings(max_examples=250)
def test_programs_tell_the_same(plan: dict[str, Any]) -> None:
    same(program(plan))


IN_PLACE: dict[str, Callable[..., Any]] = {
    "input": lambda module, x: x.mul_(2),
    "input, and more of it": lambda module, x: x.mul_(module.weight) + x.exp(),
    "a part of the input": lambda module, x: (x[:1].mul_(3), x * module.weight)[1],
    "not": lambda module, x: x * module.weight,
}


@needs_native
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(IN_PLACE)), st.sampled_from(["", "out", "a part", "input"])),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=60)
def test_in_place_gives_the_gradients_of_the_model_without_hooks(plan: list[tuple[str, str]], pre: bool) -> None:
    def grads(hooked: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parts = [Made(IN_PLACE[kind]) for kind, _ in plan]
        if hooked:
            for one in parts:
                one.register_full_backward_hook(lambda *_: None)
                if pre:
                    one.register_full_backward_pre_hook(lambda *_: None)
        start = torch.rand(2, 3, requires_grad=True)
        x = start * 1
        for (kind, after), one in zip(plan, parts, strict=True):
            before, x = x, one(x * 1 if after == "" else x)
            if kind == "input":
                x = x + 0  # an input that is returned must not be changed in place again
            if after == "out":
                x = x * 1
                x.mul_(3)
            elif after == "input":
                x = x + before
            elif after == "a part":
                x = x + 0
                x[1:].mul_(2)
        return list(torch.autograd.grad(x.sum(), [start, *(one.weight for one in parts)], allow_unused=True))

    plain = grads(False)
    with tlfast.accelerate_hooks():
        native = grads(True)
    for grad, want in zip(native, plain, strict=True):
        assert (grad is None) is (want is None)
        assert grad is None or torch.allclose(grad, want)
