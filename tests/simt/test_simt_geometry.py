"""The CUDA kernels, run on the CPU: vector widths, alignment, split reductions, the cursor, offsets beyond 2^31."""

import ctypes
import itertools
import math

import pytest
import simt_build
import torch
from comparison import assert_captured, assert_same_bits
from op_cases import GRAD_DTYPES, REDUCTIONS, Case, left_shape, make_mask
from simt_capture import FAR, ORDERS, WRITES, capture, far_memory, kernels

SPLIT = ("sum", "mean", "norm", "absmax")


def out_of(grad, reduce, dims, dtype=torch.float32):
    shape = left_shape(Case(tuple(grad.shape), "", grad.dtype, dtype, reduce, dims, ""))
    return torch.full(shape, math.nan, dtype=dtype)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_sizes_around_every_vector_and_tile(grad_dtype, reduce):
    heights = itertools.cycle((1, 2, 3, 7, 8, 9, 31, 32, 33, 129))
    orders = itertools.cycle(ORDERS)
    for around in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        for inner in {around - 1, around, around + 1} - {0}:
            grad = torch.randn(2, next(heights), inner).to(grad_dtype)
            for dims in ((1,), (2,)):
                out = out_of(grad, reduce, dims, torch.bfloat16)
                capture(out, grad, reduce, dims, order=next(orders))
                assert_captured(out, grad, reduce, dims, what=(grad.shape, dims))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_unaligned_pointers_and_strides(grad_dtype, reduce):
    """The address decides which loads are used; an address must be no multiple of 16 for anything but its element."""
    for shift_in, shift_out, pitch in itertools.product((0, 1, 2, 3, 8), (0, 1, 2, 4), (32, 33, 36)):
        memory = torch.randn(2 * 5 * pitch + shift_in).to(grad_dtype)
        grad = memory[shift_in:].view(2, 5, pitch)[:, :, :32]
        for dims in ((1,), (2,)):
            size = out_of(grad, reduce, dims).shape
            target = torch.full((size.numel() + 16,), math.nan, dtype=torch.float16)
            out = target[shift_out : shift_out + size.numel()].view(size)
            capture(out, grad, reduce, dims)
            assert_captured(out, grad, reduce, dims, what=(shift_in, shift_out, pitch))
            out.fill_(math.nan)
            assert target.isnan().all()


@pytest.mark.parametrize("reduce", SPLIT)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_the_address_changes_no_bit(grad_dtype, reduce):
    """The order of additions comes from sizes and strides alone."""
    for shape, dims in (((2, 50, 64), (1,)), ((2, 50, 64), (2,)), ((9000, 1, 64), (0,)), ((2, 40000), (1,))):
        grad, results = torch.randn(shape).to(grad_dtype), []
        for shift in (0, 1, 3):
            moved = torch.empty(grad.numel() + 16, dtype=grad_dtype)[shift : shift + grad.numel()].view(shape)
            moved.copy_(grad)
            results.append(out_of(grad, reduce, dims, torch.float64 if grad_dtype == torch.float64 else torch.float32))
            capture(results[-1], moved, reduce, dims)
        for result in results[1:]:
            assert_same_bits(result, results[0], (shape, dims))


@pytest.mark.parametrize("reduce", SPLIT)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_split_reductions(grad_dtype, reduce):
    n = (256 << 10) // grad_dtype.itemsize  # elements of a few blocks
    orders = itertools.cycle(ORDERS)
    for shape, dims in (
        ((n // 8, 1, 8), (0,)),
        ((n // 3, 1, 3), (0,)),
        ((2, n + 77), (1,)),
        ((3, n // 60 + 1, 61), (1, 2)),
    ):
        grad = torch.randn(shape).to(grad_dtype)
        for kind in ("none", "random"):
            mask, results = make_mask(shape, kind), []
            for order in (next(orders), next(orders)):
                out, counters = out_of(grad, reduce, dims), torch.zeros(3, dtype=torch.int64)
                outcome = capture(out, grad, reduce, dims, mask, 0.5, counters=counters, order=order)
                assert outcome.scratch_bytes > 0, "not split"
                assert_captured(out, grad, reduce, dims, mask, 0.5, (shape, kind))
                assert counters.tolist() == [0, 0, 1]
                results.append(out)
            assert_same_bits(*results)


@pytest.mark.parametrize("reduce", SPLIT)
def test_nothing_and_nan_in_split_reductions(reduce):
    grad = torch.randn(2, 30000, 4)
    mask = torch.zeros(2, 30000, dtype=torch.bool)
    mask[1, 29999] = True
    for value in (1.0, math.nan, math.inf):
        grad[1, 29999, 2] = value
        out, counters = out_of(grad, reduce, (1,)), torch.zeros(3, dtype=torch.int64)
        assert capture(out, grad, reduce, (1,), mask, counters=counters).scratch_bytes > 0
        assert_captured(out, grad, reduce, (1,), mask)
        assert counters.tolist() == [(~out.isfinite()).sum(), 0, 1]


FEW_BLOCKS = {"blocks": ("kMostBlocks = 1 << 30", "kMostBlocks = 2")}
TAKEN = "results.take(split, outer, 0, row_base + at.out, sum, n);\n    }\n"
NO_BARRIERS = {
    "columns": ("    __syncthreads();  // the next item writes the same shared memory\n", ""),
    "rows": (TAKEN + "    __syncthreads();\n", TAKEN),
}


def rounds_of(library, grad, reduce, dims):
    """The results in several orders of fibers, with two blocks for everything."""
    found = []
    for order in (*ORDERS, 4, 5):
        out, counters = out_of(grad, reduce, dims), torch.zeros(3, dtype=torch.int64)
        capture(out, grad, reduce, dims, counters=counters, order=order, library=library)
        found.append((out, counters))
    return found


@pytest.mark.long
def test_blocks_that_take_more_than_one_item():
    """The grid is never smaller than the work below 2^30 blocks, so here its limit is 2."""
    library = kernels(str(simt_build.changed_kernels("few_blocks", **FEW_BLOCKS)))
    for reduce, grad_dtype in zip(REDUCTIONS, itertools.cycle((torch.float32, torch.bfloat16)), strict=False):
        for shape in ((3, 20, 70), (3, 4, 260), (1, 9000, 3)):
            grad = torch.randn(shape).to(grad_dtype)
            for dims in ((1,), (2,), (0, 2)):
                found = rounds_of(library, grad, reduce, dims)
                assert_captured(found[0][0], grad, reduce, dims)
                for out, counters in found:
                    assert_same_bits(out, found[0][0])
                    assert counters.tolist() == [0, 0, 1]


@pytest.mark.long
def test_the_kernels_need_their_barrier_between_items():
    """What the test above would see if the barriers weren't there."""
    changes = FEW_BLOCKS | NO_BARRIERS
    library = kernels(str(simt_build.changed_kernels("no_barriers", **changes)))
    for dims, reduce in itertools.product(((1,), (2,)), ("sum", "absmax")):
        found = rounds_of(library, torch.randn(5, 300, 515), reduce, dims)
        assert any(not torch.equal(out, found[0][0]) for out, _ in found), dims


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("width, reduce", [(8, "none"), (5, "none"), (8, "sum"), (5, "last"), (3, "mean")])
def test_rows_land_at_the_cursor(width, reduce):
    """Three steps of two rows: set, then advanced; the kernels read it when they run."""
    for grad_dtype, height in ((torch.float32, 7), (torch.bfloat16, 40000)):
        shape = (2, width) if reduce == "none" else (2, height, width)
        ring = torch.full((11, width), math.nan)
        cursor, counters = torch.tensor([99]), torch.zeros(3, dtype=torch.int64)
        kernels().simt_set_cursor(pointer(cursor), ctypes.c_int64(3))
        assert cursor.item() == 3
        for row in (3, 5, 7):
            grad = torch.randn(shape).to(grad_dtype)
            out, before = ring[:2], ring.clone()
            outcome = capture(
                out, grad, reduce, (1,), cursor=cursor, row_elements=width, counters=counters, order=row % 4
            )
            assert (outcome.scratch_bytes > 0) == (height > 7 and reduce in SPLIT)
            assert cursor.item() == row
            assert_captured(ring[row : row + 2], grad, reduce, (1,))
            before[row : row + 2] = ring[row : row + 2]
            assert_same_bits(ring, before)
            assert kernels().simt_advance(pointer(cursor), ctypes.c_int64(2)) == 0
            assert cursor.item() == row + 2
        assert counters[WRITES] == 3


@pytest.mark.parametrize("reduce", ["none", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_recorded_launches_the_kernel_of_one_that_is(dtype, reduce):
    """What warms up a recording must load what the recording launches: a width of which no vector fits counts, too."""
    used = set()
    for width in range(8, 33, 4):
        shape = (2, width) if reduce == "none" else (2, 7, width)
        ring, kernel = torch.full((8, width), math.nan, dtype=dtype), []
        for cursor in (None, torch.tensor([0])):
            capture(ring[:2], torch.randn(shape).to(dtype), reduce, (1,), cursor=cursor, row_elements=width)
            kernel.append(kernels().simt_last_kernel())
        assert kernel[0] == kernel[1]
        used.add(kernel[0])
    assert len(used) == (1 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(
    "strides", [(FAR, 16, 1), (16, FAR, 1), (64, 3, FAR), (FAR + 1, 8, 1)], ids=["outer", "reduced", "inner", "odd"]
)
def test_offsets_of_the_gradient_beyond_32_bits(strides, reduce):
    values = torch.randn(2, 3, 8).bfloat16()
    n = sum((s - 1) * stride for s, stride in zip(values.shape, strides, strict=True)) + 1
    grad = far_memory(n, torch.bfloat16).as_strided(values.shape, strides)
    grad.copy_(values)
    for dims in ((1,), (2,), (0,)):
        out = out_of(values, reduce, dims)
        capture(out, grad, reduce, dims)
        assert_captured(out, values, reduce, dims)


@pytest.mark.parametrize("reduce", ["none", "sum", "last"])
def test_offsets_of_out_mask_and_cursor_beyond_32_bits(reduce):
    values = torch.randn(3, 2, 8)
    picked = out_of(values, reduce, (1,), torch.bfloat16)
    memory = far_memory(3 * FAR, torch.bfloat16)
    out = memory.as_strided(picked.shape, (FAR, *picked.stride()[1:]))
    mask = far_memory(2 * FAR + 2, torch.bool).as_strided((3, 2), (FAR, 1))
    mask.copy_(torch.tensor([[True, False], [True, True], [False, True]]))
    counters = torch.zeros(3, dtype=torch.int64)
    capture(out, values, reduce, (1,), mask, counters=counters)
    assert_captured(out.clone(), values, reduce, (1,), mask)
    row = memory.as_strided(picked.shape, picked.stride())
    capture(row, values, reduce, (1,), cursor=torch.tensor([FAR // 4]), row_elements=8)
    assert_captured(memory[FAR // 4 * 8 :][: picked.numel()].view(picked.shape), values, reduce, (1,))
    assert counters.tolist() == [0, 0, 1]


def test_what_the_library_tells():
    out = (ctypes.c_int * 6)()
    kernels().simt_status(out)
    assert list(out) == [0, 1, 13000, 13000, 9, 0]
    assert kernels().simt_error(0) == b"no error"
    assert kernels().simt_error(9) == b"invalid configuration argument"
