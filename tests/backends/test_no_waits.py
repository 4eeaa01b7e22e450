"""No value of a tensor is asked for in a step: on a GPU each such question would stop the host until the GPU is there.

It is seen without a GPU, in the operations that are called. What isn't seen so are copies to the host and `tolist`.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import sequences
from torch.utils._python_dispatch import TorchDispatchMode

import tlfast
import tlfast.backends.column
from tlfast.backends import reference
from tlfast.backends.column import Step
from tlfast.backends.recipe import Seen
from tlfast.collecting.batches import Batching, as_examples
from tlfast.collecting.unit import Runner
from tlfast.spec import REDUCTIONS

aten = torch.ops.aten


class NoQuestions(TorchDispatchMode):
    """AssertionError for an operation whose result, or whose size, the host needs the values for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asks = func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        if func in (aten.index.Tensor, aten.index_put_.default):
            asks = any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not asks, f"{func} asks for values"
        return func(*args, **(kwargs or {}))


def put(mask, tensor):
    tensor[mask] = torch.zeros(2)


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: int(x.isfinite().sum()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: put(x > 0, x),
    ],
)
def test_a_question_is_noticed(question):
    x = torch.ones(2)
    with NoQuestions(), pytest.raises(AssertionError, match="asks for values"):
        question(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_reference_asks_for_no_value(reduce, masked, dtype):
    grad = torch.randn(3, 5, 4, dtype=torch.float64)
    out = torch.empty((3, 5, 4) if reduce == "none" else (3, 4), dtype=dtype)
    mask = torch.ones(3, 5, dtype=torch.bool) if masked else None
    with NoQuestions():
        counts = reference.capture(out, grad, reduce, (1,), mask, 0.5)
    assert counts.tolist() == [0, 0]


def test_counts_are_kept_where_the_rows_are():
    column = tlfast.backends.column.Column("point", "none", (), torch.float16, 2, "raise", "grad", None, None, None)
    assert column.counted == (0, 0)
    grad = torch.tensor([[1e6, float("nan"), 1.0], [float("inf"), -1e6, 2.0]])
    with NoQuestions():
        column.write(0, Seen(grad), Step(None, 1.0))
        column.write(0, Seen(grad), Step(None, 1.0))
    assert column.counters.dtype == torch.int64
    assert column.counters.device == column.rows.device
    assert column.counted == (8, 4)


@pytest.mark.parametrize("calls", ["raise", "sum", "last", "stack"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_step_asks_for_no_value(backend, padding_side, calls):
    model = torch.nn.Sequential(torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256))
    with (
        tlfast.freeze(model),
        tlfast.capture(
            model, "1", reduce="mean", dtype=torch.float16, rows=16, backend=backend, calls=calls, missing="nan"
        ) as cap,
    ):
        runner = Runner(model, cap, Batching(32, None, padding_side), summed_loss, 8.0)
        with NoQuestions():
            places, _ = runner.fill_ring(as_examples(sequences(16)), lambda n_examples, n_tokens: None)
            counters, missing = cap.counters, cap.missing
        assert sorted(places.tolist()) == list(range(16))
        assert [counter[:2].tolist() for counter in counters] == [[0, 0]]
        assert not missing["1"].any()


def summed_loss(model, batch):
    """`next_token_loss` refuses left padding for a model without an attention_mask."""
    embedded = model[0](batch.input_ids)
    if batch.position_ids is not None:
        embedded = embedded + batch.position_ids[..., None]
    logits = model[1](embedded).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch.next_tokens.flatten(), ignore_index=-100, reduction="sum")
