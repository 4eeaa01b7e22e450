"""Native full backward hooks beside the rest of PyTorch: compilers, tracers, modes, odd tensors, several processes."""

from __future__ import annotations

import copy
import gc
import pickle
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkout import SUPPORT
from told_hooks import Told, both, same, told
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tlfast
from tlfast.backends.choice import loaded

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit, in torch's own imports
    pytest.mark.filterwarnings("ignore:.*(prototype|beta state|deprecated)"),  # of odd tensors
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
needs_native = pytest.mark.skipif(loaded() is None, reason="no native code")


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def doubling(given: Any, _: Any) -> Any:
    return (2 * given[0],)


def nothing(*_: Any) -> None:
    return None


def net(seen: Told, returns: Callable[[Any, Any], Any] = doubling) -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    made[1].register_full_backward_hook(seen.hook("tanh", returns))
    made[0].register_full_backward_pre_hook(seen.pre_hook("before"))
    made.register_full_backward_hook(seen.hook("all"))
    return made


def gradients(model: nn.Module, x: torch.Tensor) -> Any:
    return x.grad, *(param.grad for param in model.parameters())


def alike(run: Callable[[Told], Any]) -> Any:
    """The same but for the texts of warnings, which PyTorch gives once in a process; returns calls, result, error."""
    plain, native = both(run)
    assert native[:3] == plain[:3]
    return plain[:3]


# Compilers.


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model(backend: str) -> None:
    def run(seen: Told) -> Any:
        model, x = net(seen), leaf(2, 3)
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            compiled(x).square().sum().backward()
        return gradients(model, x)

    calls, _, error = alike(run)
    assert len(calls) == 6
    assert error is None


@pytest.mark.usefixtures("fresh_dynamo")
def test_code_compiled_inside_is_right_outside_and_the_other_way_round() -> None:
    seen, x = Told(), leaf(2, 3)
    model = net(seen)
    compiled = torch.compile(model, backend="eager")
    found = []
    for context in (tlfast.accelerate_hooks, nullcontext, tlfast.accelerate_hooks):
        with context():
            x.grad = None
            compiled(x).sum().backward()
        found.append((list(seen), told(x.grad)))
        seen.clear()
    assert len(found[0][0]) == 3
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("turned_on", ["by a context", "by the configuration"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_autograd_has_pytorchs(turned_on: str) -> None:
    import torch._dynamo
    from torch._dynamo.compiled_autograd import _enable

    def run(seen: Told) -> Any:
        torch._dynamo.reset()
        model, x = net(seen), leaf(2, 3)
        if turned_on == "by a context":
            with _enable(lambda graph: graph):
                model(x).square().sum().backward()
        else:
            with torch._dynamo.config.patch(compiled_autograd=True):
                torch.compile(model, backend="eager")(x).square().sum().backward()
        return gradients(model, x)

    calls, _, error = alike(run)
    assert len(calls) == 3
    assert error is None


@needs_native
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_autograd_around_the_backward_alone_is_refused() -> None:
    from torch._dynamo.compiled_autograd import _enable

    seen, x = Told(), leaf(2, 3)
    with tlfast.accelerate_hooks():
        loss = net(seen)(x).sum()
    with (
        _enable(lambda graph: graph),
        pytest.raises(RuntimeError, match="the backward must run in the eager engine, got compiled autograd"),
    ):
        loss.backward()
    assert not seen
    assert x.grad is None


# Tracers. What they record must be what PyTorch's own hooks leave: a native node looks like a detach there.


def operations(traced: Any) -> Any:
    return [(node.op, str(node.target)) for node in traced.graph.nodes]


@pytest.mark.parametrize("before_dispatch", [False, True])
def test_make_fx(before_dispatch: bool) -> None:
    def run(seen: Told) -> Any:
        model, x = net(seen), leaf(2, 3)
        traced = make_fx(lambda x: model(x).sum(), pre_dispatch=before_dispatch)(x)
        other = leaf(2, 3)
        traced(other).backward()
        return operations(traced), told(other.grad)

    assert alike(run)[2] is None


def test_make_fx_of_a_backward() -> None:
    def run(seen: Told) -> Any:
        model, x = net(seen, nothing), leaf(2, 3)
        traced = make_fx(lambda x: torch.autograd.grad(model(x).sum(), x))(x)
        return operations(traced), traced(leaf(2, 3))

    assert alike(run)[2] is None


def test_export() -> None:
    def run(seen: Told) -> Any:
        model, x = net(seen), leaf(2, 3)
        exported = torch.export.export(model, (x,), strict=False)
        other = leaf(2, 3)
        exported.module()(other).sum().backward()
        return operations(exported.graph_module), told(other.grad)

    assert alike(run)[2] is None


def test_jit_trace_refuses_hooks_as_ever() -> None:
    assert "can't be compiled" in alike(lambda seen: torch.jit.trace(net(seen), leaf(2, 3)))[2][1]


def test_a_scripted_module_calls_none() -> None:
    def run(seen: Told) -> Any:
        x = leaf(2, 3)
        scripted = torch.jit.script(net(seen))
        scripted(x).sum().backward()
        seen.result(x.grad is None)
        scripted.register_full_backward_hook(seen.hook("refused"))

    calls, _, error = alike(run)
    assert calls == [("result", False)]
    assert error == (RuntimeError, "register_full_backward_hook is not supported on ScriptModules")


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_same_operations() -> None:
    def run(seen: Told) -> Any:
        model, x, mode = net(seen), leaf(2, 3), Recording()
        with mode:
            out = model(x)
        out.sum().backward()
        return mode.seen, *gradients(model, x)

    assert alike(run)[2] is None


@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors(inside: bool) -> None:
    def run(seen: Told) -> Any:
        mode = FakeTensorMode()
        with mode:
            model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), leaf(2, 3)
        model[1].register_full_backward_hook(
            lambda module, *grads: seen.append([(type(grad).__name__, *grad.shape) for (grad,) in grads])
        )
        with mode if inside else nullcontext():
            model(x).sum().backward()
        return type(x.grad).__name__, *x.grad.shape

    assert alike(run)[1] == ("tuple", ["FakeTensor", 2, 3])


@pytest.mark.parametrize("transform", ["vmap", "vjp", "jacrev", "functional_call"])
def test_transforms(transform: str) -> None:
    def run(seen: Told) -> Any:
        model, x = net(seen, nothing), leaf(2, 3)
        if transform == "vjp":
            out, pull = torch.func.vjp(model, x)
            return pull(torch.ones_like(out))
        if transform == "functional_call":
            torch.func.functional_call(model, dict(model.named_parameters()), (x,)).sum().backward()
            return gradients(model, x)
        return getattr(torch.func, transform)(model)(x)

    alike(run)


def test_a_batch_of_gradients() -> None:
    def run(seen: Told) -> Any:
        x = leaf(2, 3)
        out = net(seen, nothing)(x)
        return torch.autograd.grad(out, x, torch.eye(4).reshape(4, 2, 2), is_grads_batched=True)

    alike(run)


# Odd tensors.


def kinds(seen: Told) -> Callable[..., None]:
    """A hook that tells of what kind the gradients are."""

    def hook(module: nn.Module, *grads: Any) -> None:
        seen.extend(
            (type(grad).__name__, str(grad.layout), str(grad.dtype))
            for pair in grads
            for grad in pair
            if grad is not None
        )

    return hook


def test_jagged_tensors() -> None:
    def run(seen: Told) -> Any:
        model, parts = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), [leaf(2, 3), leaf(4, 3)]
        model[1].register_full_backward_hook(kinds(seen))
        model(torch.nested.as_nested_tensor(parts, layout=torch.jagged)).values().sum().backward()
        return [part.grad for part in parts]

    calls, _, error = alike(run)
    assert [call[0] for call in calls] == ["NestedTensor"] * 2
    assert error is None


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def hook(module: nn.Module, seen: Told | None) -> None:
    if seen is not None:
        module.register_full_backward_hook(kinds(seen))


def sparse_in(seen: Told | None, convert: str) -> Any:
    module, weight, dense = Function(torch.sparse.mm), leaf(3, 2), torch.eye(3, requires_grad=True)
    hook(module, seen)
    module(getattr(dense, convert)(), weight).sum().backward()
    return weight.grad


def sparse_out(seen: Told | None) -> Any:
    module, weight = Function(lambda x: x.to_sparse()), leaf(3, 2)
    hook(module, seen)
    module(weight * 1).to_dense().square().sum().backward()
    return weight.grad


def nested(seen: Told | None) -> Any:
    module, parts = nn.ReLU(), [leaf(2, 3), leaf(4, 3)]
    hook(module, seen)
    torch.nested.to_padded_tensor(module(torch.nested.as_nested_tensor(parts)), 0.0).sum().backward()
    return [part.grad for part in parts]


@needs_native
@pytest.mark.parametrize(
    "run",
    [lambda seen: sparse_in(seen, "to_sparse"), lambda seen: sparse_in(seen, "to_sparse_csr"), sparse_out, nested],
    ids=["COO in", "CSR in", "COO out", "nested"],
)
def test_tensors_that_have_no_view_work_natively_alone(run: Callable[[Any], Any]) -> None:
    plain, native = both(run)
    assert plain[2] is not None, "PyTorch can do it, too: say so in docs/hooks.md"
    torch.manual_seed(0)
    unhooked = told(run(None))
    assert native[1:3] == (unhooked, None)
    assert len(native[0]) >= 2


def test_sparse_gradients_of_parameters() -> None:
    def run(seen: Told) -> Any:
        module = nn.Embedding(5, 3, sparse=True)
        module.register_full_backward_hook(seen.hook("embedding"))
        module(torch.tensor([1, 2])).sum().backward()
        return module.weight.grad.to_dense()

    alike(run)


@pytest.mark.parametrize("returned", [False, True])
def test_quantised_tensors(returned: bool) -> None:
    def run(seen: Told) -> Any:
        module, x = Function(lambda x, q: (x * q.dequantize(), q if returned else None)), leaf(3)
        module.register_full_backward_hook(seen.hook("quantised"))
        out, _ = module(x * 1, torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
        out.sum().backward()
        return x.grad

    assert "aten::zero" in alike(run)[2][1]  # PyTorch makes zeros in place of the gradient that they have not


def test_complex_tensors() -> None:
    def run(seen: Told) -> Any:
        module, x = (
            Function(lambda x: (x.conj() * 2, x.imag)),
            torch.randn(3, dtype=torch.complex64, requires_grad=True),
        )
        module.register_full_backward_hook(
            lambda _, *grads: seen.append([str(grad.resolve_conj().tolist()) for pair in grads for grad in pair])
        )
        out, imaginary = module(x * 1)
        (out.abs().sum() + imaginary.sum()).backward()
        return torch.view_as_real(x.grad)

    assert alike(run)[2] is None


def test_inference_mode() -> None:
    def run(seen: Told) -> Any:
        model = net(seen)
        with torch.inference_mode():
            given = torch.randn(2, 3)
            out = model(given)
        pair, weight = Function(lambda a, b: (a * 2, b)), leaf(2, 3)
        pair.register_full_backward_hook(seen.hook("pair"))
        pair.register_full_backward_pre_hook(seen.pre_hook("before"))
        first, second = pair(weight, given)
        first.sum().backward()
        return out, out.is_inference(), second.is_inference(), weight.grad

    assert alike(run)[2] is None


def test_meta_tensors() -> None:
    def run(seen: Told) -> Any:
        module, x = nn.Tanh(), torch.randn(2, 3, device="meta", requires_grad=True)
        module.register_full_backward_hook(lambda _, *grads: seen.append([str(grad.device) for (grad,) in grads]))
        module(x).sum().backward()
        return str(x.grad.device)

    assert alike(run) == ([["meta", "meta"]], "meta", None)


# What else runs a forward and a backward.


def test_anomaly_detection_names_the_forward() -> None:
    def run(seen: Told) -> Any:
        x = leaf(2, 3)
        with torch.autograd.detect_anomaly():
            net(seen, lambda given, _: (given[0] * float("nan"),))(x).sum().backward()
        return x.grad

    plain, native = both(run)
    assert native[:3] == plain[:3]
    for *_, caught in (plain, native):
        assert "setup_input_hook" in caught[-1][1]
        assert "Error detected in BackwardHookFunctionBackward" in caught[-1][1]


@pytest.mark.parametrize("selective", [False, True])
def test_a_checkpoint_that_is_entered_inside_and_recomputed_outside(selective: bool) -> None:
    found = []
    for context in (nullcontext, tlfast.accelerate_hooks):
        torch.manual_seed(0)
        seen, x = Told(), leaf(2, 3)
        model = net(seen)
        more: Any = {}
        if selective:
            more["context_fn"] = lambda: create_selective_checkpoint_contexts([torch.ops.aten.tanh.default])
        with context():
            out = checkpoint(model, x, use_reentrant=False, **more)
        out.sum().backward()
        found.append((list(seen), told(gradients(model, x))))
    assert found[0] == found[1]
    assert len(found[0][0]) == 3


def test_saved_tensors_on_the_cpu() -> None:
    def run(seen: Told) -> Any:
        model, x = net(seen), leaf(2, 3)
        with torch.autograd.graph.save_on_cpu():
            out = model(x)
        out.sum().backward()
        return gradients(model, x)

    same(run)


def plain_hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return (3 * grad_input[0],)


def plain_pre_hook(module: nn.Module, grad_output: Any) -> Any:
    return (2 * grad_output[0],)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_copied_inside_comes_out_plain(make_copy: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model[1].register_full_backward_hook(plain_hook)
    with tlfast.accelerate_hooks(), tlfast.accelerate_hooks(model):
        model(leaf(2, 3)).sum().backward()
        copied, stored = make_copy(model), pickle.dumps(model)
    assert b"tlfast" not in stored
    torch.manual_seed(0)
    x = leaf(2, 3)
    wanted = 3 * (1 - copied(x).square()) @ copied[0].weight
    out = copied(x)
    assert type(out.grad_fn).__name__ == "BackwardHookFunctionBackward"
    out.sum().backward()
    torch.testing.assert_close(x.grad, wanted)


class Steps:
    """Training with hooks that return, a pre-hook and a change in place; the model is copied now and then."""

    def __init__(self, kept: list[Any] | None = None) -> None:
        self.model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Identity())
        self.model[0].register_full_backward_hook(plain_hook)
        self.model[1].register_full_backward_hook(plain_hook)
        self.model[1].register_full_backward_pre_hook(plain_pre_hook)
        self.model[2].register_full_backward_hook(nothing)
        self.kept = kept

    def run(self, n: int) -> tuple[int, int]:
        """After ``n`` steps: the objects that Python knows, and the bytes that the process has."""
        for step in range(n):
            out = self.model(torch.ones(2, 3, requires_grad=True))
            if step % 2:
                out.sum().backward()
            if self.kept is not None:
                self.kept.append((out, torch.ones(4096)))
            if step % 500 == 0:
                copy.deepcopy(self.model), pickle.loads(pickle.dumps(self.model))
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(gc.get_objects()), pages * resource.getpagesize()


@needs_native
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("leaks", [False, True])
def test_ten_thousand_steps_keep_nothing(leaks: bool) -> None:
    steps = Steps([] if leaks else None)
    with tlfast.accelerate_hooks():
        objects, memory = steps.run(1000)
        objects_later, memory_later = steps.run(3000 if leaks else 9000)
    assert (memory_later - memory < 2**24) is not leaks  # 2 KB a step: the allocator of a large process has more
    assert leaks or objects_later - objects < 100


# Several processes.


@pytest.fixture
def fake_ranks() -> Iterator[Any]:
    """A mesh of two ranks, of which one is here."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def placed(value: Any) -> Any:
    """As `told`, with what a DTensor is."""
    if isinstance(value, (tuple, list)):
        return [placed(item) for item in value]
    if isinstance(value, torch.Tensor) and hasattr(value, "placements"):
        return str(value.placements), told(value.to_local())
    return told(value)


def placed_hook(seen: Told, name: str, returns: Callable[[Any, Any], Any] = nothing) -> Callable[..., Any]:
    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        seen.append((name, placed(grad_input), placed(grad_output)))
        return returns(grad_input, grad_output)

    return hook


@pytest.mark.parametrize("returns", [nothing, doubling])
@pytest.mark.parametrize("shard", [True, False])
def test_dtensors(fake_ranks: Any, returns: Callable[[Any, Any], Any], shard: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def run(seen: Told) -> Any:
        module = nn.Tanh()
        module.register_full_backward_hook(placed_hook(seen, "tanh", returns))
        x = distribute_tensor(torch.randn(4, 2), fake_ranks, [Shard(0) if shard else Replicate()]).requires_grad_()
        out = module(x * 1)
        out.square().sum().backward()
        return type(out).__name__, placed(x.grad)

    calls, result, error = alike(run)
    assert len(calls) == 1
    assert result[1][0] == "DTensor"
    assert error is None


@pytest.mark.parametrize("how", ["tensor parallel", "fully_shard"])
def test_sharded_models(fake_ranks: Any, how: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def run(seen: Told) -> Any:
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), leaf(3, 4)
        if how == "fully_shard":
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=fake_ranks)
        else:
            parallelize_module(
                model, fake_ranks, {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
            )
        for name, module in model.named_modules():
            module.register_full_backward_hook(placed_hook(seen, name))
        model(x).sum().backward()
        return placed(gradients(model, x))

    calls, _, error = alike(run)
    assert len(calls) == 4
    assert error is None


def test_ddp() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def run(seen: Told) -> Any:
        model, x = net(seen), leaf(2, 3)
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        wrapped.register_full_backward_hook(seen.hook("wrapped"))
        wrapped(x).sum().backward()
        return gradients(model, x)

    try:
        calls, _, error = alike(run)
    finally:
        dist.destroy_process_group()
    assert [call[0] for call in calls] == ["tanh", "before", "all", "wrapped"]
    assert error is None


@pytest.mark.long
def test_two_ranks(tmp_path: Any) -> None:
    from processes import started

    script, store = SUPPORT / "hook_ranks.py", tmp_path / "store"
    with started(str(script), "0", str(store)) as first, started(str(script), "1", str(store)) as second:
        for rank in (first, second):
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
