"""The CUDA kernels of products, run on the CPU: the table against the float64 truth, bits, addresses, splits."""

import itertools
import math

import pytest
import torch
from comparison import assert_captured, assert_same_bits, tolerance, truth
from op_cases import (
    GRAD_DTYPES,
    OF_PRODUCTS,
    REF_LAYOUTS,
    Case,
    left_shape,
    make_gradient,
    make_mask,
    make_ref,
    product_cases,
    run_op,
    stored_dtypes,
)
from simt_capture import FAR, ORDERS, capture, check, far_memory, launch

PAIRS = list(itertools.product(GRAD_DTYPES, GRAD_DTYPES))
INVALID_VALUE = 1
SPLIT = ("sum", "mean")


def out_of(grad, reduce, dims, dtype=torch.float32):
    shape = left_shape(Case(tuple(grad.shape), "", grad.dtype, dtype, reduce, dims, ""))
    return torch.full(shape, math.nan, dtype=dtype)


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_whole_table(grad_dtype, reduce):
    turns = itertools.cycle(itertools.product(("rows", "sliced", "transposed", "rows", "rows"), ORDERS))
    n = 0
    for case in product_cases(grad_dtype, reduce, 0.06):
        check(case, *next(turns))
        n += 1
    assert n > 8


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype, ref_dtype", PAIRS, ids=str)
def test_every_pair_of_dtypes(grad_dtype, ref_dtype, reduce):
    masks = itertools.cycle(("none", "random", "right padding"))
    for dtype, layout in itertools.product(stored_dtypes(grad_dtype), REF_LAYOUTS):
        for shape, dims in (((2, 6, 32), (1,)), ((2, 3, 33), (2,))):
            check(Case(shape, "contiguous", grad_dtype, dtype, reduce, dims, next(masks), 1.0, layout, ref_dtype))


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_same_bits_in_every_order_and_run(grad_dtype, reduce):
    for case in product_cases(grad_dtype, reduce, 0.01):
        grad, mask, ref = (
            make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask), make_ref(case)
        )  # fmt: skip
        results = []
        for order in (*ORDERS, ORDERS[0]):
            out, counters = torch.full(left_shape(case), math.nan, dtype=case.dtype), torch.zeros(3, dtype=torch.int64)
            capture(out, grad, reduce, case.dims, mask, case.scale, counters=counters, order=order, ref=ref)
            results.append((out, counters.tolist()))
        for out, counters in results[1:]:
            assert_same_bits(out, results[0][0], case)
            assert counters == results[0][1], case


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
def test_as_the_cpu_kernels(native, reduce):
    for grad_dtype in GRAD_DTYPES:
        for case in product_cases(grad_dtype, reduce, 0.01):
            grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
            ref = make_ref(case)
            cpu, cuda = (torch.full(left_shape(case), math.nan, dtype=case.dtype) for _ in range(2))
            run_op("native", cpu, grad, reduce, case.dims, mask, case.scale, ref)
            capture(cuda, grad, reduce, case.dims, mask, case.scale, ref=ref)
            if reduce not in SPLIT:
                assert_same_bits(cuda, cpu, case)
                continue
            value, moved = truth(grad, reduce, case.dims, mask, case.scale, ref)
            assert torch.equal(cuda.isnan(), cpu.isnan()), case
            assert not ((cuda.double() - cpu.double()).abs() > 2 * tolerance(value, moved, case.dtype)).any(), case


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_the_bits_are_those_of_the_product_as_a_gradient(grad_dtype, reduce):
    """Where both lie in vectors of the accumulator's type, the cut is the same, and so is each addition."""
    wide = torch.float64 if grad_dtype == torch.float64 else torch.float32
    if grad_dtype != wide:
        return
    for shape, dims in (((2, 50, 64), (1,)), ((2, 50, 64), (2,)), ((9000, 1, 64), (0,)), ((2, 40000), (1,))):
        grad, ref, results = torch.randn(shape).to(wide), torch.randn(shape).to(wide), []
        for given, other in ((grad, ref), (grad * ref, None)):
            results.append(out_of(grad, reduce, dims, wide))
            capture(results[-1], given, reduce, dims, ref=other)
        assert_same_bits(*results, (shape, dims))


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_no_address_changes_a_bit(grad_dtype, reduce):
    """An address decides which loads are used, and must be no multiple of 16 for anything but its element."""
    for shape, dims in (((2, 50, 64), (1,)), ((2, 50, 64), (2,)), ((9000, 1, 64), (0,))):
        values, results = [torch.randn(shape).to(grad_dtype) for _ in range(2)], []
        for shifts in ((0, 0), (1, 0), (0, 3), (1, 2)):
            moved = []
            for value, shift in zip(values, shifts, strict=True):
                memory = torch.empty(value.numel() + 16, dtype=grad_dtype)[shift : shift + value.numel()]
                moved.append(memory.view(shape).copy_(value))
            results.append(out_of(values[0], reduce, dims))
            capture(results[-1], moved[0], reduce, dims, ref=moved[1])
        assert_captured(results[0], values[0], reduce, dims, ref=values[1])
        for result in results[1:]:
            assert_same_bits(result, results[0], (shape, dims))


@pytest.mark.parametrize("reduce", SPLIT)
@pytest.mark.parametrize("grad_dtype, ref_dtype", [*zip(GRAD_DTYPES, GRAD_DTYPES, strict=True),
                                                   (torch.bfloat16, torch.float32)], ids=str)  # fmt: skip
def test_split_reductions(grad_dtype, ref_dtype, reduce):
    n = (256 << 10) // grad_dtype.itemsize  # elements of a few blocks
    orders = itertools.cycle(ORDERS)
    for shape, dims in (((n // 8, 1, 8), (0,)), ((2, n + 77), (1,)), ((3, n // 60 + 1, 61), (1, 2))):
        grad, ref = torch.randn(shape).to(grad_dtype), torch.randn(shape).to(ref_dtype)
        for kind in ("none", "random"):
            mask, results = make_mask(shape, kind), []
            for order in (next(orders), next(orders)):
                out, counters = out_of(grad, reduce, dims), torch.zeros(3, dtype=torch.int64)
                outcome = capture(out, grad, reduce, dims, mask, 0.5, counters=counters, order=order, ref=ref)
                assert outcome.scratch_bytes > 0, "not split"
                assert_captured(out, grad, reduce, dims, mask, 0.5, (shape, kind), ref)
                assert counters.tolist() == [0, 0, 1]
                results.append(out)
            assert_same_bits(*results)


def test_rows_land_at_the_cursor():
    grad, ref, ring = torch.randn(2, 7, 8), torch.randn(2, 7, 8).bfloat16(), torch.full((11, 8), math.nan)
    capture(ring[:2], grad, "sum", (1,), cursor=torch.tensor([5]), row_elements=8, ref=ref)
    assert_captured(ring[5:7].clone(), grad, "sum", (1,), ref=ref)
    ring[5:7] = math.nan
    assert ring.isnan().all()


def test_what_is_not_finite_is_counted():
    grad, ref = torch.tensor([1.0, 300.0, math.nan, 1e30]), torch.tensor([2.0, 300.0, 1.0, 1e30])
    for reduce, dims in (("none", ()), ("sum", (0,))):
        out = torch.empty((1, 4), dtype=torch.float16)
        counters = torch.zeros(3, dtype=torch.int64)
        given = grad.reshape(1, 1, 4), ref.reshape(1, 1, 4)
        capture(out if reduce == "sum" else out.view(1, 1, 4), given[0], reduce, dims, counters=counters, ref=given[1])
        assert out.isfinite().tolist() == [[True, False, False, False]]
        assert counters.tolist() == [3, 1, 1], "90000 is finite before the cast, 1e60 isn't in float32"


@pytest.mark.parametrize("reduce", ["norm", "absmax"])
def test_there_are_no_kernels_for_other_reductions(reduce):
    grad = torch.ones(2, 3)
    assert launch(torch.empty(2), grad, reduce, (1,), ref=grad).error == INVALID_VALUE


def test_offsets_of_the_second_operand_beyond_32_bits():
    grad, values = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16()
    ref = far_memory(FAR + 32, torch.bfloat16).as_strided((2, 3, 8), (FAR, 8, 1))
    ref.copy_(values)
    for reduce, dims in itertools.product(OF_PRODUCTS, ((1,), (2,), (0,))):
        out = out_of(grad, reduce, dims)
        capture(out, grad, reduce, dims, ref=ref)
        assert_captured(out, grad, reduce, dims, ref=values)
