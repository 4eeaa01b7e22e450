"""Calls that can't be seen when the first of them fires: the right sum, or an error, and never a part of it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlfast
from tlfast.backends.choice import pick_backend
from tlfast.hooks.attachment import caching_hook

pytestmark = [pytest.mark.sanitize, pytest.mark.filterwarnings("ignore:Full backward hook is firing")]
AS_OFTEN = "a point must fire as often as it was called since the last step, got once more. Run one backward for each"


def x_of(seed=0):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class Chain(nn.Module):
    """One layer, called in turn by itself ("o") and inside of what is given ("c")."""

    def __init__(self, order, inside):
        super().__init__()
        self.layer, self.order, self.inside = nn.Linear(4, 4), order, inside

    def forward(self, x):
        for way in self.order:
            x = self.inside(self.step, x) if way == "c" else self.step(x)
        return x

    def step(self, x):
        return torch.tanh(self.layer(x))

    def truth(self, x):
        outputs = []
        for _ in self.order:
            outputs.append(self.layer(x))
            x = torch.tanh(outputs[-1])
        return sum(torch.autograd.grad(x.square().sum(), outputs))


def reentrant(function, x):
    return checkpoint(function, x, use_reentrant=True)


@pytest.mark.parametrize("order", ["co", "oc", "coc", "cc"])
def test_in_a_reentrant_checkpoint_and_outside(backend, attach, order):
    model, x = Chain(order, reentrant), x_of()
    with tlfast.capture(model, "layer", rows=3, calls="sum", backend=backend, attach=attach) as cap:
        model(x).square().sum().backward()
    torch.testing.assert_close(cap["layer"], model.truth(x))


@pytest.fixture
def nothing_compiled():
    """What is compiled here is forgotten: an error text elsewhere says whether anything is."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Dynamo itself
def test_eager_after_compiled_is_an_error(backend, nothing_compiled):
    model, x = Chain("ce", None), x_of()
    compiled = torch.compile(model.step, backend="aot_eager")
    model.inside = lambda step, x: compiled(x)
    with (
        pytest.raises(RuntimeError, match=AS_OFTEN),
        tlfast.capture(model, "layer", rows=3, calls="sum", backend=backend, attach="tensor"),
    ):
        model(x).square().sum().backward()


def test_a_call_made_inside_the_backward_is_an_error(backend, attach):
    model, x = nn.Sequential(nn.Linear(4, 4)), x_of()
    first = torch.tanh(x_of(1))

    @torch.enable_grad()
    def another(grad):
        model(x).pow(3).sum().backward()

    first.register_hook(another)
    with (
        pytest.raises(RuntimeError, match=AS_OFTEN),
        tlfast.capture(model, "0", rows=3, calls="sum", backend=backend, attach=attach) as cap,
    ):
        model(first).square().sum().backward()
    assert cap.rows == 0


class Cached:
    """One module, whose outputs and gradients are kept; several calls are summed."""

    def __init__(self, module, backend, select):
        engine = pick_backend("a test", backend, set())
        self.cache = engine.TensorCache()
        self.backwards = engine.Backwards(engine.Ledger(1), "nan")
        self.backwards.open(torch.zeros((), requires_grad=True))
        keeper = engine.CacheKeeper(self.cache, "point", select, "sum")
        hook = caching_hook(engine.Tap(self.backwards, "point", keeper, None), engine)
        module.register_forward_hook(hook)

    @property
    def gradient(self):
        ((_, gradient),) = self.cache.gradients()
        return gradient


@pytest.fixture(params=[None, lambda grad: grad[:, :2]], ids=["all", "a slice"])
def select(request):
    return request.param


@pytest.mark.parametrize("order", ["co", "oc"])
def test_a_cache_beside_a_reentrant_checkpoint(backend, select, order):
    model, x = Chain(order, reentrant), x_of()
    want = model.truth(x)
    cached = Cached(model.layer, backend, select)
    model(x).square().sum().backward()
    torch.testing.assert_close(cached.gradient, want if select is None else select(want))


class Leaf(nn.Module):
    """What it puts out has a gradient, and what it was given has none; else it passes on."""

    def forward(self, x):
        return x if x.requires_grad else x.clone().requires_grad_() * 1.0


@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)])
def test_a_cache_of_calls_that_fire_at_the_output(backend, select, given):
    model = Leaf()
    cached = Cached(model, backend, select)
    first, second = (model(torch.ones(2, 3, requires_grad=requires) * 1) for requires in given)
    (3 * first.sum() + 5 * second.sum()).backward()
    want = torch.full((2, 3), 8.0)
    assert torch.equal(cached.gradient, want if select is None else select(want))


def test_a_cache_of_a_call_made_inside_the_backward(backend, select):
    model, x = nn.Linear(4, 4), x_of()
    first = torch.tanh(x_of(1))
    made = []

    @torch.enable_grad()
    def another(grad):
        made.append(model(x))

    output = torch.tanh(first)
    output.register_hook(another)
    cached = Cached(model, backend, select)
    # The hook runs before the first gradient of the model does: its call is seen, and doesn't fire.
    model(output).square().sum().backward()
    want = 2 * model(output).detach()
    torch.testing.assert_close(cached.gradient, want if select is None else select(want))
    assert len(made) == 1
