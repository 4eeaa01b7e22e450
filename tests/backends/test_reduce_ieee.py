"""The fused op on the edge of IEEE 754: NaN, inf, rounding, overflow, subnormals; what is counted; opcheck."""

import math

import pytest
import torch
from comparison import assert_captured, assert_same_bits, rounded_once
from op_cases import GRAD_DTYPES, HALVES, REDUCTIONS, run_op, stored_dtypes

import tlfast
import tlfast.backends.reference


def all_values(dtype):
    """Every one of the 65536 numbers of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def reduced(backend, values, reduce, dtype=torch.float32, scale=1.0):
    """One column of values reduced to one number."""
    grad = values.reshape(1, -1, 1)
    out = torch.full((1, 1), 7.0, dtype=dtype)
    run_op(backend, out, grad, reduce, (1,), None, scale)
    return out.item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_halves_survive_float32_and_back(backend, dtype):
    values = all_values(dtype)
    wide = torch.empty(len(values))
    run_op(backend, wide, values, "none", ())
    assert_same_bits(wide, values.float())
    back = torch.empty_like(values)
    run_op(backend, back, wide, "none", ())
    assert_same_bits(back, values)
    same = torch.empty_like(values)
    run_op(backend, same, values, "none", ())
    assert_same_bits(same, values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_nearest_even_at_and_beside_every_tie(backend, dtype):
    # The middle of each two neighbours, and the float32 numbers just below and above it.
    values = all_values(dtype).float()
    values = values[torch.isfinite(values)].sort().values.unique()
    middle = (values[:-1].double() + values[1:].double()) / 2
    middle = middle.float()
    below, above = (torch.nextafter(middle, torch.tensor(s * math.inf)) for s in (-1, 1))
    for given in (middle, below, above):
        out = torch.empty(len(given), dtype=dtype)
        run_op(backend, out, given, "none", ())
        assert_same_bits(out, given.to(dtype))
    out = torch.empty(len(middle), dtype=dtype)
    run_op(backend, out, middle, "none", ())
    ties = (middle.double() * 2 == values[:-1].double() + values[1:].double()) & (middle != 0)
    assert ties.sum() > 60000
    assert (out[ties].view(torch.int16) % 2 == 0).all(), "a tie went to the odd neighbour"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_pass_through(backend, reduce, special, dtype):
    for n, place in ((1, 0), (5, 0), (5, 4), (300, 150), (300, 299)):
        for inner in (1, 3, 80):
            grad = torch.randn(2, n, inner)
            grad[1, place, inner // 2] = special
            out = torch.empty(grad.shape if reduce == "none" else (2, inner), dtype=dtype)
            run_op(backend, out, grad, reduce, (1,))
            assert_captured(out, grad, reduce, (1,))
            flat = torch.empty(grad.shape if reduce == "none" else (2,), dtype=dtype)
            run_op(backend, flat, grad, reduce, (1, 2))
            assert_captured(flat, grad, reduce, (1, 2))


def test_nan_beats_inf_and_order_in_absmax(backend):
    for values in (
        [math.nan, math.inf, 1.0],
        [math.inf, math.nan],
        [1.0, math.nan, 2.0],
        [math.nan] * 70,
        [-math.nan, 3],
    ):
        assert math.isnan(reduced(backend, torch.tensor(values), "absmax"))
    assert reduced(backend, torch.tensor([-math.inf, 5.0]), "absmax") == math.inf
    assert reduced(backend, torch.tensor([-3.0, 2.0]), "absmax") == 3.0


def test_opposite_infinities_make_nan(backend):
    values = torch.tensor([math.inf, -math.inf])
    assert math.isnan(reduced(backend, values, "sum"))
    assert math.isnan(reduced(backend, values, "mean"))
    assert reduced(backend, values, "norm") == math.inf


def test_masked_positions_hide_nan_and_inf(backend):
    grad = torch.ones(1, 4, 2)
    grad[0, 1], grad[0, 3] = math.nan, math.inf
    mask = torch.tensor([[True, False, True, False]])
    for reduce, want in {"sum": 2.0, "mean": 1.0, "last": 1.0, "norm": math.sqrt(2), "absmax": 1.0}.items():
        out = torch.empty(1, 2)
        run_op(backend, out, grad, reduce, (1,), mask)
        assert_same_bits(out, torch.full((1, 2), want))
    out = torch.empty(1, 4, 2)
    run_op(backend, out, grad, "none", (), mask)
    assert_same_bits(out, torch.where(mask[..., None], 1.0, 0.0).expand(1, 4, 2))


@pytest.mark.parametrize("shape, mask", [((2, 0, 3), None), ((2, 4, 3), torch.zeros(2, 4, dtype=torch.bool))])
def test_over_nothing(backend, shape, mask):
    for reduce, want in {"sum": 0.0, "norm": 0.0, "absmax": 0.0, "mean": math.nan, "last": math.nan}.items():
        out = torch.full((2, 3), 7.0)
        run_op(backend, out, torch.randn(shape), reduce, (1,), mask)
        assert_same_bits(out, torch.full((2, 3), want), reduce)


def test_float16_store_overflows_and_underflows(backend):
    grad = torch.tensor([7e4, -7e4, 65519.0, 65520.0, 1e-8, 6e-8, 2.0**-25, 3 * 2.0**-26])
    out = torch.empty(8, dtype=torch.float16)
    run_op(backend, out, grad, "none", ())
    assert out.tolist() == [math.inf, -math.inf, 65504.0, math.inf, 0.0, 2.0**-24, 0.0, 2.0**-24]


def test_sums_in_half_precision_are_accumulated_in_float32(backend):
    for dtype in HALVES:
        grad = torch.full((1, 2048, 1), 0.1, dtype=dtype)
        exact = 2048 * grad[0, 0, 0].item()
        assert reduced(backend, grad, "sum") == pytest.approx(exact, rel=1e-6)
        assert reduced(backend, grad, "sum", dtype) == torch.tensor(exact).to(dtype).item()
    # The sum overflows float16 on the way, its mean doesn't.
    assert reduced(backend, torch.full((100,), 6e4, dtype=torch.float16), "mean", torch.float16) == 60000.0


def test_float64_is_accumulated_in_float64(backend):
    values = torch.tensor([2.0**24, 1.0, 1.0, 2.0**-20], dtype=torch.float64)
    assert reduced(backend, values, "sum", torch.float64) == 2.0**24 + 2 + 2.0**-20
    assert reduced(backend, torch.full((3,), 1e200, dtype=torch.float64), "mean", torch.float32) == math.inf
    assert reduced(backend, torch.tensor([3e100, 4e100], dtype=torch.float64), "norm", torch.float64) == 5e100


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float64_is_rounded_once(backend, dtype):
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    # Just beside the ties, by less than float32 can tell; also where results are subnormal, overflow or vanish.
    ties = [1 + eps / 2, 1 + 3 * eps / 2, tiny * eps / 2, tiny * eps * 1.5, tiny * (1 + eps / 2), 1e-46, 1e300]
    ends = [math.inf, -math.inf, math.nan, 0.0, -0.0]
    near = [s * t * f for s in (1, -1) for t in ties for f in (1 - 2.0**-40, 1.0, 1 + 2.0**-40)]
    given = torch.tensor([*near, *ends], dtype=torch.float64)
    out = torch.empty(len(given), dtype=dtype)
    run_op(backend, out, given, "none", ())
    assert_same_bits(out, rounded_once(given, dtype))
    for value in near:  # and the same as the result of a reduction
        assert_same_bits(
            torch.tensor(reduced(backend, torch.tensor([value, 0.0], dtype=torch.float64), "sum", dtype)).to(dtype),
            rounded_once(torch.tensor(value, dtype=torch.float64), dtype),
        )


def test_norm_overflows_and_underflows_with_its_squares(backend):
    assert reduced(backend, torch.tensor([1e20, 1.0]), "norm") == math.inf
    assert reduced(backend, torch.tensor([1e-30, 0.0]), "norm") == 0.0
    assert reduced(backend, torch.tensor([1e-19, 0.0]), "norm") == pytest.approx(1e-19, rel=1e-6)


def test_scale_comes_before_the_cast(backend):
    for reduce in ("none", "sum", "mean", "last", "norm", "absmax"):
        grad = torch.full((1, 1, 1), 7e4)
        out = torch.empty((1, 1, 1) if reduce == "none" else (1, 1), dtype=torch.float16)
        run_op(backend, out, grad, reduce, (1,), None, 0.5)
        assert out.item() == 35008.0, reduce


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nonfinite_and_saturated_are_counted_as_written(backend, reduce):
    class Pass(torch.nn.Module):
        def forward(self, x):
            return x * 1

    values = torch.tensor([[[1.0, 7e4, math.nan, math.inf, -7e4]]])
    model = torch.nn.Sequential(Pass())
    with tlfast.capture(model, "0", reduce=reduce, dtype=torch.float16, rows=4, backend=backend) as cap:
        for _ in range(2):
            model(torch.zeros_like(values, requires_grad=True)).backward(values)
    assert cap.counts == {"0": {"nonfinite": 8, "saturated": 4}}


@pytest.mark.sanitize
def test_opcheck(native):
    op = torch.ops.tlfast.capture.default
    for reduce in REDUCTIONS:
        grad = torch.randn(2, 3, 4)
        out = torch.empty(grad.shape if reduce == "none" else (2, 4), dtype=torch.bfloat16)
        for mask in (None, torch.rand(2, 3) < 0.5):
            torch.library.opcheck(op, (out, grad, reduce, [1], mask, 0.5))
    torch.library.opcheck(op, (torch.empty(4), torch.randn(3, 2, 4).permute(1, 0, 2), "sum", [0, 1]))


def test_dtypes_of_the_table_are_all():
    assert {d for g in GRAD_DTYPES for d in stored_dtypes(g)} == set(GRAD_DTYPES)
