"""Full backward hooks called by native code give what PyTorch's own give: calls, values, order, errors, warnings."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from told_hooks import Told, both, same, told
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import BackwardHook

import tlfast
from tlfast.backends.choice import loaded

pytestmark = pytest.mark.sanitize
needs_native = pytest.mark.skipif(loaded() is None, reason="no native code")


def is_native(node: Any) -> bool:
    """Whether a node is one of C++, and not of a Python autograd function."""
    return node.name() == "BackwardHookFunctionBackward" and type(node).__name__ != node.name()


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


class Pair(nn.Module):
    """Two outputs of two inputs, and what else a module may be given or put out."""

    def forward(self, x: Any, y: Any, *, factor: Any = 2.0) -> Any:
        return x * factor, "text", y.sin() if isinstance(y, torch.Tensor) else y


def test_a_hook_that_reads() -> None:
    def run(seen: Told) -> Any:
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        for name, module in model.named_modules():
            module.register_full_backward_hook(seen.hook(name))
        x = leaf(5, 4)
        model(x).square().sum().backward()
        return x.grad, *(param.grad for param in model.parameters())

    calls, result, error, caught = same(run)
    assert [call[0] for call in calls] == ["2", "1", "0", ""]
    assert result is not None
    assert error is None
    assert not caught


@needs_native
def test_that_it_is_native() -> None:
    layer, x = nn.Tanh(), leaf(3)
    layer.register_full_backward_hook(lambda *_: None)
    assert not is_native(layer(x).grad_fn)
    with tlfast.accelerate_hooks():
        assert is_native(layer(x).grad_fn)


@pytest.mark.parametrize(
    "returns", [lambda given, _: (3 * given[0],), lambda given, _: [2 * given[0]], lambda *_: (None,)]
)
def test_a_hook_that_returns(returns: Callable[..., Any]) -> None:
    def run(seen: Told) -> Any:
        layer, x = nn.Linear(3, 3), leaf(2, 3)
        layer.register_full_backward_hook(seen.hook("first", returns))
        layer.register_full_backward_hook(seen.hook("second"))
        layer(x * 1).sum().backward()
        return x.grad, layer.weight.grad

    same(run)


@pytest.mark.parametrize(
    "returns",
    [
        lambda *_: (),
        lambda given, _: (given[0], None),
        lambda *_: 3,
        lambda *_: (3,),
        lambda given, _: (given[0][:1],),
        lambda given, _: (given[0].double(),),
        lambda given, _: given[0],
        lambda *_: 1 / 0,
    ],
)
def test_a_hook_that_fails(returns: Callable[..., Any]) -> None:
    def run(seen: Told) -> Any:
        layer, x = nn.Linear(3, 3), leaf(2, 3)
        layer.register_full_backward_hook(seen.hook("failing", returns))
        layer.register_full_backward_hook(seen.hook("behind"))
        layer(x * 1).sum().backward()
        return x.grad

    assert same(run)[2] is not None


@pytest.mark.parametrize(
    "returns",
    [
        lambda grads: (grads[0] * 2,),
        lambda grads: [grads[0] * 2],
        lambda grads: (None,),
        lambda grads: (),
        lambda grads: (1,),
        lambda grads: 1 / 0,
    ],
)
@pytest.mark.parametrize("with_full", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_pre_hooks(returns: Callable[..., Any], with_full: bool, needs_grad: bool) -> None:
    def run(seen: Told) -> Any:
        layer, x = nn.Linear(3, 3), leaf(2, 3).requires_grad_(needs_grad)
        layer.register_full_backward_pre_hook(seen.pre_hook("pre", returns))
        layer.register_full_backward_pre_hook(seen.pre_hook("pre 0"), prepend=True)
        if with_full:
            layer.register_full_backward_hook(seen.hook("full"))
        layer(x * 1).sum().backward()
        return x.grad, layer.weight.grad

    same(run)


def test_order_and_prepend() -> None:
    def run(seen: Told) -> Any:
        layer = nn.Linear(3, 3)
        layer.register_full_backward_hook(seen.hook("a"))
        handle = layer.register_full_backward_hook(seen.hook("b"), prepend=True)
        layer.register_full_backward_hook(seen.hook("c"))
        layer.register_full_backward_pre_hook(seen.pre_hook("d"))
        everywhere = torch_module.register_module_full_backward_hook(seen.hook("everywhere"))
        before = torch_module.register_module_full_backward_pre_hook(seen.pre_hook("before"))
        try:
            x = leaf(2, 3)
            layer(x).sum().backward()
            handle.remove()
            layer(x).sum().backward()
        finally:
            everywhere.remove(), before.remove()
        return x.grad

    assert [call[0] for call in same(run)[0]][:6] == ["before", "d", "everywhere", "b", "a", "c"]


@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_several_inputs_and_outputs(grads: tuple[bool, bool], used: tuple[bool, bool]) -> None:
    def run(seen: Told) -> Any:
        module = Pair()
        module.register_full_backward_hook(seen.hook("pair"))
        x, y = (torch.randn(3, requires_grad=needed) for needed in grads)
        out = module(x, y)
        sum(out[index].sum() for index, one in zip((0, 2), used, strict=True) if one).backward()
        return x.grad, y.grad, type(out).__name__

    same(run)


def test_an_input_by_keyword_and_none_that_needs_a_gradient() -> None:
    def run(seen: Told) -> Any:
        module = Pair()
        module.register_full_backward_hook(seen.hook("pair"))
        factor = leaf(3)
        module(torch.ones(3), None, factor=factor)[0].sum().backward()
        return factor.grad

    calls, _, error, caught = same(run)
    assert len(calls) == 1
    assert error is None
    assert "no inputs require gradients" in caught[0][1]
    assert caught[0][2] == __file__


def test_a_named_tuple() -> None:
    Out = namedtuple("Out", "a b")

    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return Out(x * 2, x.sum())

    def run(seen: Told) -> Any:
        module = Named()
        module.register_full_backward_hook(seen.hook("named"))
        x = leaf(3)
        out = module(x)
        (out.a.sum() + out.b).backward()
        return x.grad, type(out).__name__

    assert same(run)[1][1][1] == "Out"


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_no_tensor_or_has_no_graph(grad: bool) -> None:
    class Mapping(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"y": x * 2}

    def run(seen: Told) -> Any:
        module, plain = Mapping(), nn.Tanh()
        module.register_full_backward_hook(seen.hook("mapping"))
        plain.register_full_backward_hook(seen.hook("plain"))
        x = leaf(3)
        with torch.set_grad_enabled(grad):
            out = plain(module(x)["y"])
        if grad:
            out.sum().backward()
        return out, x.grad

    same(run)


def test_double_backward_and_grad() -> None:
    def run(seen: Told) -> Any:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        model[1].register_full_backward_hook(seen.hook("tanh", lambda given, _: (given[0] * 2,)))
        x = leaf(2, 3)
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        (weight,) = torch.autograd.grad(model(x).sum(), model[0].weight)
        return x.grad, weight, grad

    same(run)


def test_retained_graph_runs_again() -> None:
    def run(seen: Told) -> Any:
        layer, x = nn.Tanh(), leaf(3)
        layer.register_full_backward_hook(seen.hook("tanh"))
        loss = layer(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return x.grad

    assert len(same(run)[0]) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    def run(seen: Told) -> Any:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        for name, module in model.named_modules():
            module.register_full_backward_hook(seen.hook(name))
        x = leaf(2, 3)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        return x.grad

    same(run)


def test_a_module_called_twice_and_hooks_that_come_and_go() -> None:
    def run(seen: Told) -> Any:
        layer, x, handles = nn.Linear(3, 3), leaf(2, 3), []

        def once(*_: Any) -> None:
            seen.append("once")
            handles[0].remove()
            layer.register_full_backward_hook(seen.hook("later"))

        handles.append(layer.register_full_backward_hook(once))
        layer(layer(x)).sum().backward()
        layer(x).sum().backward()
        return x.grad

    same(run)


def test_autocast() -> None:
    def run(seen: Told) -> Any:
        layer, x = nn.Linear(3, 3), leaf(2, 3)
        layer.register_full_backward_hook(seen.hook("linear"))
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().sum().backward()
        return x.grad

    same(run)


def test_transforms_and_tangents_are_left_to_pytorch() -> None:
    def run(seen: Told) -> Any:
        layer = nn.Tanh()
        layer.register_full_backward_hook(seen.hook("tanh"))
        return torch.func.grad(lambda x: layer(x).sum())(torch.ones(3))

    def tangent(seen: Told) -> Any:
        layer = nn.Tanh()
        layer.register_full_backward_hook(seen.hook("tanh"))
        with torch.autograd.forward_ad.dual_level():
            return layer(torch.autograd.forward_ad.make_dual(leaf(3), torch.ones(3)))

    assert same(run)[2] is not None
    both(tangent)  # what torch warns of when it loads its rules of forward-mode AD
    assert same(tangent)[2] is not None


def test_views_and_leaves_refuse_in_place_as_with_pytorchs() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    def run(seen: Told, given: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        module = Doubling()
        module.register_full_backward_hook(seen.hook("doubling"))
        return module(given(leaf(2, 3)))

    for given in (lambda x: x, lambda x: (x * 1)[0]):
        assert same(lambda seen, given=given: run(seen, given))[2] is not None


def test_identity_refuses_in_place_as_with_pytorchs() -> None:
    def run(seen: Told) -> Any:
        module = nn.Identity()
        module.register_full_backward_hook(seen.hook("identity"))
        return module(leaf(3) * 1).mul_(2)

    assert same(run)[2] is not None


# Beyond PyTorch's contract.


@needs_native
def test_an_input_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    x, seen = leaf(2, 3), Told()
    model(x).square().sum().backward()
    wanted = [x.grad.clone(), *(param.grad.clone() for param in model.parameters())]
    x.grad = None
    model.zero_grad()
    with tlfast.accelerate_hooks():
        model[1].register_full_backward_hook(seen.hook("relu"))
        model(x).square().sum().backward()
    assert len(seen) == 1
    for grad, want in zip([x.grad, *(param.grad for param in model.parameters())], wanted, strict=True):
        assert torch.equal(grad, want)


@needs_native
def test_an_input_changed_in_place_and_used_afterwards_under_its_own_name() -> None:
    def grad(hooked: bool) -> Any:
        relu, x, seen = nn.ReLU(inplace=True), torch.tensor([-1.0, 2.0], requires_grad=True), Told()
        if hooked:
            tlfast.register_full_backward_hook(relu, seen.hook("relu"))
        y = x * 3
        out = relu(y)
        (out * 2 + y.exp()).sum().backward()
        return x.grad

    assert torch.equal(grad(True), grad(False))


class Function(nn.Module):
    """A module of one function, and what it keeps."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def keeping(module: Any, x: torch.Tensor) -> torch.Tensor:
    module.kept = x
    return x * 2


# What a module computes of the input that it knows by two names, how it is called, and whether an error says so.
TWO_NAMES: dict[str, tuple[Callable[..., Any], Callable[[Any, torch.Tensor], Any], bool]] = {
    "given twice": (lambda _, x, y: x.mul_(2) + y, lambda module, h: module(h, h), True),
    "given twice, the other read": (lambda _, x, y: (x.mul_(2), y.exp())[1], lambda module, h: module(h, h), True),
    "with a view": (lambda _, x, y: x.mul_(2)[:1] + y, lambda module, h: module(h, h[:1]), True),
    "by keyword": (lambda _, x, y: x.mul_(2) + y, lambda module, h: module(h, y=h), True),
    "a view by keyword": (lambda _, x, y: x.mul_(2)[:1] + y, lambda module, h: module(h, y=h[:1]), True),
    "changed by keyword": (lambda _, x, y: (y.mul_(2), x * 1)[1], lambda module, h: module(h, y=h), True),
    "changed by keyword alone": (lambda _, x, y: y.mul_(2) * 1, lambda module, h: module(h, y=h), False),
    "both changed": (lambda _, x, y: x.mul_(2) + y.mul_(3), lambda module, h: module(h, y=h), True),
    "not changed": (lambda _, x, y: x * 2 + y, lambda module, h: module(h, y=h), False),
    "read before": (lambda _, x: (x * x.detach(), x.mul_(2))[1], lambda module, h: module(h), False),
    "kept, then changed": (keeping, lambda module, h: (module(h), h.mul_(5), module.kept * 1)[2], True),
    "kept and changed": (keeping, lambda module, h: (module(h), module.kept.mul_(5), h * 1)[2], True),
    "kept": (keeping, lambda module, h: module(h) + module.kept + h, False),
}


@needs_native
@pytest.mark.parametrize("case", TWO_NAMES)
def test_an_input_known_by_two_names_and_changed_in_place_is_an_error_or_right(case: str) -> None:
    function, use, fails = TWO_NAMES[case]

    def grad(hooked: bool) -> Any:
        module, x = Function(function), torch.tensor([-1.0, 2.0, 0.5], requires_grad=True)
        if hooked:
            module.register_full_backward_hook(lambda *_: None)
        with tlfast.accelerate_hooks():  # not by name: one that keeps its input is never freed
            use(module, x * 3).square().sum().backward()
        return x.grad

    if fails:
        with pytest.raises(RuntimeError, match=r"modified inplace|must be known to it by one name"):
            grad(True)
    else:
        torch.testing.assert_close(grad(True), grad(False))


@needs_native
def test_an_input_changed_in_place_keeps_what_was_asked_of_it() -> None:
    def told_of(hooked: bool) -> Any:
        relu, x, seen = nn.ReLU(inplace=True), torch.tensor([-1.0, 2.0], requires_grad=True), Told()
        if hooked:
            tlfast.register_full_backward_hook(relu, lambda *_: None)
        h = x * 3
        h.retain_grad()
        h.register_hook(lambda grad: seen.append(("before", told(grad))))
        out = relu(h)
        h.register_hook(lambda grad: seen.append(("behind", told(grad))))
        (out * out).sum().backward()
        return sorted(seen), told(h.grad), told(x.grad)

    assert told_of(True) == told_of(False)


@needs_native
@pytest.mark.parametrize("keep", [lambda x: x.retain_grad(), lambda x: x.register_hook(lambda grad: 2 * grad)])
def test_an_input_that_the_module_keeps_has_its_hooks_and_its_gradient(keep: Callable[..., Any]) -> None:
    def kept(module: Any, x: torch.Tensor) -> torch.Tensor:
        module.kept = x
        keep(x)
        return x * 2

    def run(seen: Told) -> Any:
        module, x = Function(kept), leaf(3)
        module.register_full_backward_hook(seen.hook("kept"))
        (module(x * 3) + module.kept).sum().backward()
        return x.grad, module.kept.grad if module.kept.retains_grad else None

    same(run)


@needs_native
@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
def test_an_output_changed_in_place(shape: tuple[int, ...]) -> None:
    layer, x, seen = nn.Linear(3, 3), leaf(*shape), Told()
    layer(x).mul_(3).sum().backward()
    wanted, x.grad = x.grad.clone(), None
    tlfast.register_full_backward_hook(layer, seen.hook("linear"))
    layer(x).mul_(3).sum().backward()
    assert torch.equal(x.grad, wanted)
    assert seen[0][3] == told((torch.full((*shape[:-1], 3), 3.0),))


@dataclass
class Fields:
    a: Any
    b: Any = None


@needs_native
@pytest.mark.parametrize("make", [lambda y: {"a": y, "b": 1}, lambda y: [y, 1], lambda y: Fields(y, 1)])
def test_outputs_by_name_of_a_module_that_was_named(make: Callable[..., Any]) -> None:
    class Made(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return make(x * 2)

    module, x, seen = Made(), leaf(3), Told()
    tlfast.register_full_backward_hook(module, seen.hook("made", lambda given, _: (given[0] * 5,)))
    with pytest.warns(UserWarning, match="For backward hooks to be called"):  # PyTorch's, before it asks
        out = module(x)
    assert type(out) is type(make(x))
    found = out[0] if isinstance(out, list) else out.a if isinstance(out, Fields) else out["a"]
    found.sum().backward()
    assert seen == [("made", "Made", told((torch.full((3,), 2.0),)), told((torch.ones(3), None)), False)]
    assert torch.equal(x.grad, torch.full((3,), 10.0))


# What stands where, and for whom.


@needs_native
def test_leaving_restores_the_name() -> None:
    assert torch_module.BackwardHook is BackwardHook
    with tlfast.accelerate_hooks(), tlfast.accelerate_hooks(nn.Tanh()):
        assert torch_module.BackwardHook is not BackwardHook
    tlfast.install_hooks()
    tlfast.install_hooks()
    tlfast.uninstall_hooks()
    assert torch_module.BackwardHook is not BackwardHook
    tlfast.uninstall_hooks()
    tlfast.uninstall_hooks()
    assert torch_module.BackwardHook is BackwardHook


@needs_native
def test_a_model_alone() -> None:
    mine, other, x = nn.Sequential(nn.Tanh()), nn.Tanh(), leaf(3)
    for module in (mine[0], other):
        module.register_full_backward_hook(lambda *_: None)
    with tlfast.accelerate_hooks(mine):
        assert [is_native(module(x).grad_fn) for module in (mine[0], other)] == [True, False]


@needs_native
def test_a_module_that_is_gone_lets_the_name_go() -> None:
    layer = nn.Tanh()
    tlfast.register_full_backward_hook(layer, lambda *_: None)
    assert torch_module.BackwardHook is not BackwardHook
    del layer
    gc.collect()
    assert torch_module.BackwardHook is BackwardHook


def test_copies_and_pickles_come_out_plain() -> None:
    layer = nn.Linear(2, 2)
    before = set(vars(layer))
    handle = tlfast.register_full_backward_hook(layer, _returns_twice)
    assert set(vars(layer)) == before
    assert list(layer.state_dict()) == ["weight", "bias"]
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = leaf(3, 2)
        made(x).sum().backward()
        assert torch.equal(x.grad, 2 * layer.weight.sum(0).expand(3, 2))
    copied = pickle.loads(pickle.dumps(handle))
    assert copied.id == handle.id
    handle.remove()
    assert not layer._backward_hooks


def _returns_twice(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return (2 * grad_input[0],)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"module must be an nn\.Module"):
        tlfast.register_full_backward_hook("layer", print)
    with pytest.raises(TypeError, match="hook must be callable"):
        tlfast.register_full_backward_pre_hook(nn.Tanh(), 3)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"), tlfast.accelerate_hooks("model"):
        pass
    layer = nn.Tanh()
    layer.register_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="Cannot use both"):
        tlfast.register_full_backward_hook(layer, print)


# Lives.


@needs_native
def test_nothing_is_kept() -> None:
    layer = nn.Linear(3, 3)
    with tlfast.accelerate_hooks():
        handle = layer.register_full_backward_hook(lambda module, given, put_out: (given[0],))
        x = leaf(2, 3)
        out = layer(x)
        dead = weakref.ref(out)
        out.sum().backward()
        del out
        assert dead() is None
        layer(x)  # without a backward
        handle.remove()
    gone = weakref.ref(layer)
    del layer, handle
    gc.collect()
    assert gone() is None


@needs_native
def test_threads() -> None:
    layer, x = nn.Linear(3, 3), leaf(4, 3)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                (grad,) = torch.autograd.grad(layer(x).sum(), x)
                assert torch.equal(grad, wanted)
        except BaseException as error:
            errors.append(error)

    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    wanted = wanted * 2
    with tlfast.accelerate_hooks():
        layer.register_full_backward_hook(lambda module, given, put_out: (given[0] * 2,))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


@needs_native
def test_threads_that_come_and_go() -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            model, calls = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), []
            model[1].register_full_backward_hook(lambda _, given, __: calls.append(1) or (2 * given[0],))
            grads = []
            for step in range(60):
                x = torch.full((2, 3), 0.3, requires_grad=True)
                if (step + number) % 2:
                    with tlfast.accelerate_hooks(model if number % 2 else None):
                        model(x).sum().backward()
                else:
                    model(x).sum().backward()
                grads.append(x.grad)
            assert len(calls) == 60
            assert all(torch.equal(grad, grads[0]) for grad in grads)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch_module.BackwardHook is BackwardHook


@needs_native
def test_a_deep_graph_is_let_go() -> None:
    point = nn.Identity()
    point.register_full_backward_hook(lambda *_: None)
    with tlfast.accelerate_hooks():
        x = leaf(1)
        y = x * 1
        for _ in range(10_000):
            y = point(y)
    call = weakref.ref(point)
    del y, point  # as deep as this, destructors that call each other end the process
    assert call() is None
