"""Columns of activations and of products with the gradient: what a call keeps for its backward."""

import gc
import weakref

import pytest
import torch
from comparison import assert_close_to_truth, assert_same_bits, rounded_once, truth
from models import HookPoint, Pair, Repeated, inputs, uneven
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import tlfast
from tlfast import Spec
from tlfast.backends import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:capture. no backward reached the points")
REDUCTIONS = ["none", "sum", "mean", "last"]


def both(reduce, **more):
    return [Spec("0", reduce, of=of, **more) for of in ("grad", "act", "grad*act")]


def model_and_input(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).to(dtype), torch.randn(4, 7, 6, dtype=dtype)


def right(model, x):
    """The first module's output and its gradient."""
    out = model[0](x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(uneven(model[1:](out)), out)
    return grad, out.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_against_the_truth(backend, reduce, masked, dtype):
    model, x = model_and_input(dtype)
    mask = torch.arange(7) < torch.tensor([[7], [3], [0], [1]]) if masked else None
    kept = both(reduce, dtype=torch.float32)
    with tlfast.capture(model, kept, rows=4, backend=backend) as cap, cap.batch(mask=mask, grad_scale=0.5):
        uneven(model(x)).mul(0.5).backward()
    assert cap.names == ["0", "0:act", "0:grad*act"]
    grad, act = right(model, x)
    dims = () if reduce == "none" else (1,)
    for column, read, scale, ref in (("0", grad, 1.0, None), ("0:act", act, 1.0, None), ("0:grad*act", grad, 1.0, act)):
        # The scale of a loss is in the gradient, and a power of two that comes out again; in no activation.
        value, moved = truth(read, reduce, dims, mask, scale, ref)
        assert_close_to_truth(cap[column], value, moved, column)


@pytest.mark.parametrize("reduce", ["norm", "absmax"])
def test_norms_of_activations(backend, reduce):
    model, x = model_and_input()
    with tlfast.capture(model, "0", reduce=reduce, of="act", rows=4, backend=backend) as cap:
        uneven(model(x)).backward()
    assert_close_to_truth(cap["0:act"], *truth(right(model, x)[1], reduce, (1,)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_rounded_once(backend, stored):
    model, x = model_and_input()
    with tlfast.capture(model, both("none", dtype=stored), rows=4, backend=backend) as cap:
        uneven(model(x)).backward()
    grad, act = right(model, x)
    assert_same_bits(cap["0:act"], rounded_once(act.double(), stored))
    assert_same_bits(cap["0:grad*act"], rounded_once((grad * act).double(), stored))


def test_both_backends_keep_the_same_bits(native):
    model, x = model_and_input()
    rows = {}
    for backend in ("native", "python"):
        with tlfast.capture(model, both("none"), rows=8, backend=backend) as cap:
            for _ in range(2):  # the second one by what was learnt
                uneven(model(x)).backward()
        rows[backend] = {name: cap[name] for name in cap.names}
    for name, kept in rows["native"].items():
        assert_same_bits(kept, rows["python"][name])


def test_shapes_and_dtypes_that_change(backend):
    """What was learnt of one geometry is of both operands."""
    model, x = nn.Sequential(HookPoint()), inputs()
    with tlfast.capture(model, "0", reduce="sum", of="grad*act", rows=40, backend=backend) as cap:
        want = []
        for given in (x, x.mT.contiguous().mT, x[:, ::2], x.flip(0), x.mT.contiguous().mT):
            leaf = given.detach().requires_grad_()
            (model(leaf) ** 2).sum().backward()
            want.append((2 * leaf * leaf).sum(1))
    torch.testing.assert_close(cap["0:grad*act"], torch.cat(want).detach())


def test_where_the_output_is_the_input(backend):
    """The activation is the module's; the gradient that through it alone."""
    model, x = nn.Sequential(HookPoint()), inputs()
    with tlfast.capture(model, both("none"), rows=4, backend=backend) as cap:
        ((model(x) * 3).sum() + x.square().sum()).backward()
    assert_same_bits(cap["0"], torch.full_like(x, 3.0))
    assert_same_bits(cap["0:act"], x.detach())
    assert_same_bits(cap["0:grad*act"], 3 * x.detach())


def test_one_output_of_several(backend):
    model, x = nn.Sequential(Pair()), inputs()
    specs = [Spec("0", output=2, of=of) for of in ("grad", "act")]
    with tlfast.capture(model, specs, rows=4, backend=backend) as cap:
        _, first, second = model(x)
        (first.sum() + second.sum()).backward()
    assert_same_bits(cap["0:act"], second.detach())
    assert_same_bits(cap["0"], torch.ones_like(second))


def test_rows_are_made_in_the_backward(backend):
    """So that a row is the same example in every column: a point that no gradient reaches misses both."""
    model, x = nn.Sequential(Pair(), nn.Identity()), inputs()
    specs = [Spec("0", output=1), Spec("0", output=1, of="act"), Spec("0.second")]
    with pytest.raises(RuntimeError, match="no gradient"), tlfast.capture(model, specs, rows=4, backend=backend):
        model(x)[2].sum().backward()
    with tlfast.capture(model, specs, rows=4, backend=backend, missing="nan") as cap:
        model(x)[2].sum().backward()
    assert cap.missing["0:act"].all()
    assert not cap.is_known("0:act")
    assert not cap.missing["0.second"].any()


# Several calls.


@pytest.mark.parametrize("calls", ["last", "stack"])
def test_each_call_has_its_own(backend, calls):
    model, x = nn.Sequential(Repeated()), inputs()
    specs = [Spec("0.shared", of=of) for of in ("grad", "act", "grad*act")]
    seen = []
    handle = model[0].shared.register_forward_hook(lambda m, a, out: seen.append(out))
    with tlfast.capture(model, specs, rows=4, backend=backend, calls=calls) as cap:
        loss = uneven(model(x))
        grads = torch.autograd.grad(loss, seen, retain_graph=False)
    handle.remove()
    acts = torch.stack([out.detach() for out in seen], 1)
    grads = torch.stack(grads, 1)
    if calls == "last":  # to fire: the first call
        acts, grads = acts[:, 0], grads[:, 0]
    assert_same_bits(cap["0.shared:act"], acts)
    torch.testing.assert_close(cap["0.shared:grad*act"], grads * acts)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_products_of_several_calls_are_added_behind_the_reduction(backend, reduce):
    model, x = nn.Sequential(Repeated()), inputs()
    seen = []
    handle = model[0].shared.register_forward_hook(lambda m, a, out: seen.append(out))
    grads = torch.autograd.grad(uneven(model(x)), seen)
    handle.remove()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, 1:] = False
    spec = Spec("0.shared", reduce, of="grad*act", dtype=torch.bfloat16)
    specs = [spec, Spec("0.shared", reduce)]
    with (
        tlfast.capture(model, specs, rows=4, backend=backend, calls="sum") as cap,
        cap.batch(mask=mask, grad_scale=2.0),
    ):
        uneven(model(x)).mul(2.0).backward()
    dims = () if reduce == "none" else (1,)
    parts = [truth(grad, reduce, dims, mask, 1.0, act) for grad, act in zip(grads, seen, strict=True)]
    value, moved = (sum(part[i] for part in parts) for i in (0, 1))
    assert_close_to_truth(cap["0.shared:grad*act"], value, moved * 2 + 1e-6 * value.abs())
    torch.testing.assert_close(cap["0.shared"], truth(sum(grads), reduce, dims, mask)[0].float())
    assert cap.counts["0.shared:grad*act"] == {"nonfinite": 0, "saturated": 0}


def test_a_sum_of_products_that_saturates_is_counted_once(backend):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.hook = HookPoint()

        def forward(self, x):
            return self.hook(x * 1.0) + self.hook(x * 2.0)

    x = torch.full((1, 1, 2), 3e4, requires_grad=True)
    spec = Spec("hook", of="grad*act", dtype=torch.float16)
    with tlfast.capture(Twice(), spec, rows=1, backend=backend, calls="sum") as cap:
        cap_model = cap._model
        cap_model(x).sum().backward()
    assert cap["hook:grad*act"].isinf().all()
    assert cap.counts["hook:grad*act"] == {"nonfinite": 2, "saturated": 2}


def test_one_call_of_a_sum_is_written_at_once(backend):
    model, x = model_and_input()
    with tlfast.capture(model, both("sum")[::2], rows=4, backend=backend, calls="sum") as cap:
        uneven(model(x)).backward()
    grad, act = right(model, x)
    assert_close_to_truth(cap["0:grad*act"], *truth(grad, "sum", (1,), ref=act))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("calls", ["raise", "sum"])
def test_checkpoints(backend, reentrant, calls):
    model, x = model_and_input()
    x.requires_grad_()
    with tlfast.capture(model, both("sum"), rows=4, backend=backend, calls=calls) as cap:
        uneven(checkpoint(model, x, use_reentrant=reentrant)).backward()
    grad, act = right(model, x)
    assert_close_to_truth(cap["0:grad*act"], *truth(grad, "sum", (1,), ref=act))
    assert_close_to_truth(cap["0:act"], *truth(act, "sum", (1,)))


def test_two_forwards_in_flight(backend):
    model, x = model_and_input()
    y = x * 2 + 1
    with tlfast.capture(model, both("none"), rows=8, backend=backend) as cap:
        first, second = uneven(model(x)), uneven(model(y))
        second.backward()
        first.backward()
    for rows, given in ((slice(0, 4), y), (slice(4, 8), x)):
        grad, act = right(model, given)
        assert_same_bits(cap["0:act"][rows], act)
        torch.testing.assert_close(cap["0:grad*act"][rows], grad * act)


# What is kept, and for how long.


class Sine(nn.Module):
    def forward(self, x):
        return x.sin()


class InPlace(nn.Module):
    """Changes the output of its layer behind it, by what needs no copy of it for its own backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        out = self.layer(x)
        out += 1.0
        return out


def test_in_place_changes_are_autograds_own_error(backend):
    model, x = InPlace(), inputs()
    with tlfast.capture(model, "layer", rows=4, backend=backend) as cap:
        model(x).sum().backward()  # gradients alone are what they always were
    assert cap.rows == x.shape[0]
    cap = tlfast.capture(model, "layer", of="act", rows=4, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), cap:
        model(x).sum().backward()
    assert cap.rows == 0


def test_behind_the_capture_nothing_is_asked_of_what_was_kept(backend):
    model, x = InPlace(), inputs()
    with tlfast.capture(model, "layer", of="act", rows=4, backend=backend):
        loss = model(x).sum()
    loss.backward()
    assert model.layer.weight.grad is not None


def test_a_second_backward(backend):
    model, x = model_and_input()
    with tlfast.capture(model, both("sum"), rows=8, backend=backend) as cap:
        loss = uneven(model(x))
        loss.backward(retain_graph=True)
        loss.backward()
        assert_same_bits(cap["0:act"][:4], cap["0:act"][4:])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert cap.rows == 8


def test_double_backward(backend):
    model, x = model_and_input()
    x.requires_grad_()
    with tlfast.capture(model, both("sum"), rows=8, backend=backend) as cap:
        (grad,) = torch.autograd.grad(uneven(model(x)), x, create_graph=True)
        assert cap.rows == 4
        assert not cap["0:grad*act"].requires_grad
    assert grad.requires_grad


@pytest.mark.parametrize("freed_by", ["backward", "drop"])
def test_what_is_kept_goes_with_the_graph(backend, freed_by):
    kept = []

    class Watched(nn.Module):
        def forward(self, x):
            out = x.exp()
            kept.append(weakref.ref(out.untyped_storage()))
            return out

    model, x = nn.Sequential(Watched()), inputs()
    with tlfast.capture(model, "0", of="act", reduce="sum", rows=4, backend=backend) as cap:
        loss = model(x).sum()
        if freed_by == "backward":
            loss.backward()
            assert cap.rows == x.shape[0]
        else:
            del loss
        gc.collect()
        assert [storage() for storage in kept] == [None]


def test_a_residual_in_place_keeps_no_circle(backend):
    """Under its old name the output has the tap's node in its history, and the node keeps the output."""
    model, x = nn.Sequential(HookPoint()), inputs()
    with tlfast.capture(model, "0", of="act", rows=4, backend=backend):
        for runs in (False, True):
            stream = x * 2
            stream += model(stream)
            loss, kept = stream.sum(), weakref.ref(stream.untyped_storage())
            del stream
            if runs:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
            del loss
            gc.collect()
            assert kept() is None


def test_offloaded_like_any_saved_tensor(backend):
    """Hooks on saved tensors get what a call keeps, too: save_on_cpu, say."""
    model, x = model_and_input()
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with tlfast.capture(model, both("none"), rows=4, backend=backend) as cap:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = uneven(model(x))
        loss.backward()
    act = right(model, x)[1]
    assert any(tensor.shape == act.shape and torch.equal(tensor, act) for tensor in packed)
    assert_same_bits(cap["0:act"], act)


def test_hooks_that_give_back_another_shape(backend):
    """The rows of a step are as many as its gradients make: what is larger would be written behind them."""
    model, x = nn.Sequential(HookPoint()), inputs()
    for of in ("act", "grad*act"):
        for unpack in (lambda kept: torch.cat([kept, kept]), lambda kept: kept[:1]):
            cap = tlfast.capture(model, "0", reduce="none", of=of, rows=9, backend=backend)
            with cap, torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
                rule = r"must be as its gradient is, \[3, 4, 6\] on cpu, got \[[16], 4, 6\] on cpu"
                with pytest.raises(ValueError, match=f"^capture at 0: the output that was kept {rule}"):
                    model(x).sum().backward()
            assert cap.rows == 0


def test_a_checkpoint_from_before_the_capture(backend):
    """It goes by the order of what is saved. Nothing of it is captured, and its gradients are what they were."""
    model, x = nn.Sequential(*(Sine() for _ in range(4))), inputs()
    (right,) = torch.autograd.grad(uneven(model(x)), x)
    loss = uneven(checkpoint(model, x, use_reentrant=False))
    with tlfast.capture(model, "0", of="act", rows=4, backend=backend) as cap:
        loss.backward()
        assert cap.rows == 0
        assert_same_bits(x.grad, right)
        uneven(checkpoint(model, x, use_reentrant=False)).backward()
    assert_same_bits(cap["0:act"], x.detach().sin())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpoint_from_before_the_capture_whose_module_was_called_again(backend, nested, early_stop):
    """Which forward is run again, nobody tells a hook; and with metadata as here a shift by one tensor isn't seen."""
    model, x, other = nn.Sequential(*(Sine() for _ in range(4))), inputs(), inputs() * 0.5

    def run(given):
        if nested:
            return checkpoint(lambda y: checkpoint(model, y.sin(), use_reentrant=False), given, use_reentrant=False)
        return checkpoint(model, given, use_reentrant=False)

    def alone(given):
        return torch.autograd.grad(uneven(model(given.sin() if nested else given)), given)[0]

    rights = {given: alone(given) for given in (x, other)}
    with set_checkpoint_early_stop(early_stop):
        before = uneven(run(x))
        with tlfast.capture(model, "0", of=("act", "grad*act"), rows=8, backend=backend) as cap:
            inside = uneven(run(other))
            assert_same_bits(torch.autograd.grad(before, x)[0], rights[x])
            assert cap.rows == 0
            assert_same_bits(torch.autograd.grad(inside, other)[0], rights[other])
            again = uneven(run(other))
            assert_same_bits(torch.autograd.grad(again, other)[0], rights[other])
    given = other.detach().sin() if nested else other.detach()
    assert_same_bits(cap["0:act"], given.sin().repeat(2, 1, 1))


def test_checkpoints_of_a_torch_that_has_changed(backend, monkeypatch):
    """Not to know one is an error, where it would be a guess."""
    model, x = nn.Sequential(*(Sine() for _ in range(2))), inputs()
    monkeypatch.setattr(checkpoints, "_AGAIN", "another name")
    with tlfast.capture(model, "0", of="act", rows=4, backend=backend):
        loss = uneven(checkpoint(model, x, use_reentrant=False))
        with pytest.raises(
            RuntimeError, match=r"^capture: a checkpoint must be one that tlfast knows, got another, of"
        ):
            loss.backward()


# What is refused.


@pytest.mark.parametrize("reduce", ["norm", "absmax"])
def test_products_have_no_norm(reduce):
    with pytest.raises(ValueError, match=r"^Spec: reduce must be none, sum, mean or last of products, got"):
        Spec("0", reduce, of="grad*act")
    with pytest.raises(ValueError, match=r"^capture: reduce must be none, sum, mean or last of products, got"):
        tlfast.capture(nn.Linear(2, 2), "", reduce=reduce, of="grad*act", rows=1)


def test_sources_that_are_none():
    with pytest.raises(
        ValueError, match=r"^capture: of must be one of grad, act, grad\*act, grad\*ref, weight, got 'loss'"
    ):
        tlfast.capture(nn.Linear(2, 2), "", of="loss", rows=1)
    with pytest.raises(
        ValueError, match=r"^capture: of must be one of grad, act, grad\*act, grad\*ref, weight, got ''"
    ):
        tlfast.capture(nn.Linear(2, 2), "", of=(), rows=1)
    with pytest.raises(
        TypeError,
        match=r"^capture: of must be one of grad, act, grad\*act, grad\*ref, weight, or a list of them, got None",
    ):
        tlfast.capture(nn.Linear(2, 2), "", of=None, rows=1)


def test_several_sources_at_once():
    model = nn.Sequential(HookPoint())
    assert tlfast.capture(model, "0", of="act, grad,act", rows=1).names == ["0:act", "0"]
    assert tlfast.capture(model, "0", of=("grad*act",), side="input", rows=1).names == ["0:input:grad*act"]
    with pytest.raises(ValueError, match=r"^capture: of must be left out where points are Specs, got 'act' beside"):
        tlfast.capture(model, Spec("0"), of="act", rows=1)


@pytest.mark.parametrize("of", ["act", "grad*act"])
def test_full_hooks_keep_nothing(of):
    with pytest.raises(ValueError, match=r"^capture: attach must be .* where activations or inputs are read, got"):
        tlfast.capture(nn.Linear(2, 2), "", of=of, attach="full", rows=1)


def test_activations_of_several_calls_have_no_sum(backend):
    """One call has: TransformerLens' captures have that setting by default."""
    x, settings = inputs(), dict(of="act", rows=4, calls="sum", backend=backend)
    once, often = nn.Sequential(HookPoint()), nn.Sequential(Repeated())
    with tlfast.capture(once, "0", **settings) as cap:
        once(x).sum().backward()
    assert_same_bits(cap["0:act"], x.detach())
    cap = tlfast.capture(often, "0.hook", **settings)
    said = r"^capture at 0.hook:act: a point must be called once where activations are to be summed, got another call"
    with pytest.raises(ValueError, match=said), cap:
        often(x).sum().backward()
    assert cap.rows == 0


def test_names_of_columns():
    model = nn.Sequential(HookPoint())
    specs = [Spec("0", "sum"), Spec("0", "mean"), Spec("0", of="act", name="out"), Spec("0", of="grad*act")]
    assert tlfast.capture(model, specs, rows=1).names == ["0:sum", "0:mean", "0:out", "0:grad*act"]
    with pytest.raises(ValueError, match="columns of different names"):
        tlfast.capture(model, [Spec("0", "sum", of="act"), Spec("0", "mean", of="act")], rows=1)
