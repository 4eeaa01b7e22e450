"""Traps 40 to 42: gradients that aren't plain strided memory are resolved, or refused with the name of the point."""

import pytest
import torch
import torch.distributed as dist
from comparison import assert_rows, assert_same_bits
from models import HookPoint, Setup, activation_gradients, hooks_left, inputs, uneven
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import tlfast
from tlfast.backends.plain import plain

NO_ROWS = "ignore:capture. no backward reached the points"
NESTED = "ignore:The PyTorch API of nested tensors is in prototype stage"


class Gives(nn.Module):
    """An identity whose output gets whatever gradient it is told."""

    def __init__(self, grad):
        super().__init__()
        self.hook, self.grad = HookPoint(), grad

    def forward(self, x):
        return _Given.apply(self.hook(x), self.grad)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad):
        ctx.grad = grad
        return x.sum()

    @staticmethod
    def backward(ctx, _):
        return ctx.grad, None


class Wrapped(torch.Tensor):
    """A wrapper without memory of its own, as quantized and distributed tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def inner(value):
            return value.inner if isinstance(value, Wrapped) else value

        out = function(*map(inner, args), **(kwargs or {}))
        return Wrapped(out) if isinstance(out, torch.Tensor) else out


class Dispatched(torch.Tensor):
    """Takes over dispatch, and has memory all the same."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


class Renamed(torch.Tensor):
    """Overrides functions, for whom a gradient of this class is none of ours."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs)
        return -out if function is torch.Tensor.detach else out


def values():
    return torch.randn(3, 4, 6)


def negated():
    """What the imaginary part of a conjugate is: other memory than it means."""
    return torch.complex(torch.zeros(3, 4, 6), values()).conj().imag


MEANT = {
    "zero": lambda: torch._efficientzerotensor((3, 4, 6)),
    "negated": negated,
    "a class with memory": lambda: torch.Tensor._make_subclass(Dispatched, values()),
    "a class with other functions": lambda: values().as_subclass(Renamed),
}


def meant(given):
    """The same as plain memory, by torch's own means."""
    if given._is_zerotensor():
        return torch.zeros(given.shape)
    if isinstance(given, (Dispatched, Renamed)):
        return torch.frombuffer(bytearray(given.untyped_storage().tolist()), dtype=torch.float32).view(given.shape)
    return torch.tensor(given.tolist())


@pytest.mark.parametrize("kind", MEANT)
@pytest.mark.parametrize("reduce", ["none", "sum", "last"])
def test_trap_40_41_rows_hold_what_the_gradient_means(backend, attach, kind, reduce):
    grad = MEANT[kind]()
    model, right = Gives(grad), {"none": meant(grad), "sum": meant(grad).sum(1), "last": meant(grad)[:, -1]}[reduce]
    with tlfast.capture(model, "hook", reduce=reduce, rows=4, attach=attach, backend=backend) as cap:
        model(inputs()).backward()
    torch.testing.assert_close(cap["hook"], right)


@pytest.mark.parametrize("kind", ["zero", "negated"])
@pytest.mark.parametrize("calls", ["sum", "last", "stack"])
def test_trap_40_41_several_calls(backend, attach, kind, calls):
    class Twice(nn.Module):
        def __init__(self, grads):
            super().__init__()
            self.hook, self.grads = HookPoint(), grads

        def forward(self, x):
            return sum(_Given.apply(self.hook(x), grad) for grad in self.grads)

    grads = [MEANT[kind](), values()]
    model, one, two = Twice(grads), *map(meant, grads)
    with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend, calls=calls) as cap:
        model(inputs()).backward()
    assert_rows(cap, "hook", {"sum": one + two, "last": one, "stack": torch.stack([one, two], 1)}[calls])


@pytest.mark.parametrize("kind", MEANT)
def test_trap_40_41_sinks_are_given_what_it_means(backend, attach, kind):
    grad, found, out = MEANT[kind](), [], torch.full((3, 4, 6), torch.nan)
    model = Gives(grad)
    with (
        tlfast.attach(model.hook, lambda g: found.append(g.clone()), attach=attach, backend=backend),
        tlfast.attach(model.hook, out, attach=attach, backend=backend),
    ):
        model(inputs()).backward()
    assert type(found[0]) is torch.Tensor
    assert_same_bits(found[0] + 0.0, meant(grad) + 0.0)
    assert_same_bits(out + 0.0, meant(grad) + 0.0)


def test_trap_40_of_an_ordinary_loss(backend, attach):
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.ones(2, 6)
    setup = Setup(model, ["0"], lambda: torch.sgn(model(x)).sum())
    out = torch.full((4,), torch.nan)
    with (
        tlfast.capture(model, "0", rows=4, attach=attach, backend=backend) as cap,
        tlfast.attach(model[0], out, reduce="sum", over="batch", attach=attach, backend=backend),
    ):
        setup.loss().backward()
    assert_rows(cap, "0", torch.zeros(2, 4) + activation_gradients(setup)["0"][0])
    assert out.tolist() == [0.0] * 4


def test_trap_41_of_an_ordinary_loss(backend, attach):
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.ones(2, 6)
    setup = Setup(model, ["0"], lambda: (torch.complex(torch.ones(2, 4), model(x)).conj() * 1j).real.sum())
    with tlfast.capture(model, "0", rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    assert activation_gradients(setup)["0"][0].tolist() == [[1.0] * 4] * 2
    assert_rows(cap, "0", torch.ones(2, 4))


@pytest.mark.parametrize("kind", MEANT)
def test_trap_40_41_the_op_itself(backend, kind, monkeypatch):
    if backend == "python":
        monkeypatch.setattr("tlfast.backends.choice.native", lambda: None)
    grad = MEANT[kind]()
    mask = torch._efficientzerotensor((3, 4), dtype=torch.bool)
    out = tlfast.reduce_into(torch.full((3, 6), torch.nan), grad, "sum", 1)
    torch.testing.assert_close(out, meant(grad).sum(1))
    assert tlfast.reduce_into(torch.full((3, 6), torch.nan), grad, "sum", 1, mask).tolist() == [[0.0] * 6] * 3


def test_trap_41_a_conversion_may_give_a_lazy_view(backend):
    model, grad = Gives(values()), negated()
    with tlfast.capture(model, "hook", rows=4, backend=backend) as cap:
        cap._taps[0][1].set_convert(lambda given: grad if given.dim() == 3 else given, None)
        model(inputs()).backward()
    assert_rows(cap, "hook", meant(grad))


@pytest.mark.parametrize("kind", ["zero", "class"])
def test_masks_are_made_plain(backend, attach, kind):
    real = torch.rand(3, 4) < 0.5
    mask = torch._efficientzerotensor((3, 4), dtype=torch.bool) if kind == "zero" else real.as_subclass(Renamed)
    model, right = Gives(values()), torch.zeros_like(real) if kind == "zero" else real
    with (
        tlfast.capture(model, "hook", reduce="sum", rows=4, attach=attach, backend=backend) as cap,
        cap.batch(mask=mask),
    ):
        model(inputs()).backward()
    torch.testing.assert_close(cap["hook"], torch.where(right[..., None], model.grad, 0.0).sum(1))


MEMORY = "{who}: {what} must be a tensor with memory of its own, got {got}. {remedy}"
ANOTHER = "Capture a point whose output is a plain tensor."
REFUSED = {
    "wrapper": (lambda: Wrapped(values()), RuntimeError, MEMORY, "a Wrapped, which wraps others", ANOTHER),
    "sparse": (
        lambda: values().to_sparse(), ValueError, "{who}: {what} must be dense, got {got}. {remedy}",
        "torch.sparse_coo", "Turn sparse=True off in the embedding.",
    ),
    "mkldnn": (
        lambda: values().to_mkldnn(), ValueError, "{who}: {what} must be dense, got {got}. {remedy}",
        "torch._mkldnn", "Use to_dense().",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["wrapper", "sparse"])
def test_trap_42_other_kinds_of_gradients_are_refused(backend, attach, kind):
    make, error_type, text, got, remedy = REFUSED[kind]
    model, found = Gives(make()), []
    text = text.format(what="the gradient", got=got, remedy=remedy, who="{who}")
    with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend) as cap:
        with pytest.raises(error_type) as error:
            model(inputs()).backward()
        assert str(error.value) == text.format(who="capture at hook")
        assert cap.rows == 0
        model.grad = torch.ones(3, 4, 6)  # the capture goes on
        model(inputs()).backward()
        assert_rows(cap, "hook", torch.ones(3, 4, 6))
    model.grad = make()
    for sink in (found.append, torch.full((3, 4, 6), torch.nan)):
        with tlfast.attach(model.hook, sink, attach=attach, backend=backend), pytest.raises(error_type) as error:
            model(inputs()).backward()
        assert str(error.value) == text.format(who="capture at HookPoint")
    assert not found
    assert not hooks_left(model)


@pytest.mark.parametrize("kind", REFUSED)
def test_reduce_into_refuses_other_kinds(backend, kind, monkeypatch):
    if backend == "python":
        monkeypatch.setattr("tlfast.backends.choice.native", lambda: None)
    make, error_type, text, got, remedy = REFUSED[kind]
    remedy = "Pass a plain tensor." if remedy == ANOTHER else remedy
    out = torch.full((3, 6), torch.nan)
    with pytest.raises(error_type) as error:
        tlfast.reduce_into(out, make(), "sum", 1)
    assert str(error.value) == text.format(who="reduce_into", what="grad", got=got, remedy=remedy)
    with pytest.raises(error_type, match="reduce_into: mask must be "):
        tlfast.reduce_into(out, values(), "sum", 1, make())
    with pytest.raises(error_type, match="reduce_into: out must be "):
        tlfast.reduce_into(make(), values(), "none")
    assert out.isnan().all()


LAZY = {
    "zero": (lambda: torch._efficientzerotensor((3, 4, 6)), "a ZeroTensor"),
    "negated": (lambda: torch.zeros(3, 4, 6)._neg_view(), "a lazy view"),
    "wrapper": (lambda: Wrapped(values()), "a Wrapped"),
}


@pytest.mark.parametrize("kind", LAZY)
def test_destinations_are_not_resolved_but_refused(backend, attach, kind):
    make, got = LAZY[kind]
    model = Gives(values())
    with pytest.raises(RuntimeError) as error:
        tlfast.attach(model.hook, make(), attach=attach, backend=backend)
    remedy = "Pass a plain tensor."
    assert str(error.value) == MEMORY.format(who="attach", what="sink", got=got, remedy=remedy)
    with pytest.raises(RuntimeError) as error:
        tlfast.reduce_into(make(), values(), "none")
    assert str(error.value) == MEMORY.format(who="reduce_into", what="out", got=got, remedy=remedy)
    assert not hooks_left(model)


@pytest.mark.sanitize
def test_the_op_and_the_taps_check_for_themselves(native):
    from tlfast import _C

    out = torch.full((3, 6), torch.nan)
    with pytest.raises(ValueError, match=r"capture: grad must be dense, got torch._mkldnn. Use to_dense"):
        torch.ops.tlfast.capture(out, torch.ones(3, 6).to_mkldnn(), "none", [])
    with pytest.raises(RuntimeError, match=r"attach: sink must be a tensor with memory of its own, got a lazy view. "):
        _C.SinkKeeper(LAZY["negated"][0](), "none", [])
    with pytest.raises(ValueError, match=r"batch: mask must be dense, got torch.sparse_coo. Use to_dense"):
        _C.Backwards(_C.Ledger(1), "nan").set_batch(torch.ones(2, 2, dtype=torch.bool).to_sparse(), -1, 1.0, [])
    assert out.isnan().all()


# Distributed tensors: one process that is one of so many ranks, which don't exist.


@pytest.fixture(params=[1, 2])
def mesh(request):
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (request.param,))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings(NO_ROWS)
@pytest.mark.parametrize("placement", ["Shard(dim=0)", "Shard(dim=1)", "Replicate()", "Partial(sum)"])
def test_trap_42_the_local_tensor_where_it_is_all(backend, attach, mesh, placement):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    where = {"Shard(dim=0)": Shard(0), "Shard(dim=1)": Shard(1), "Replicate()": Replicate(), "Partial(sum)": Partial()}
    grad, found = DTensor.from_local(values(), mesh, [where[placement]], run_check=False), []
    model, local = Gives(grad), grad.to_local()
    with (
        tlfast.attach(model.hook, lambda g: found.append(g.clone()), attach=attach, backend=backend),
        tlfast.capture(model, "hook", rows=4, reduce="sum", attach=attach, backend=backend) as cap,
    ):
        x = DTensor.from_local(inputs(), mesh, [where[placement]], run_check=False)
        if mesh.size() == 1 or placement == "Replicate()":
            model(x).backward()
            torch.testing.assert_close(cap["hook"], local.sum(1))
            assert_same_bits(found[0], local)
            assert type(found[0]) is torch.Tensor
            return
        with pytest.raises(RuntimeError) as error:
            model(x).backward()
        assert cap.rows == 0
        assert not found
    assert str(error.value).replace("at HookPoint", "at hook") == (
        f"capture at hook: the gradient must lie whole on this rank, got a DTensor with placements ({placement},) over "
        "2 ranks. Capture a point with a local output (use_local_output=True), or a replicated one."
    )


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_42_tensor_parallel_layers(backend, attach, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(6, 4))
    parallelize_module(model, mesh, {"0": ColwiseParallel(use_local_output=False)})
    for parameter in model.parameters():  # a fake group sends nothing: they were never written
        nn.init.ones_(parameter.data.to_local())
    with tlfast.capture(model, "0", rows=4, attach=attach, backend=backend) as cap:
        out = model(torch.ones(2, 6))
        assert type(out).__name__ == "DTensor"
        if mesh.size() > 1:
            with pytest.raises(RuntimeError, match="capture at 0: the gradient must lie whole on this rank"):
                uneven(out.to_local()).backward()
            return
        uneven(out.to_local()).backward()
    copy = out.to_local().detach().requires_grad_()
    assert_rows(cap, "0", torch.autograd.grad(uneven(copy), copy)[0])


# Batches of gradients and nested tensors.

BATCH = (
    "capture at 0: the gradient must be a tensor with memory of its own, got one of a batch of gradients "
    "(is_grads_batched=True or vectorize=True). Run one backward for each of them."
)


@pytest.mark.filterwarnings(NO_ROWS)
@pytest.mark.parametrize("how", ["is_grads_batched", "vectorize"])
def test_batches_of_gradients_are_refused(backend, attach, how):
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6, requires_grad=True)
    out, found = torch.full((4,), torch.nan), []
    sinks = [(model[0], out, "sum"), (model[0], found.append, "none")]

    def run():
        if how == "vectorize":
            return torch.autograd.functional.jacobian(model, x, vectorize=True)
        return torch.autograd.grad(model(x), x, torch.ones(5, 2, 4), is_grads_batched=True)

    with tlfast.capture(model, "0", rows=4, attach=attach, backend=backend) as cap:
        with pytest.raises(RuntimeError) as error:
            run()
        assert str(error.value) == BATCH
        assert cap.rows == 0
    for module, sink, reduce in sinks:
        with tlfast.attach(module, sink, reduce=reduce, over="batch", attach=attach, backend=backend):
            with pytest.raises(RuntimeError) as error:
                run()
            assert str(error.value) == BATCH.replace("at 0", "at Linear")
    assert out.isnan().all()
    assert not found
    assert not hooks_left(model)


@pytest.mark.filterwarnings(NO_ROWS, NESTED)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_refused(backend, attach, layout):
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)], layout=layout)
    with tlfast.capture(model, "0", rows=4, attach=attach, backend=backend) as cap:
        with pytest.raises(ValueError, match="must be dense") as error:
            model(x)
        assert cap.rows == 0
    assert str(error.value) == (
        f"capture at 0: the output must be dense, got a nested tensor of layout {layout}. "
        "Capture a point whose output is padded (to_padded_tensor)."
    )
    with (
        tlfast.capture(model, "0", rows=4, attach="full", backend=backend),
        pytest.raises(ValueError, match="must be dense") as error,
    ):
        model(x.requires_grad_())
    if layout == torch.strided and backend == "python":  # PyTorch's hook would wrap it, and fail in torch's own words
        assert str(error.value) == (
            "capture at 0: an input must be dense, got a nested tensor of layout torch.strided. "
            "Pad it (to_padded_tensor)."
        )


@pytest.mark.filterwarnings(NO_ROWS)
def test_gradients_without_values_are_not_read(backend, attach):
    model = nn.Sequential(nn.Linear(6, 4, device="meta"))
    x = torch.ones(2, 6, device="meta", requires_grad=True)
    with tlfast.capture(model, "0", rows=4, attach=attach, backend=backend) as cap:
        if backend == "python":
            model(x).sum().backward()
            assert cap["0"].is_meta
            return
        with pytest.raises(ValueError, match="capture at 0: grad must be where the native code runs, got meta"):
            model(x).sum().backward()


def test_what_is_plain_is_handed_on_as_it_is():
    for given in (values(), inputs(), values()[:, ::2], nn.Parameter(values()), torch.ones(2, dtype=torch.bool)):
        assert plain("a test", "grad", given) is given
    with pytest.raises(TypeError) as error:
        plain("a test", "mask", [1])
    assert str(error.value) == "a test: mask must be a tensor, got list. Pass a plain one."
