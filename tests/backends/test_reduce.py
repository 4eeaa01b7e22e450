"""The fused op: the right number over the whole table, the same from both backends, IEEE, determinism."""

import itertools
import math

import pytest
import torch
from comparison import assert_captured, assert_close_to_truth, assert_same_bits, truth
from drawn_cases import OUT_LAYOUTS, odd_case
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
    left_shape,
    make_gradient,
    make_mask,
    make_out,
    run_op,
    stored_dtypes,
)

import tlfast
import tlfast.backends.reference


def check(backend: str, case: Case, out_layout: str = "rows") -> torch.Tensor:
    """Run one case into memory full of NaN, and check the value and that nothing else was written."""
    grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
    memory, out = make_out(left_shape(case), case.dtype, out_layout)
    run_op(backend, out, grad, case.reduce, case.dims, mask, case.scale)
    result = out.clone()
    assert_captured(result, grad, case.reduce, case.dims, mask, case.scale, case)
    out.fill_(math.nan)
    assert torch.isnan(memory).all(), f"{case}: written outside of out"
    return result


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_whole_table(backend, grad_dtype, reduce):
    out_layouts = itertools.cycle(("rows", "sliced", "rows", "transposed", "rows"))
    n = 0
    for case in cases(grad_dtype, reduce, 0.3 if backend == "native" else 0.15):
        check(backend, case, next(out_layouts))
        n += 1
    assert n > 30


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_every_stored_dtype(backend, grad_dtype, reduce):
    for dtype, layout, mask in itertools.product(stored_dtypes(grad_dtype), LAYOUTS, MASKS):
        check(backend, Case((3, 6, 33), layout, grad_dtype, dtype, reduce, (1,), mask))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_more_than_one_block_and_thread(backend, reduce):
    torch.set_num_threads(2)
    for shape, dims in (((2, 40, 5000), (1,)), ((70, 70, 9), (0, 1)), ((3, 70000), (1,)), ((65, 33, 35), (0, 2))):
        for mask in ("none", "random"):
            check(backend, Case(shape, "contiguous", torch.float32, torch.bfloat16, reduce, dims, mask))


@pytest.mark.sanitize
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype, n", [(torch.float32, 70), (torch.bfloat16, 140)], ids=str)
def test_more_bytes_than_a_cache_holds(native, reduce, grad_dtype, n):
    torch.set_num_threads(2)
    for layout, dims, mask in (("contiguous", (1,), "none"), ("sliced", (1,), "random"), ("offset", (0, 2), "none")):
        check("native", Case((3, n, 6001), layout, grad_dtype, torch.bfloat16, reduce, dims, mask))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_the_reference_in_float64_is_the_truth(grad_dtype, reduce):
    for case in cases(grad_dtype, reduce, 0.1):
        grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
        out = torch.empty(left_shape(case), dtype=torch.float64)
        run_op("python", out, grad.double(), case.reduce, case.dims, mask)
        value, moved = truth(grad.double(), case.reduce, case.dims, mask)
        assert_close_to_truth(out, value, moved, case)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def check_odd_ones(backend, data):
    case = odd_case(data, LAYOUTS, REDUCTIONS)
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    check(backend, case, data.draw(OUT_LAYOUTS))


def test_odd_ones(backend):
    check_odd_ones(backend)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    reduce=st.sampled_from(REDUCTIONS),
    dtype=st.sampled_from((torch.float32, *HALVES)),
)
def check_any_floats(backend, values, reduce, dtype):
    # Whether huge terms meet inf on the way depends on their order: sums are compared where they can't overflow.
    grad = torch.tensor(values).reshape(1, -1, 1)
    finite = grad[torch.isfinite(grad)].abs().sum() < 1e18
    if reduce in ("sum", "mean", "norm") and not finite:
        grad = torch.where(torch.isfinite(grad), grad.clamp(-1e17, 1e17), grad)
    out = torch.empty(grad.shape if reduce == "none" else (1, 1), dtype=dtype)
    run_op(backend, out, grad, reduce, (1,))
    assert_captured(out, grad, reduce, (1,))


def test_any_floats(backend):
    check_any_floats(backend)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_same_bits_for_every_thread_count_and_run(backend, reduce):
    for shape, dims in (((4, 100, 700), (1,)), ((300, 300), (0, 1)), ((3, 50000), (1,)), ((64, 8, 64), (0, 2))):
        grad, mask = torch.randn(shape), make_mask(shape, "random")
        results = []
        for n_threads in (1, 2, 3, 1):
            torch.set_num_threads(n_threads)
            out = torch.empty(left_shape(Case(shape, "", grad.dtype, grad.dtype, reduce, dims, "")))
            run_op(backend, out, grad, reduce, dims, mask)
            results.append(out)
        for other in results[1:]:
            if backend == "native" or reduce not in ("sum", "mean", "norm"):
                assert_same_bits(other, results[0])
            else:  # torch's own sums may split the work by the number of threads
                assert_captured(other, grad, reduce, dims, mask)
        assert_same_bits(results[3], results[0])


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("n", [2**8 + 1, 2**10 + 3])
def test_counts_are_integers(backend, reduce, n):
    # 257 and 1027 are 256 and 1024 in bfloat16.
    grad = torch.ones(1, n + 4, 2, dtype=torch.bfloat16)
    mask = torch.zeros(1, n + 4, dtype=torch.bool)
    mask[0, 2 : n + 2] = True
    out = torch.empty(grad.shape if reduce == "none" else (1, 2))
    run_op(backend, out, grad, reduce, (1,), mask)
    assert_captured(out, grad, reduce, (1,), mask)
    if reduce in ("mean", "sum"):
        assert out.tolist() == [[1.0 if reduce == "mean" else n] * 2]


def test_public_face_returns_out_and_takes_names():
    grad = torch.arange(24.0).reshape(2, 3, 4)
    out = torch.empty(2, 4)
    assert tlfast.reduce_into(out, grad, "sum", over="pos") is out
    assert_same_bits(out, grad.sum(1))
    assert_same_bits(tlfast.reduce_into(torch.empty(4), grad, "sum", over=("batch", "pos")), grad.sum((0, 1)))
    assert_same_bits(tlfast.reduce_into(torch.empty(2, 3), grad, "absmax", over=-1), grad.amax(-1))
    assert_same_bits(tlfast.reduce_into(torch.empty(2, 4), grad), grad.mean(1))
    assert_same_bits(tlfast.reduce_into(torch.empty(2, 4), grad, scale=0.5), grad.mean(1) / 2)
