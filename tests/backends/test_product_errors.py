"""The op of products refuses bad arguments before a byte is written, with the same text from both backends."""

import pytest
import torch
from op_cases import nans, run_op

import tlfast

GRAD, REF = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
STORED = "capture: out must be float32, bfloat16 or float16 (float64 for float64 gradients), got torch.float64. "
STORED += "Choose another stored dtype."
NOT_SUMMED = "reduce must be none, sum, mean or last where there is a ref, got '{}'. "
NOT_SUMMED += 'Keep each product by "none", and reduce these by reduce_into.'


REFUSED = {
    "a norm": ((nans(2, 3), GRAD, REF, "norm", (2,)), "capture: " + NOT_SUMMED.format("norm")),
    "a maximum": ((nans(2, 3), GRAD, REF, "absmax", (2,)), "capture: " + NOT_SUMMED.format("absmax")),
    "ref of integers": (
        (nans(2, 3), GRAD, REF.long(), "sum", (2,)),
        "capture: ref must be float32, bfloat16, float16 or float64, got torch.int64. Cast it first.",
    ),
    "ref to be broadcast": (
        (nans(2, 3), GRAD, REF[0], "sum", (2,)),
        "capture: ref must have grad's shape [2, 3, 4], got [3, 4]. Use ref.expand_as(grad).",
    ),
    "ref of another batch": (
        (nans(2, 3), GRAD, REF[:1], "sum", (2,)),
        "capture: ref must have grad's shape [2, 3, 4], got [1, 3, 4]. Use ref.expand_as(grad).",
    ),
    "ref elsewhere": (
        (nans(2, 3), GRAD, REF.to("meta"), "sum", (2,)),
        "capture: ref must be on cpu, as grad is, got meta. Move one of them.",
    ),
    "sparse ref": ((nans(2, 3), GRAD, REF.to_sparse(), "sum", (2,)),
                   "capture: ref must be dense, got torch.sparse_coo. Use to_dense()."),
    "out too small": (
        (nans(2, 4), GRAD, REF, "sum", (2,)), "capture: out must have shape [2, 3], got [2, 4]. Check over= and shapes."
    ),
    "float64 out for a float64 ref": (
        (nans(2, 3, dtype=torch.float64), GRAD, REF.double(), "sum", (2,)),
        STORED,
    ),
    "mask of integers": (
        (nans(2, 3), GRAD, REF, "sum", (2,), torch.ones(2, 3, dtype=torch.long)),
        "capture: mask must be boolean, got torch.int64. Use mask.bool(); True means a real token.",
    ),
}  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("arguments, text", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(backend, arguments, text):
    out, grad, ref, *rest = arguments
    with pytest.raises(ValueError, match=r"^capture: \w+ must ") as error:
        run_op(backend, out, grad, *rest, ref=ref)
    assert str(error.value) == text
    assert out.isnan().all()


PUBLIC = {
    "a norm": ({"reduce": "norm"}, ValueError, NOT_SUMMED.format("norm")),
    "unknown reduction": (
        {"reduce": "dot"}, ValueError,
        "reduce must be one of none, sum, mean, last, norm, absmax, got 'dot'. Check the spelling.",
    ),
    "unknown name": (
        {"over": "width"}, ValueError,
        'over must be "batch", "pos" or dimension numbers, got \'width\'. Write -1 for the last one.',
    ),
    "no tensor": ({"ref": 2.0}, TypeError, "ref must be a tensor, got float. Pass a plain one."),
}  # fmt: skip


@pytest.mark.parametrize("wrong, kind, text", PUBLIC.values(), ids=PUBLIC)
def test_reduce_product_into_refuses(wrong, kind, text):
    out = nans(2, 3)
    with pytest.raises(kind) as error:
        tlfast.reduce_product_into(out, GRAD, **({"ref": REF} | wrong))
    assert str(error.value) == f"reduce_product_into: {text}"
    assert out.isnan().all()


def test_what_the_error_names_can_be_done():
    """A norm of products by way of each product."""
    kept = tlfast.reduce_product_into(torch.empty(2, 3, 4), GRAD, REF, "none")
    assert torch.equal(tlfast.reduce_into(nans(2, 3), kept, "norm", -1), torch.full((2, 3), 4.0))


@pytest.mark.parametrize("which", ["grad", "ref"])
def test_out_that_overlaps_an_operand_is_refused(backend, which):
    memory = torch.arange(24.0)
    given = memory.view(2, 3, 4)
    grad, ref = (given, REF) if which == "grad" else (GRAD, given)
    with pytest.raises(ValueError, match="not share memory") as error:
        run_op(backend, memory[6:12].view(2, 3), grad, "sum", (2,), ref=ref)
    text = f"capture: out must not share memory with {which}, got a view of it. Pass a tensor of its own."
    assert str(error.value) == text
    assert torch.equal(memory, torch.arange(24.0))


def test_the_operands_may_be_one(backend):
    out = nans(2, 3)
    run_op(backend, out, REF, "sum", (2,), ref=REF)
    assert torch.equal(out, torch.full((2, 3), 16.0))


def test_a_lazy_view_is_resolved(backend):
    out = nans(2, 3)
    run_op(backend, out, GRAD, "sum", (2,), ref=torch._neg_view(REF))
    assert torch.equal(out, torch.full((2, 3), -8.0))
