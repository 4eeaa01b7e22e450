"""The fused op refuses bad arguments before a byte is written, with the same text from both backends."""

import pytest
import torch
from op_cases import nans, run_op

import tlfast
import tlfast.backends.reference

GRAD = torch.ones(2, 3, 4)
STORED = "capture: out must be float32, bfloat16 or float16 (float64 for float64 gradients), got {}. "
STORED += "Choose another stored dtype."
RAGGED = "capture: mask must have the leading sizes of a gradient of shape [2, 3, 4], got {}. "
RAGGED += "Pass the attention mask of this very batch."


REFUSED = {
    "dim out of range": (
        (nans(2, 4), GRAD, "sum", (3,)),
        "capture: over must name dimensions of a 3-d gradient, got 3. Check the gradient's shape.",
    ),
    "negative dim out of range": (
        (nans(2, 4), GRAD, "sum", (-4,)),
        "capture: over must name dimensions of a 3-d gradient, got -4. Check the gradient's shape.",
    ),
    "dim named twice": (
        (nans(2, 4), GRAD, "sum", (1, -2)),
        "capture: over must name each dimension once, got (1, -2). Remove the repeated one.",
    ),
    "0-d gradient": (
        (nans(), torch.tensor(1.0), "mean", (0,)),
        "capture: over must name dimensions of a 0-d gradient, got 0. Check the gradient's shape.",
    ),
    "out too small": (
        (nans(2, 3), GRAD, "sum", (1,)),
        "capture: out must have shape [2, 4], got [2, 3]. Check over= and shapes.",
    ),
    "out not resized": (
        (nans(0), GRAD, "sum", (1,)),
        "capture: out must have shape [2, 4], got [0]. Check over= and shapes.",
    ),
    "out broadcastable": (
        (nans(1, 2, 4), GRAD, "sum", (1,)),
        "capture: out must have shape [2, 4], got [1, 2, 4]. Check over= and shapes.",
    ),
    "out of integers": (
        (torch.full((2, 4), 7), GRAD, "sum", (1,)),
        STORED.format("torch.int64"),
    ),
    "float64 out for a float32 gradient": (
        (nans(2, 4, dtype=torch.float64), GRAD, "sum", (1,)),
        STORED.format("torch.float64"),
    ),
    "gradient of integers": (
        (nans(2, 4), GRAD.long(), "sum", (1,)),
        "capture: grad must be float32, bfloat16, float16 or float64, got torch.int64. Cast it first.",
    ),
    "complex gradient": (
        (nans(2, 4), GRAD.to(torch.complex64), "sum", (1,)),
        "capture: grad must be float32, bfloat16, float16 or float64, got torch.complex64. Cast it first.",
    ),
    "float8 gradient": (
        (nans(2, 4), GRAD.to(torch.float8_e4m3fn), "sum", (1,)),
        "capture: grad must be float32, bfloat16, float16 or float64, got torch.float8_e4m3fn. Cast it first.",
    ),
    "sparse gradient": (
        (nans(2, 4), GRAD.to_sparse(), "sum", (1,)),
        "capture: grad must be dense, got torch.sparse_coo. Turn sparse=True off in the embedding.",
    ),
    "mask of integers": (
        (nans(2, 4), GRAD, "sum", (1,), torch.ones(2, 3, dtype=torch.long)),
        "capture: mask must be boolean, got torch.int64. Use mask.bool(); True means a real token.",
    ),
    "mask of another batch": (
        (nans(2, 4), GRAD, "sum", (1,), torch.ones(1, 3, dtype=torch.bool)),
        RAGGED.format([1, 3]),
    ),
    "mask of another length": (
        (nans(2, 4), GRAD, "sum", (1,), torch.ones(2, 4, dtype=torch.bool)),
        RAGGED.format([2, 4]),
    ),
    "mask with too many dimensions": (
        (nans(2, 4), GRAD, "sum", (1,), torch.ones(2, 3, 4, 1, dtype=torch.bool)),
        RAGGED.format([2, 3, 4, 1]),
    ),
    "mask without dimensions": (
        (nans(2, 4), GRAD, "sum", (1,), torch.tensor(True)),
        RAGGED.format([]),
    ),
}


@pytest.mark.parametrize("arguments, text", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(backend, arguments, text):
    out = arguments[0]
    before = out.clone()
    with pytest.raises(ValueError, match=r"^capture: \w+ must .*, got ") as error:
        run_op(backend, *arguments)
    assert str(error.value) == text
    assert out.shape == before.shape
    assert torch.equal(out.nan_to_num(5.0), before.nan_to_num(5.0))
    assert torch.equal(out.isnan(), before.isnan())


PUBLIC = {
    "unknown reduction": (
        {"reduce": "average"}, ValueError,
        "reduce_into: reduce must be one of none, sum, mean, last, norm, absmax, got 'average'. Check the spelling.",
    ),
    "unknown name": (
        {"over": "position"}, ValueError,
        'reduce_into: over must be "batch", "pos" or dimension numbers, got \'position\'. Write -1 for the last one.',
    ),
    "a float": (
        {"over": 1.0}, TypeError,
        'reduce_into: over must be "batch", "pos" or dimension numbers, got 1.0. Write -1 for the last one.',
    ),
    "a bool": (
        {"over": (True,)}, TypeError,
        'reduce_into: over must be "batch", "pos" or dimension numbers, got True. Write -1 for the last one.',
    ),
    "no dimension": (
        {"over": ()}, ValueError,
        'reduce_into: over must name at least one dimension, got (). Use reduce="none" to keep everything.',
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong, kind, text", PUBLIC.values(), ids=PUBLIC)
def test_reduce_into_refuses(wrong, kind, text):
    out = nans(2, 4)
    with pytest.raises(kind) as error:
        tlfast.reduce_into(out, GRAD, **wrong)
    assert str(error.value) == text
    assert out.isnan().all()


@pytest.mark.sanitize
def test_the_op_itself_refuses_unknown_reductions(native):
    with pytest.raises(
        ValueError, match="capture: reduce must be one of none, sum, mean, last, norm, absmax, got 'avg'"
    ):
        torch.ops.tlfast.capture(nans(2, 4), GRAD, "avg", [1])


def test_out_that_overlaps_itself_is_refused(backend):
    memory = nans(4)
    with pytest.raises((ValueError, RuntimeError)):
        run_op(backend, memory.expand(2, 4), GRAD, "sum", (1,))
    assert memory.isnan().all()


def test_out_that_overlaps_the_gradient_is_right_or_refused(backend):
    for start in range(17):
        memory = torch.arange(24.0)
        grad, right = memory.view(2, 3, 4), memory.view(2, 3, 4).sum(1)
        out = memory[start : start + 8].view(2, 4)
        try:
            run_op(backend, out, grad, "sum", (1,))
        except (ValueError, RuntimeError):
            assert torch.equal(memory, torch.arange(24.0))
        else:
            assert torch.equal(out, right), start
