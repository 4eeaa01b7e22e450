"""The fused op on a GPU: the table against the float64 truth, and the bits of the same kernels run on the CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import simt_capture
import torch
from comparison import assert_captured, assert_same_bits
from gpu_device import moved
from op_cases import (
    GRAD_DTYPES,
    OF_PRODUCTS,
    REDUCTIONS,
    Case,
    cases,
    left_shape,
    make_gradient,
    make_mask,
    make_out,
    make_ref,
    product_cases,
    run_op,
)

import tlfast

SHARE = {True: 0.05, False: 0.03}  # of the table; the CPU has a test of its own for it
EXACT = ("none", "last", "absmax")
# One of each kernel: columns, rows, picks, merge, each with and without wide loads and masks. Small: under a sanitizer
# every access is checked.
FEW = (
    Case((3, 40, 65), "contiguous", torch.bfloat16, torch.float32, "mean", (1,), "right padding"),
    Case((3, 40, 64), "contiguous", torch.bfloat16, torch.float32, "mean", (1,), "none"),
    Case((3, 40, 64), "offset", torch.float32, torch.bfloat16, "sum", (1,), "random"),
    Case((2, 9, 8, 7), "sliced", torch.float16, torch.float32, "sum", (0, 2), "random"),
    Case((5, 300), "contiguous", torch.float32, torch.float32, "norm", (-1,), "none"),
    Case((3, 5, 17), "transposed", torch.float64, torch.float64, "absmax", (1, 2), "random"),
    Case((1, 5000, 16), "contiguous", torch.bfloat16, torch.float32, "mean", (1,), "left padding"),
    Case((1, 70000), "contiguous", torch.float32, torch.float32, "norm", (1,), "none"),
    Case((3, 5, 17), "expanded", torch.bfloat16, torch.float16, "last", (1,), "left padding"),
    Case((4, 8, 64), "contiguous", torch.float32, torch.bfloat16, "none", (), "one empty"),
    Case((2, 0, 3), "contiguous", torch.float32, torch.float32, "mean", (1,), "none"),
)
HALF, FULL = torch.bfloat16, torch.float32
FEW_PRODUCTS = (
    Case((3, 40, 64), "contiguous", HALF, FULL, "mean", (1,), "none", 1.0, "contiguous", HALF),
    Case((3, 40, 64), "contiguous", HALF, FULL, "sum", (1,), "right padding", 1.0, "expanded", HALF),
    Case((3, 40, 64), "offset", FULL, HALF, "sum", (1,), "random", 1.0, "contiguous", FULL),
    Case((3, 40, 65), "contiguous", HALF, FULL, "mean", (1,), "none", 1.0, "contiguous", FULL),
    Case((5, 300), "contiguous", FULL, FULL, "sum", (-1,), "none", 1.0, "contiguous", FULL),
    Case((5, 300), "contiguous", torch.float64, torch.float64, "sum", (-1,), "none", 1.0, "transposed", torch.float16),
    Case((1, 5000, 16), "contiguous", HALF, FULL, "mean", (1,), "left padding", 1.0, "contiguous", HALF),
    Case((1, 70000), "contiguous", FULL, FULL, "sum", (1,), "none", 1.0, "contiguous", HALF),
    Case((3, 5, 17), "expanded", HALF, torch.float16, "last", (1,), "left padding", 1.0, "one for a vector", FULL),
    Case((4, 8, 64), "contiguous", FULL, HALF, "none", (), "one empty", 1.0, "contiguous", FULL),
)


def run(gpu, case, out_layout="rows"):
    """Run one case on the device; the result on the CPU, after the check that nothing else was written."""
    grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
    ref = None if case.ref_dtype is None else make_ref(case)
    memory, out = make_out(left_shape(case), case.dtype, out_layout)
    there = moved(memory, gpu.device)
    target = there.as_strided(out.size(), out.stride(), out.storage_offset())
    given = moved(grad, gpu.device)
    assert given.stride() == grad.stride()
    mask_there, ref_there = (None if given is None else moved(given, gpu.device) for given in (mask, ref))
    run_op("native", target, given, case.reduce, case.dims, mask_there, case.scale, ref_there)
    result = target.to("cpu", copy=True)
    target.fill_(math.nan)
    assert there.isnan().all(), f"{case}: written outside of out"
    return (grad, mask, ref), result


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_table_on_the_device(gpu, grad_dtype, reduce):
    out_layouts, n = itertools.cycle(("rows", "sliced", "rows", "transposed")), 0
    for case in cases(grad_dtype, reduce, SHARE[gpu.real]):
        (grad, mask, _), result = run(gpu, case, next(out_layouts))
        assert_captured(result, grad, reduce, case.dims, mask, case.scale, case)
        n += 1
    assert n > 3


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_products_on_the_device(gpu, grad_dtype, reduce):
    out_layouts, n = itertools.cycle(("rows", "sliced", "rows", "transposed")), 0
    for case in product_cases(grad_dtype, reduce, SHARE[gpu.real]):
        (grad, mask, ref), result = run(gpu, case, next(out_layouts))
        assert_captured(result, grad, reduce, case.dims, mask, case.scale, case, ref)
        n += 1
    assert n > 3


@pytest.mark.parametrize("case", [*FEW, *FEW_PRODUCTS], ids=str)
def test_each_kernel(gpu, case):
    (grad, mask, ref), result = run(gpu, case)
    assert_captured(result, grad, case.reduce, case.dims, mask, case.scale, case, ref)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_bits_of_the_kernels_run_on_the_cpu(gpu, grad_dtype, reduce):
    if not gpu.kernels_of_a_gpu and reduce not in EXACT:
        return  # the CPU's own kernels add up in another order; what picks a value is the same everywhere
    few = [case for case in (*FEW, *FEW_PRODUCTS) if (case.grad_dtype, case.reduce) == (grad_dtype, reduce)]
    for case in (*few, *cases(grad_dtype, reduce, 0.01)):
        if math.prod(left_shape(case)) == 0:
            continue
        (grad, mask, ref), result = run(gpu, case)
        shim = torch.full(left_shape(case), math.nan, dtype=case.dtype)
        simt_capture.capture(shim, grad, reduce, case.dims, mask, case.scale, ref=ref)
        assert_same_bits(result, shim, case)


def test_the_same_bits_in_every_run(gpu):
    for case in (*FEW, *FEW_PRODUCTS):
        torch.manual_seed(1)
        first = run(gpu, case)[1]
        for _ in range(3):
            torch.manual_seed(1)
            assert_same_bits(run(gpu, case)[1], first, case)


def test_the_public_op_is_native_here(gpu, monkeypatch):
    def used(*args):
        raise AssertionError("the reference was used")

    monkeypatch.setattr(tlfast.backends.reference, "capture", used)
    grad = torch.ones(2, 3, 4, device=gpu.device)
    out = tlfast.reduce_into(torch.empty(2, 4, device=gpu.device), grad, "sum", "pos")
    assert_same_bits(out.cpu(), torch.full((2, 4), 3.0))


def test_a_layout_survives_the_move(gpu):
    for layout in ("expanded", "transposed", "sliced", "offset"):
        grad = make_gradient((2, 3, 5), layout, torch.float32)
        there = moved(grad, gpu.device)
        assert (there.stride(), there.storage_offset()) == (grad.stride(), grad.storage_offset())
        assert_same_bits(there.cpu().contiguous(), grad.contiguous())
        assert there.data_ptr() != grad.data_ptr()
