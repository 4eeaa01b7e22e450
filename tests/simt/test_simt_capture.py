"""The CUDA kernels, run on the CPU: the whole table against the float64 truth, the same bits in every order and run."""

import itertools
import math

import pytest
import simt_build
import torch
from checkout import ROOT, SUPPORT
from comparison import assert_captured, assert_same_bits, rounded_once, tolerance, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    GRAD_DTYPES,
    HALVES,
    LAYOUTS,
    MASKS,
    REDUCTIONS,
    Case,
    cases,
    dim_choices,
    left_shape,
    make_gradient,
    make_mask,
    run_op,
    stored_dtypes,
)
from simt_capture import NONFINITE, ORDERS, SATURATED, WRITES, capture, check

ROUNDED = ("sum", "mean", "norm")
# Of the 37000 calls of the table that write something: the first share runs once each, the orders taking turns; the
# second in every order.
SHARE, SHARE_IN_ALL_ORDERS = 0.1, 0.015


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_whole_table(grad_dtype, reduce):
    turns = itertools.cycle(itertools.product(("rows", "sliced", "transposed", "rows", "rows"), ORDERS))
    n = 0
    for case in cases(grad_dtype, reduce, SHARE):
        check(case, *next(turns))
        n += 1
    assert n > 30


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_every_stored_dtype(grad_dtype, reduce):
    for dtype, layout, mask in itertools.product(stored_dtypes(grad_dtype), LAYOUTS, MASKS):
        check(Case((3, 6, 33), layout, grad_dtype, dtype, reduce, (1,), mask))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_same_bits_in_every_order_and_run(grad_dtype, reduce):
    for case in cases(grad_dtype, reduce, SHARE_IN_ALL_ORDERS):
        grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
        results = []
        for order in (*ORDERS, ORDERS[0]):
            out, counters = torch.full(left_shape(case), math.nan, dtype=case.dtype), torch.zeros(3, dtype=torch.int64)
            capture(out, grad, case.reduce, case.dims, mask, case.scale, counters=counters, order=order)
            results.append((out, counters.tolist()))
        for out, counters in results[1:]:
            assert_same_bits(out, results[0][0], case)
            assert counters == results[0][1], case


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_as_the_cpu_kernels(native, reduce):
    for grad_dtype in GRAD_DTYPES:
        for case in cases(grad_dtype, reduce, 0.01):
            grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
            cpu, cuda = (torch.full(left_shape(case), math.nan, dtype=case.dtype) for _ in range(2))
            run_op("native", cpu, grad, reduce, case.dims, mask, case.scale)
            capture(cuda, grad, reduce, case.dims, mask, case.scale)
            if reduce not in ROUNDED:
                assert_same_bits(cuda, cpu, case)
                continue
            value, moved = truth(grad, reduce, case.dims, mask, case.scale)
            assert torch.equal(cuda.isnan(), cpu.isnan()), case
            apart = (cuda.double() - cpu.double()).abs()
            assert not (apart > 2 * tolerance(value, moved, case.dtype)).any(), case


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_odd_ones(data):
    n_dims = data.draw(st.integers(1, 5))
    sizes = st.integers(0, 9) | st.just(67)
    case = Case(
        shape=tuple(data.draw(st.lists(sizes, min_size=n_dims, max_size=n_dims).filter(lambda s: math.prod(s) < 9**5))),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        grad_dtype=(grad_dtype := data.draw(st.sampled_from(GRAD_DTYPES))),
        dtype=data.draw(st.sampled_from(stored_dtypes(grad_dtype))),
        reduce=(reduce := data.draw(st.sampled_from(REDUCTIONS))),
        dims=() if reduce == "none" else data.draw(st.sampled_from(dim_choices(n_dims))),
        mask=data.draw(st.sampled_from(MASKS)),
        scale=data.draw(st.sampled_from([1.0, 1.0, 1e-3, 3.0])),
    )
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    check(case, data.draw(st.sampled_from(["rows", "sliced", "transposed"])), data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nan_and_inf_pass_through(reduce, dtype):
    for special in (math.nan, math.inf, -math.inf):
        for n, place, inner in ((1, 0, 3), (5, 0, 8), (5, 4, 80), (300, 150, 1), (300, 299, 16)):
            grad = torch.randn(2, n, inner)
            grad[1, place, inner // 2] = special
            for dims in ((1,), (1, 2)):
                out = torch.empty(left_shape(Case(grad.shape, "", grad.dtype, dtype, reduce, dims, "")), dtype=dtype)
                counters = torch.zeros(3, dtype=torch.int64)
                capture(out, grad, reduce, dims, counters=counters)
                assert_captured(out, grad, reduce, dims)
                assert counters[NONFINITE] == (~out.isfinite()).sum()


def test_opposite_infinities_and_nothing():
    grad = torch.tensor([math.inf, -math.inf]).reshape(1, 2, 1)
    empty = torch.zeros(2, 0, 3)
    for reduce, want, of_nothing in (
        ("sum", math.nan, 0.0),
        ("mean", math.nan, math.nan),
        ("norm", math.inf, 0.0),
        ("absmax", math.inf, 0.0),
        ("last", -math.inf, math.nan),
    ):
        out, counters = torch.zeros(1, 1), torch.zeros(3, dtype=torch.int64)
        capture(out, grad, reduce, (1,), counters=counters)
        assert_same_bits(out, torch.tensor([[want]]), reduce)
        assert counters.tolist() == [1, 0, 1]
        out = torch.full((2, 3), 7.0)
        capture(out, empty, reduce, (1,))
        assert_same_bits(out, torch.full((2, 3), of_nothing), reduce)
        flat = torch.full((2,), 7.0)
        capture(flat, empty.transpose(1, 2), reduce, (1, 2))
        assert_same_bits(flat, torch.full((2,), of_nothing), reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_what_the_cast_saturates_is_counted(reduce):
    grad = torch.tensor([1.0, 7e4, math.nan, math.inf, -7e4] * 3).reshape(1, 1, 15)
    counters = torch.zeros(3, dtype=torch.int64)
    for n in (1, 2):
        out = torch.empty(grad.shape if reduce == "none" else (1, 15), dtype=torch.float16)
        capture(out, grad, reduce, (1,), counters=counters, order=n)
        assert counters[NONFINITE] == 12 * n
        assert counters[SATURATED] == 6 * n
        assert counters[WRITES] == n
        assert (~out.isfinite()).sum() == 12


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_halves_survive_float32_and_back(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide, back, same = torch.empty(len(values)), torch.empty_like(values), torch.empty_like(values)
    capture(wide, values, "none", ())
    assert_same_bits(wide, values.float())
    capture(back, wide, "none", ())
    assert_same_bits(back, values)
    capture(same, values, "none", ())
    assert_same_bits(same, values)
    middles = (wide + torch.nextafter(wide, torch.tensor(math.inf))).double() / 2 * (1 + 2.0**-40)
    capture(back, middles, "none", ())
    assert_same_bits(back, rounded_once(middles, dtype))


SOME_OF_THE_TABLE = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from op_cases import GRAD_DTYPES, REDUCTIONS, cases
from simt_capture import check
torch.manual_seed(0)
torch.set_num_threads(1)
n = 0
for grad_dtype in GRAD_DTYPES:
    for reduce in REDUCTIONS:
        for case in cases(grad_dtype, reduce, 0.008):
            check(case, order=n % 4)
            n += 1
print(n)
"""


@pytest.mark.long
def test_no_access_out_of_bounds():
    simt_build.library("capture_simt.cpp", sanitize=True)
    done = simt_build.run_sanitized(SOME_OF_THE_TABLE, str(ROOT), str(SUPPORT))
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 200
