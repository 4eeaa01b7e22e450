"""Capture: right rows at every point of real models, over several batches, in every reduction; the public face."""

import math

import pytest
import torch
from comparison import assert_captured, assert_rows, assert_same_bits, assert_untouched
from models import SETUPS, Chain, Experts, Repeated, Setup, activation_gradients, hooks_left, inputs, uneven
from torch import nn

import tlfast

REDUCTIONS = ("none", "sum", "mean", "last", "norm", "absmax")


@pytest.fixture(params=SETUPS)
def setup(request):
    """One of the small models."""
    return SETUPS[request.param]()


def test_right_gradients_at_every_point(setup, backend, attach):
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, setup.points, output=setup.output, rows=8, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    assert not hooks_left(setup.model)
    assert cap.backend == backend
    assert cap.names == [name for name, _ in setup.model.named_modules() if name in setup.points]
    assert cap.rows == len(cap) == 3
    for name in setup.points:
        assert_rows(cap, name, right[name][0])


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_every_reduction_over_several_steps(backend, attach, reduce, dtype):
    setup = SETUPS["residual"]()
    right = activation_gradients(setup)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    with tlfast.capture(
        setup.model, setup.points, reduce=reduce, dtype=dtype, rows=10, attach=attach, backend=backend
    ) as cap:
        setup.loss().backward()
        with cap.batch(mask=mask):
            setup.loss().backward()
        setup.loss().backward()
    for name in setup.points:
        assert cap[name].dtype == (dtype or torch.float32)
        assert_untouched(cap._columns[name].rows, 9)
        for start, used in ((0, None), (3, mask), (6, None)):
            assert_captured(cap[name][start : start + 3], right[name][0], reduce, (1,), used)
        assert_same_bits(cap[name][6:9], cap[name][:3])


@pytest.mark.parametrize("over, dims, n_rows", [("batch", (0,), 1), (("batch", "pos"), (0, 1), 1), (-1, (2,), 3)])
def test_over_other_dimensions(backend, attach, over, dims, n_rows):
    setup = SETUPS["chain"]()
    right = activation_gradients(setup)["hook"][0]
    with tlfast.capture(setup.model, "hook", reduce="sum", over=over, rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    assert cap.rows == n_rows
    value = cap["hook"] if n_rows == 3 else cap["hook"][0]
    assert_captured(value, right, "sum", dims)
    assert_untouched(cap._columns["hook"].rows, n_rows)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_native_and_python_agree(native, attach, reduce):
    setup = SETUPS["gpt2"]()
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    columns = {}
    for backend in ("native", "python"):
        with (
            tlfast.capture(
                setup.model, setup.points, reduce=reduce, dtype=torch.float32, rows=4, attach=attach, backend=backend
            ) as cap,
            cap.batch(mask=mask),
        ):
            setup.loss().backward()
        columns[backend] = {name: cap[name] for name in cap.names}
    for name in setup.points:
        a, b = columns["native"][name], columns["python"][name]
        if reduce in ("none", "last", "absmax"):
            assert_same_bits(a, b, name)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_several_specs_at_one_point(backend, attach):
    setup = SETUPS["chain"]()
    right = activation_gradients(setup)
    specs = [
        tlfast.Spec(["linear", "hook"], reduce="mean"),
        tlfast.Spec("hook", reduce="norm", over=-1, dtype=torch.bfloat16),
        tlfast.Spec("hook", reduce="none", dtype=torch.float16, name="all"),
    ]
    with tlfast.capture(setup.model, specs, rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    assert cap.names == ["linear", "hook:mean", "hook:norm", "hook:all"]
    assert_captured(cap["linear"], right["linear"][0], "mean", (1,))
    assert_captured(cap["hook:mean"], right["hook"][0], "mean", (1,))
    assert_captured(cap["hook:norm"], right["hook"][0], "norm", (2,))
    assert_captured(cap["hook:all"], right["hook"][0], "none", ())
    assert [cap[n].dtype for n in cap.names] == [torch.float32, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_rows_are_a_view_and_are_never_part_of_a_graph(backend, attach):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward(create_graph=True)
    assert cap["hook"].data_ptr() == cap._columns["hook"].rows.data_ptr()
    assert not cap["hook"].requires_grad
    assert cap["hook"].grad_fn is None
    setup.model.zero_grad()  # breaks the cycle that create_graph made


def test_gradients_and_outputs_of_the_model_are_left_as_they_are(backend, attach):
    setup = SETUPS["residual"]()
    setup.loss().backward()
    plain = {name: p.grad.clone() for name, p in setup.model.named_parameters()}
    setup.model.zero_grad()
    with tlfast.capture(setup.model, setup.points, rows=4, attach=attach, backend=backend):
        setup.loss().backward()
    for name, p in setup.model.named_parameters():
        assert_same_bits(p.grad, plain[name], name)


def test_two_captures_at_once_and_nested(backend, attach):
    setup = SETUPS["chain"]()
    right = activation_gradients(setup)

    def open_capture(points, **more):
        return tlfast.capture(setup.model, points, rows=10, attach=attach, backend=backend, **more)

    with open_capture(["linear", "hook"]) as outer, open_capture("hook", reduce="norm", over=-1) as beside:
        setup.loss().backward()
        with open_capture(["hook", "tanh"]) as inner:
            setup.loss().backward()
        setup.loss().backward()
    assert (outer.rows, beside.rows, inner.rows) == (9, 9, 3)
    assert_rows(outer, "hook", right["hook"][0].repeat(3, 1, 1))
    assert_rows(outer, "linear", right["linear"][0].repeat(3, 1, 1))
    assert_rows(inner, "hook", right["hook"][0])
    assert_rows(inner, "tanh", right["tanh"][0])
    assert_captured(beside["hook"], right["hook"][0].repeat(3, 1, 1), "norm", (2,))
    assert not hooks_left(setup.model)


def test_captures_of_both_attachments_and_backends_agree_on_one_backward(native):
    setup = SETUPS["residual"]()
    right = activation_gradients(setup)
    with (
        tlfast.capture(setup.model, setup.points[1:], rows=4, attach="tensor", backend="native") as a,
        tlfast.capture(setup.model, setup.points[1:], rows=4, attach="full", backend="native") as b,
        tlfast.capture(setup.model, setup.points[1:], rows=4, attach="tensor", backend="python") as c,
        tlfast.capture(setup.model, setup.points[1:], rows=4, attach="full", backend="python") as d,
    ):
        setup.loss().backward()
    for name in setup.points[1:]:
        for cap in (a, b, c, d):
            assert_rows(cap, name, right[name][0])


def test_forward_without_grad_is_no_step(backend, attach):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend) as cap:
        with torch.no_grad():
            setup.loss()
        setup.model.eval()
        with torch.inference_mode():
            setup.model(inputs().detach())
        setup.loss().backward()
    assert cap.rows == 3


def test_a_capture_without_backward_warns(backend, attach):
    setup = SETUPS["chain"]()
    with (
        pytest.warns(UserWarning, match="capture: no backward reached the points, so there are no rows"),
        tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend) as cap,
    ):
        setup.loss()
    assert cap.rows == 0
    with pytest.raises(RuntimeError, match="capture: the column hook must have been written, got no row"):
        cap["hook"]


def test_zero_examples_make_zero_rows(backend, attach):
    model = Chain()
    with tlfast.capture(model, "hook", reduce="sum", rows=4, attach=attach, backend=backend) as cap:
        model(torch.zeros(0, 4, 6, requires_grad=True)).sum().backward()
        uneven(model(inputs(2))).backward()
    assert cap.rows == 2
    assert cap["hook"].shape == (2, 6)
    assert not cap["hook"].isnan().any()
    assert math.isnan(cap._columns["hook"].rows[2, 0])


def test_clear_lets_the_rows_have_another_shape(backend, attach):
    model, short, long = Chain(), inputs(3, 4), inputs(3, 6)
    right = {
        x.shape[1]: activation_gradients(Setup(model, ["hook"], lambda x=x: uneven(model(x))))["hook"][0]
        for x in (short, long)
    }
    with tlfast.capture(model, "hook", rows=10, attach=attach, backend=backend) as cap:
        uneven(model(short)).backward()
        kept, memory = cap["hook"].clone(), cap["hook"].data_ptr()
        cap.clear()
        uneven(model(short)).backward()
        assert cap["hook"].data_ptr() == memory, "the same shape stays where it was"
        held = cap["hook"]
        cap.clear()
        for _ in range(2):
            uneven(model(long)).backward()
        assert_same_bits(cap["hook"], right[6].repeat(2, 1, 1))
        assert cap._columns["hook"].rows[6].isnan().all()
        assert_same_bits(held, kept)
        with pytest.raises(ValueError, match=r"a row must have shape \[6, 6\] in every step, got \[4, 6\]"):
            uneven(model(short)).backward()
        cap.clear()
        uneven(model(short)).backward()
        assert cap.rows == 3
        assert cap.counts == {"hook": {"nonfinite": 0, "saturated": 0}}
    assert_rows(cap, "hook", right[4])
    assert_same_bits(right[4], kept)


@pytest.mark.parametrize("calls", ["stack", "sum"])
def test_clear_lets_calls_and_dtypes_change(backend, attach, calls):
    model, x = Repeated(2), inputs()
    right = {}
    for n in (2, 3):
        model.n_calls = n
        grads = activation_gradients(Setup(model, ["hook"], lambda: uneven(model(x))))["hook"]
        right[n] = torch.stack(grads, 1) if calls == "stack" else sum(reversed(grads[:-1]), grads[-1])
    with tlfast.capture(model, "hook", rows=4, attach=attach, backend=backend, calls=calls) as cap:
        for n in (2, 3, 2):
            cap.clear()
            model.n_calls = n
            uneven(model(x)).backward()
            assert_rows(cap, "hook", right[n])
        cap.clear()
        wide = model.double()(x.double())
        uneven(wide).backward()
        assert cap["hook"].dtype == torch.float64


def test_clear_and_points_that_do_not_fire(backend, attach):
    model = Experts()
    short, long = inputs(3, 4), inputs(3, 6)
    both, none = (torch.arange(n * 3).reshape(3, n) % 3 for n in (4, 6))
    with tlfast.capture(model, "experts.*", rows=7, attach=attach, backend=backend, missing="nan") as cap:
        uneven(model(short, both)).backward()
        cap.clear()
        uneven(model(long, none * 0)).backward()  # nothing of the new shape at experts.1 yet
        uneven(model(long, none)).backward()
    right = activation_gradients(Setup(model, ["experts.1"], lambda: uneven(model(long, none))))["experts.1"][0]
    assert_same_bits(cap["experts.1"], torch.cat([torch.full_like(right, torch.nan), right]))
    assert cap.missing["experts.1"].tolist() == [True] * 3 + [False] * 3


def test_a_capture_is_true_without_a_row(backend):
    cap = tlfast.capture(Chain(), "hook", rows=4, backend=backend)
    assert cap
    assert len(cap) == 0


@pytest.mark.parametrize("word", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_by_its_name(backend, word):
    setup = SETUPS["chain"]()
    specs = [tlfast.Spec("hook", dtype=word), tlfast.Spec("tanh", dtype="float32")]
    with (
        tlfast.capture(setup.model, "hook", dtype=word, rows=4, backend=backend) as a,
        tlfast.capture(setup.model, specs, rows=4, backend=backend) as b,
    ):
        setup.loss().backward()
    right = activation_gradients(setup)["hook"][0]
    for cap in (a, b):
        assert_same_bits(cap["hook"], right.bfloat16())
    assert b["tanh"].dtype == torch.float32


def test_points_given_themselves(backend, attach):
    setup = SETUPS["chain"]()
    model = setup.model
    right = activation_gradients(setup)
    with (
        tlfast.capture(model, model.hook, rows=4, attach=attach, backend=backend) as one,
        tlfast.capture(model, [model.tanh, "hook"], rows=4, attach=attach, backend=backend) as two,
        tlfast.capture(model, tlfast.Spec(model.linear), rows=4, attach=attach, backend=backend) as three,
    ):
        setup.loss().backward()
    assert (one.names, two.names, three.names) == (["hook"], ["tanh", "hook"], ["linear"])
    for cap in (one, two, three):
        for name in cap.names:
            assert_rows(cap, name, right[name][0])


def test_clear_before_the_first_step_lets_no_later_shape_pass(backend, attach):
    """A shape that came after it would take the memory of the rows from under a geometry that is known."""
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=12, attach=attach, backend=backend) as cap:
        cap.clear()
        for length, accepted in ((3, True), (5, False), (3, True)):
            x = torch.full((2, length, 4), float(length), requires_grad=True)
            if accepted:
                model(x).sum().backward()
            else:
                with pytest.raises(ValueError, match=r"a row must have shape \[3, 4\] in every step, got \[5, 4\]"):
                    model(x).sum().backward()
        assert cap["0"].tolist() == torch.ones(4, 3, 4).tolist()


def test_a_capture_is_a_mapping_of_its_columns(backend):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with tlfast.capture(model, ["0", "1"], rows=4, backend=backend) as cap:
        assert repr(cap) == f"<tlfast.Capture of 0, 1: 0 of 4 rows, {backend}>"
        model(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert list(cap) == cap.keys() == ["0", "1"]
    assert "0" in cap
    assert "2" not in cap
    assert {name: rows.shape for name, rows in dict(cap).items()} == {"0": (2, 3), "1": (2, 3)}
    assert len(cap) == 2  # rows
