"""The fused op of products: the right number over a table of both operands, from both backends; bits; oracles."""

import itertools
import math

import pytest
import torch
from comparison import assert_captured, assert_close_to_truth, assert_same_bits, truth
from drawn_cases import OUT_LAYOUTS, odd_product
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    GRAD_DTYPES,
    HALVES,
    MASKS,
    OF_PRODUCTS,
    REF_LAYOUTS,
    Case,
    left_shape,
    make_gradient,
    make_mask,
    make_out,
    make_ref,
    product_cases,
    run_op,
    stored_dtypes,
)

import tlfast
import tlfast.backends.reference

PAIRS = list(itertools.product(GRAD_DTYPES, GRAD_DTYPES))


def check(backend: str, case: Case, out_layout: str = "rows") -> torch.Tensor:
    """Run one case into memory full of NaN, and check the value and that nothing else was written."""
    grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
    ref = make_ref(case)
    memory, out = make_out(left_shape(case), case.dtype, out_layout)
    run_op(backend, out, grad, case.reduce, case.dims, mask, case.scale, ref)
    result = out.clone()
    assert_captured(result, grad, case.reduce, case.dims, mask, case.scale, case, ref)
    out.fill_(math.nan)
    assert torch.isnan(memory).all(), f"{case}: written outside of out"
    return result


@pytest.mark.sanitize
@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_whole_table(backend, grad_dtype, reduce):
    out_layouts = itertools.cycle(("rows", "sliced", "rows", "transposed", "rows"))
    n = 0
    for case in product_cases(grad_dtype, reduce, 0.2 if backend == "native" else 0.1):
        check(backend, case, next(out_layouts))
        n += 1
    assert n > 20


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype, ref_dtype", PAIRS, ids=str)
def test_every_pair_of_dtypes(backend, grad_dtype, ref_dtype, reduce):
    masks = itertools.cycle(MASKS)
    for dtype, layout in itertools.product(stored_dtypes(grad_dtype), REF_LAYOUTS):
        for dims in ((1,), (2,)):
            check(backend, Case((3, 6, 33), "contiguous", grad_dtype, dtype, reduce, dims, next(masks), 1.0,
                                layout, ref_dtype))  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("reduce", OF_PRODUCTS)
def test_more_than_one_block_piece_and_thread(native, reduce):
    torch.set_num_threads(2)
    shapes = (
        ((2, 40, 5000), (1,)),
        ((70, 70, 9), (0, 1)),
        ((3, 70000), (1,)),
        ((65, 33, 35), (0, 2)),
        ((2, 300, 8), (1, 2)),
    )
    for (shape, dims), ref_dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        for mask in ("none", "random"):
            check("native", Case(shape, "contiguous", torch.float32, torch.bfloat16, reduce, dims, mask, 1.0,
                                 "contiguous", ref_dtype))  # fmt: skip


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype", GRAD_DTYPES, ids=str)
def test_the_reference_in_float64_is_the_truth(grad_dtype, reduce):
    for case in product_cases(grad_dtype, reduce, 0.1):
        grad, mask, ref = (
            make_gradient(case.shape, case.layout, case.grad_dtype),
            make_mask(case.shape, case.mask),
            make_ref(case),
        )
        out = torch.empty(left_shape(case), dtype=torch.float64)
        run_op("python", out, grad.double(), reduce, case.dims, mask, ref=ref)
        value, moved = truth(grad.double(), reduce, case.dims, mask, ref=ref)
        assert_close_to_truth(out, value, moved, case)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def check_odd_ones(backend, data):
    case = odd_product(data, REF_LAYOUTS, OF_PRODUCTS)
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    check(backend, case, data.draw(OUT_LAYOUTS))


def test_odd_ones(backend):
    check_odd_ones(backend)


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
@pytest.mark.parametrize("grad_dtype, ref_dtype", PAIRS, ids=str)
def test_the_bits_are_those_of_the_product_as_a_gradient(native, grad_dtype, ref_dtype, reduce):
    """Each product is rounded to the accumulator's type, and what adds them up is the kernel for gradients."""
    wide = tlfast.backends.reference.accumulator(grad_dtype)
    for shape, dims in (((2, 37, 700), (1,)), ((3, 5, 2500), (2,)), ((2, 130, 48), (1, 2)), ((2, 9, 31, 4), (0, 2))):
        grad, ref, mask = (
            torch.randn(shape).to(grad_dtype),
            torch.randn(shape).to(ref_dtype),
            make_mask(shape, "random"),
        )
        out, want = (torch.full(left_shape(Case(shape, "", wide, wide, reduce, dims, "")), math.nan) for _ in range(2))
        run_op("native", out, grad, reduce, dims, mask, 0.3, ref)
        run_op("native", want, grad.to(wide) * ref.to(wide), reduce, dims, mask, 0.3)
        assert_same_bits(out, want, (shape, dims))


@pytest.mark.parametrize("reduce", OF_PRODUCTS)
def test_same_bits_for_every_thread_count_and_run(native, reduce):
    for shape, dims in (((4, 100, 700), (1,)), ((300, 300), (0, 1)), ((3, 50000), (1,)), ((64, 8, 64), (0, 2))):
        grad, ref, mask = torch.randn(shape), torch.randn(shape).bfloat16(), make_mask(shape, "random")
        results = []
        for n_threads in (1, 2, 3, 1):
            torch.set_num_threads(n_threads)
            out = torch.empty(left_shape(Case(shape, "", grad.dtype, grad.dtype, reduce, dims, "")))
            run_op("native", out, grad, reduce, dims, mask, ref=ref)
            results.append(out)
        for other in results[1:]:
            assert_same_bits(other, results[0])


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_what_the_mask_leaves_out_is_not_multiplied(backend, special):
    for grad_dtype, ref_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float64)):
        grad, ref = torch.randn(2, 4, 9).to(grad_dtype), torch.randn(2, 4, 9).to(ref_dtype)
        mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
        grad[0, 1], ref[1, 0] = special, special
        for reduce, dims in itertools.product(OF_PRODUCTS, ((1,), (1, 2), (0, 1))):
            out = torch.empty(left_shape(Case((2, 4, 9), "", grad_dtype, torch.float32, reduce, dims, "")))
            run_op(backend, out, grad, reduce, dims, mask, ref=ref)
            assert out.isfinite().all()
            assert_captured(out, grad, reduce, dims, mask, ref=ref)


def test_nan_and_inf_pass_through(backend):
    grad, ref = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    grad[0, 0, 0], ref[0, 0, 1], ref[0, 1, 2], grad[0, 1, 2], ref[0, 2, 3] = math.nan, -math.inf, math.inf, 0.0, 3e38
    grad[0, 2, 3] = 1e3  # overflows in float32
    out = torch.empty(1, 4)
    run_op(backend, out, grad, "sum", (1,), ref=ref)
    assert out.isnan().tolist() == [[True, False, True, False]]
    assert out[0, 1] == -math.inf
    assert out[0, 3] == math.inf


def test_zero_sizes(backend):
    for shape, dims, left in (
        ((0, 3), (1,), (0,)),
        ((2, 0, 3), (1,), (2, 3)),
        ((2, 0), (1,), (2,)),
        ((2, 3, 0), (1,), (2, 0)),
    ):
        grad = torch.ones(shape)
        for reduce, value in (("sum", 0.0), ("mean", math.nan), ("last", math.nan)):
            out = torch.full(left, 7.0)
            run_op(backend, out, grad, reduce, dims, ref=grad.bfloat16())
            assert_same_bits(out, torch.full(left, value))


def test_the_sum_is_the_derivative_by_a_factor_on_the_activation(backend):
    """What attribution patching adds up, by autograd itself: d loss / d factor, of each example and head."""
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5)).double()
    act = torch.randn(4, 6, 12, dtype=torch.float64, requires_grad=True)
    factor = torch.ones(4, 6, 3, 1, dtype=torch.float64, requires_grad=True)
    loss = model((act.view(4, 6, 3, 4) * factor).view(4, 6, 12)).square().sum()
    grad, want = torch.autograd.grad(loss, (act, factor))
    heads = torch.empty(4, 6, 3, dtype=torch.float64)
    run_op(backend, heads, grad.unflatten(-1, (3, 4)), "sum", (-1,), ref=act.detach().unflatten(-1, (3, 4)))
    torch.testing.assert_close(heads, want.squeeze(-1), rtol=1e-12, atol=1e-12)


def test_an_activation_that_has_a_graph_is_read_as_it_is():
    act = (torch.ones(1, 3, 2, requires_grad=True) * 2).bfloat16()
    grad = torch.arange(6.0).reshape(1, 3, 2)
    out = tlfast.reduce_product_into(torch.empty(1, 3), grad, act)
    assert out.tolist() == [[2.0, 10.0, 18.0]]
    assert not out.requires_grad


def test_public_face_returns_out_and_takes_names():
    grad, ref = torch.arange(24.0).reshape(2, 3, 4), torch.arange(24.0).flip(0).reshape(2, 3, 4)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    out = torch.empty(2, 3)
    assert tlfast.reduce_product_into(out, grad, ref) is out
    assert_same_bits(out, (grad * ref).sum(-1))
    assert_same_bits(tlfast.reduce_product_into(torch.empty(2, 4), grad, ref, over="pos"), (grad * ref).sum(1))
    assert_same_bits(
        tlfast.reduce_product_into(torch.empty(2), grad, ref, "mean", (1, 2), scale=0.5), (grad * ref).mean((1, 2)) / 2
    )
    assert_same_bits(tlfast.reduce_product_into(torch.empty(2, 3, 4), grad, grad, "none"), grad * grad)
    want = torch.where(mask[..., None], grad * ref, 0.0).sum(1)
    assert_same_bits(tlfast.reduce_product_into(torch.empty(2, 4), grad, ref, "sum", "pos", mask), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_rounding(backend, dtype):
    """1 + 2^-20 twice is lost in 16 bits at each step, and is half of a step of the sum in float32."""
    grad, ref = torch.full((1, 4096, 1), 1.0).to(dtype), torch.full((1, 4096, 1), 1.0 + 2.0**-20)
    out = torch.empty(1, 1)
    run_op(backend, out, grad, "sum", (1,), ref=ref)
    assert abs(out.item() - 4096 * (1 + 2.0**-20)) <= 4096 * 4096 * 2.0**-24
    assert out.item() != 4096.0


def test_the_op_lies_in_compiled_code(native):
    def step(grad, ref):
        out = grad.new_zeros(2, 3)
        torch.ops.tlfast.capture_product(out, grad * 2, ref, "sum", [-1])
        return out

    grad, ref = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(grad, ref), step(grad, ref))
