"""Libraries with the adapter of docs/hosts.md compute what they computed before; without tlfast, too."""

from __future__ import annotations

import builtins
import copy
import gc
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from host_adapter import BLOCKS, adapter, adopt, changes, counting
from told_hooks import Told
from torch import nn
from torch.nn.modules import module as torch_module

import tlfast
from tlfast.backends.choice import loaded

needs_native = pytest.mark.skipif(loaded() is None, reason="no native code")


def is_native(node: Any) -> bool:
    return node.name() == "BackwardHookFunctionBackward" and type(node).__name__ != node.name()


def small() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return made


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [param.grad.clone() for param in model.parameters()]


def same(got: Any, wanted: Any) -> None:
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


# The adapter alone.


def test_the_adapter_is_short_and_imports_no_tlfast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tlfast")
    monkeypatch.setattr(builtins, "__import__", refusing(builtins.__import__))
    adapter()
    assert "tlfast" not in sys.modules
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 32


def refusing(theirs: Any) -> Any:
    def imported(name: str, *args: Any) -> Any:
        assert not name.startswith("tlfast")
        return theirs(name, *args)

    return imported


def told(made: ModuleType) -> tuple[Any, bool]:
    """What hooks tell that came by an adapter, and whether they were native."""
    layer, x, seen = nn.Linear(3, 3), batch(2, 3), Told()
    with torch.no_grad():
        layer.weight.fill_(0.5)
    second = made.register_full_backward_hook(layer, seen.hook("second", lambda given, _: (2 * given[0],)))
    made.register_full_backward_hook(layer, seen.hook("first"), prepend=True)
    made.register_full_backward_pre_hook(layer, seen.pre_hook("before", lambda given: (3 * given[0],)))
    with made.accelerated(layer):
        out = layer(x)
    out.sum().backward()
    second.remove()
    layer(x).sum().backward()
    seen.result(x.grad)
    return list(seen), is_native(out.grad_fn)


@needs_native
def test_with_native_code() -> None:
    assert adapter().native_hooks() is tlfast
    calls, native = told(adapter())
    assert native
    assert [call[0] for call in calls] == ["before", "first", "second", "before", "first", "result"]
    assert calls == told(adapter(tlfast=None))[0]


@pytest.mark.parametrize(
    "tlfast_there",
    [None, SimpleNamespace(backend=tlfast.backend),
     SimpleNamespace(backend=lambda: "python: not built", accelerate_hooks=tlfast.accelerate_hooks)],
    ids=["missing", "old", "not built"],
)  # fmt: skip
def test_without_it_hooks_are_pytorchs(tlfast_there: Any) -> None:
    made = adapter(tlfast=tlfast_there)
    assert made.native_hooks() is None
    calls, native = told(made)
    assert not native
    assert len(calls) == 6


@needs_native
def test_a_library_whose_hooks_come_and_go_keeps_nothing() -> None:
    made, layer = adapter(), nn.Tanh()
    made.register_full_backward_hook(layer, print).remove()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        made.register_full_backward_hook(layer, print).remove()
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert not layer._backward_hooks
    for plain in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert vars(plain).keys() == vars(nn.Tanh()).keys()
    del layer
    gc.collect()
    assert torch_module.BackwardHook is torch.utils.hooks.BackwardHook


def test_what_the_page_changes_is_found() -> None:
    assert [changes(library)[0][1:] for library in ("opacus", "bergson", "transformer_lens")] == [
        ("module.register_full_backward_hook(", "register_full_backward_hook(module,"),
        ("layer.register_full_backward_hook(", "register_full_backward_hook(layer,"),
        ("self.register_full_backward_hook(", "register_full_backward_hook(self,"),
    ]


# Libraries, where they are installed.


@pytest.mark.peers("opacus")
def test_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    import opacus

    def samples() -> list[torch.Tensor]:
        model = opacus.GradSampleModule(small())
        model(batch(5, 4)).square().sum().backward()
        return [param.grad_sample.clone() for param in model.parameters()]

    wanted, made = samples(), adapter()
    hooked = counting(made)
    adopt(monkeypatch, "opacus", made)
    same(samples(), wanted)
    assert len(hooked) == 2


@pytest.mark.peers("bergson.collector.collector")
def test_bergson(monkeypatch: pytest.MonkeyPatch) -> None:
    from bergson.collector import collector as collectors

    class Gradients(collectors.HookCollectorBase):
        def setup(self) -> None:
            self.seen: list[torch.Tensor] = []

        def teardown(self) -> None:
            pass

        def forward_hook(self, module: nn.Module, a: torch.Tensor) -> None:
            module._inputs = a

        def backward_hook(self, module: nn.Module, g: torch.Tensor) -> None:
            self.seen.append(g.mT @ module._inputs)

        def process_batch(self, indices: Any, **kwargs: Any) -> None:
            pass

    def products() -> list[torch.Tensor]:
        model = small()
        with Gradients(model) as collector:
            model(batch(2, 5, 4)).square().sum().backward()
        return collector.seen

    wanted, made = products(), adapter()
    hooked = counting(made)
    adopt(monkeypatch, "bergson", made)
    same(products(), wanted)
    assert len(hooked) == 2


@pytest.mark.peers("captum.attr")
@pytest.mark.filterwarnings(r"ignore:\s*Setting (forward, )?backward hooks:UserWarning")
def test_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    import captum.attr as captum

    made = adapter()

    def attributed() -> list[torch.Tensor]:
        x, model = batch(3, 4), small()
        return [
            captum.DeepLift(model).attribute(x, torch.zeros_like(x), target=1),
            captum.GuidedBackprop(model).attribute(x, target=2),
            captum.Deconvolution(model).attribute(x, target=0),
            captum.LRP(model).attribute(x, target=0),
        ]

    wanted = attributed()
    hooked = counting(made)
    (changed,) = [code for code in BLOCKS if code.startswith("def _register_backward_hook")]
    exec(compile(changed, "docs/hosts.md", "exec"), vars(made))
    for name in ("deep_lift", "guided_backprop_deconvnet", "lrp"):
        monkeypatch.setattr(f"captum.attr._core.{name}._register_backward_hook", made._register_backward_hook)
    same(attributed(), wanted)
    assert len(hooked) >= 4


@pytest.mark.peers("nnsight")
def test_nnsight() -> None:
    import nnsight

    def gradient(context: Any) -> tuple[torch.Tensor, Told]:
        inner, seen = small(), Told()
        inner[0].register_full_backward_hook(seen.hook("theirs", lambda given, _: (2 * given[0],)))
        model = nnsight.NNsight(inner)
        x = batch(2, 4)
        with context(inner), model.trace(x):
            model.output.square().sum().backward()
        return x.grad, seen

    made = adapter()
    (wanted, told_before), (got, told_now) = gradient(adapter(tlfast=None).accelerated), gradient(made.accelerated)
    assert torch.equal(got, wanted)
    assert told_now == told_before
    assert len(told_now) == 1
