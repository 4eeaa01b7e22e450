"""Traps 44 and 45: what an identity node passes on of an output: its tangent, its class, its attributes."""

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import HookPoint, hooks_left, inputs
from torch import nn
from torch.autograd import forward_ad

import tlfast
from tlfast.backends.choice import pick_backend
from tlfast.hooks.attachment import CachingHooks, caching_hook, caching_id

NO_ROWS = "ignore:capture. no backward reached the points"
DUAL = "ignore:`torch.jit.script` is deprecated"  # what make_dual imports
FULL_WARNS = "ignore:Full backward hook is firing when gradients are computed with respect to module outputs"


class Tagged(torch.Tensor):
    """Counts the functions that it is given, and keeps its class through all of them."""

    called: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs)


class Quiet(torch.Tensor):
    """Has no functions of its own, as a parameter."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Doubled(torch.Tensor):
    """A wrapper: memory that two tensors hold."""

    @staticmethod
    def __new__(cls, left, right):
        return torch.Tensor._make_wrapper_subclass(cls, left.shape, dtype=left.dtype, device=left.device)

    def __init__(self, left, right):
        self.left, self.right = left, right

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def of(side):
            return [getattr(value, side) if isinstance(value, Doubled) else value for value in args]

        left, right = function(*of("left"), **(kwargs or {})), function(*of("right"), **(kwargs or {}))
        return Doubled(left, right) if isinstance(left, torch.Tensor) else left


class Second(nn.Module):
    """Its second output is the input."""

    def forward(self, x):
        return x * 2, x


class Caching:
    """A caching tap on one module, of either backend."""

    def __init__(self, module, backend):
        engine = pick_backend("a test", backend, set())
        self.cache, self.backwards = engine.TensorCache(), engine.Backwards(engine.Ledger(1), "nan")
        keeper = engine.CacheKeeper(self.cache, "0", None, "last")
        tap = engine.Tap(self.backwards, "0", keeper, None)
        self.backwards.open(torch.zeros((), requires_grad=True))
        self.hooks = CachingHooks(caching_hook(tap, engine), caching_id(engine))
        self.hooks.register(module)

    def __enter__(self):
        return self.cache

    def __exit__(self, *_):
        self.backwards.close()
        self.hooks.remove()


def of_class(kind):
    x = inputs() * 1
    out = x.as_subclass(kind)
    out.note = ["kept"]
    return out


@pytest.mark.parametrize("kind", [Tagged, Quiet])
@pytest.mark.parametrize("output", [None, 1], ids=["alone", "in a tuple"])
def test_trap_45_a_subclass_keeps_its_class_and_attributes(backend, kind, output):
    model, x = HookPoint() if output is None else Second(), of_class(kind)
    with tlfast.capture(model, "", rows=4, output=output, backend=backend) as cap:
        out = model(x)
        out = out if output is None else out[1]
        assert out is not x
        assert type(out) is kind
        assert out.note is x.note
        assert out.grad_fn is not None
        assert out.data_ptr() == x.data_ptr()
        Tagged.called.clear()
        (out * 3).sum().backward()
        if kind is Tagged:
            assert Tagged.called[:2] == ["mul", "sum"]
    assert_rows(cap, "", torch.full((3, 4, 6), 3.0))


@pytest.mark.parametrize("kind", [Tagged, Quiet])
def test_trap_45_a_subclass_changed_in_place_is_seen(backend, kind):
    model, x = HookPoint(), of_class(kind)
    with tlfast.capture(model, "", rows=4, attach="tensor", backend=backend) as cap:
        out = model(x)
        out.mul_(3)
        out.sum().backward()
    assert_rows(cap, "", torch.full((3, 4, 6), 3.0))


@pytest.mark.filterwarnings(FULL_WARNS)
def test_trap_45_as_full_hooks_do(backend):
    model, x = HookPoint(), of_class(Tagged)
    with tlfast.capture(model, "", rows=4, attach="full", backend=backend) as cap:
        out = model(x)
        assert type(out) is Tagged
        assert hasattr(out, "note") == (backend == "native")  # PyTorch's full hooks lose attributes of its own
        (out * 3).sum().backward()
    assert_rows(cap, "", torch.full((3, 4, 6), 3.0))


def test_trap_45_a_parameter_becomes_a_tensor_as_behind_a_full_hook(backend, attach):
    model, weight = HookPoint(), nn.Parameter(torch.randn(3, 4))
    with tlfast.capture(model, "", rows=4, attach=attach, backend=backend) as cap:
        out = model(weight)
        assert type(out) is torch.Tensor
        (out * 3).sum().backward()
    assert_rows(cap, "", torch.full((3, 4), 3.0))
    assert_same_bits(weight.grad, torch.full((3, 4), 3.0))


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_45_a_wrapper_is_made_by_its_own_class(backend):
    sides = torch.randn(3, 4), torch.randn(3, 4)
    model, x = HookPoint(), Doubled(*sides).requires_grad_()
    with tlfast.capture(model, "", rows=4, backend=backend, missing="nan"):
        out = model(x * 1)
        assert type(out) is Doubled
        assert_same_bits(out.left, sides[0])
        assert out.grad_fn is not None
        with pytest.raises(RuntimeError, match="capture at : the gradient must be a tensor with memory of its own"):
            out.backward(Doubled(*sides))


@pytest.mark.parametrize("kind", [Tagged, Quiet])
def test_trap_45_caches_keep_the_class(backend, kind):
    model, x = nn.Sequential(HookPoint()), of_class(kind)
    with Caching(model[0], backend) as cache:
        out = model(x)
        (out * 3).sum().backward()
    assert type(out) is kind
    assert out.note is x.note
    ((_, kept),) = cache.outputs()
    assert type(kept) is kind
    assert kept.note is x.note
    assert not kept.requires_grad
    assert kept.data_ptr() == x.data_ptr()
    ((_, grad),) = cache.gradients()
    assert grad.tolist() == torch.full((3, 4, 6), 3.0).tolist()
    assert not hooks_left(model)


@pytest.mark.parametrize("given", ["zero", "negated"])
def test_trap_40_41_caches_keep_what_is_meant(backend, given):
    model, x = nn.Sequential(HookPoint()), inputs()
    grad = {"zero": torch._efficientzerotensor((3, 4, 6)), "negated": torch.ones(3, 4, 6)._neg_view()}[given]
    with Caching(model[0], backend) as cache:
        model(x).backward(grad)
    ((_, kept),) = cache.gradients()
    assert not kept.is_neg()
    assert not kept._is_zerotensor()
    assert_same_bits(kept, torch.full((3, 4, 6), -1.0 if given == "negated" else 0.0))


@pytest.mark.filterwarnings(NO_ROWS)
def test_a_detach_that_gives_itself_is_refused(backend):
    class Stubborn(Doubled):
        def detach(self):
            return self

    model = HookPoint()
    with tlfast.capture(model, "", rows=4, backend=backend), pytest.raises(TypeError) as error:
        model(Stubborn(torch.ones(2, 3), torch.ones(2, 3)).requires_grad_())
    assert str(error.value) == (
        "capture: an output of class Stubborn must give a new tensor by detach(), got itself. Capture another point."
    )


# Forward-mode AD.


class Fresh(nn.Module):
    def forward(self, x):
        return x * 2


MODELS = {"identity": (HookPoint, 1.0), "fresh": (Fresh, 2.0), "view": (lambda: nn.Flatten(0, 1), 1.0)}


@pytest.mark.filterwarnings(NO_ROWS, DUAL)
@pytest.mark.parametrize("kind", MODELS)
def test_trap_44_tangents_go_through(backend, kind):
    make, factor = MODELS[kind]
    model, tangent = nn.Sequential(make()), torch.randn(3, 4, 6)
    with tlfast.capture(model, "0", rows=20, backend=backend) as cap, forward_ad.dual_level():
        out = model(forward_ad.make_dual(inputs(), tangent))
        got = forward_ad.unpack_dual(out * 5)
        got.primal.sum().backward()
        assert_same_bits(got.tangent.view(3, 4, 6), tangent * factor * 5)
    assert_same_bits(cap["0"], torch.full_like(out.detach(), 5.0))


@pytest.mark.filterwarnings(NO_ROWS, DUAL)
def test_trap_44_reverse_over_forward(backend):
    model, tangent = nn.Sequential(HookPoint()), torch.randn(3, 4, 6, requires_grad=True)
    with tlfast.capture(model, "0", rows=4, backend=backend, missing="nan"), forward_ad.dual_level():
        out = model(forward_ad.make_dual(inputs(), tangent))
        (3 * forward_ad.unpack_dual(out).tangent).sum().backward()
    assert_same_bits(tangent.grad, torch.full((3, 4, 6), 3.0))


@pytest.mark.filterwarnings(NO_ROWS, DUAL)
def test_trap_44_tangents_of_an_output_in_a_tuple_and_in_a_cache(backend):
    tangent = torch.randn(3, 4, 6)
    for caching in (False, True):
        model = Second()
        tap = Caching(model, backend) if caching else tlfast.capture(model, "", output=1, rows=4, backend=backend)
        with tap, forward_ad.dual_level():
            out = model(forward_ad.make_dual(inputs(), tangent))
            got = [forward_ad.unpack_dual(part).tangent for part in out]
        assert_same_bits(got[0], tangent * 2)
        assert_same_bits(got[1], tangent)


@pytest.mark.filterwarnings(NO_ROWS, DUAL)
@pytest.mark.parametrize("what", ["an input", "the output"])
def test_trap_44_full_hooks_refuse_tangents(backend, what):
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.ones(2, 6, requires_grad=what == "an input")
    with (
        tlfast.capture(model, "0", rows=4, attach="full", backend=backend),
        forward_ad.dual_level(),
        pytest.raises(RuntimeError) as error,
    ):
        model(forward_ad.make_dual(x, torch.ones(2, 6)))
    assert str(error.value) == (
        f'capture at 0: {what} must carry no tangent with attach="full", got one of forward-mode AD. '
        'Use attach="tensor".'
    )
