"""Rows on a GPU that go into a dataset from one's own loop, and into a training loop: those of `collect`."""

from __future__ import annotations

import pytest
import torch
from poisoned_rows import files_of, poisoned, poisoned_loss
from tiny_models import POINTS, collect, sequences, tiny_model

import tlfast
from tlfast.collecting.batches import Batching, as_examples
from tlfast.dataset import Plan

EXAMPLES = poisoned(sequences(40, longest=24), (5, 11))
SETTINGS = {"rows_per_unit": 12, "dtype": torch.float16, "loss": poisoned_loss}


@pytest.fixture
def there(gpu, tmp_path):
    """A dataset made on the device without graphs."""
    model = tiny_model().to(gpu.device)
    collect(model, tmp_path / "collected", EXAMPLES, backend="native", cuda_graph="off", batch_tokens=72, **SETTINGS)
    return tlfast.open_dataset(tmp_path / "collected")


def test_the_bytes_of_a_loop_are_those_of_collect(gpu, there, tmp_path):
    model, batching, known = tiny_model().to(gpu.device).eval(), Batching(72), as_examples(EXAMPLES)
    with (
        tlfast.freeze(model),
        tlfast.capture(model, POINTS["gpt2"], reduce="mean", rows=12, dtype=torch.float16, backend="native") as cap,
        cap.into(tmp_path / "own", plan=Plan(40, 12), header=there.header) as out,
    ):
        for unit in out.units:
            part = known[unit.start : unit.stop]
            for rows, batch in batching.batches(part, batching.order(part)):
                batch = batch.to(gpu.device)
                with cap.batch(batch.mask, ids=[part[k] for k in rows]):
                    poisoned_loss(model, batch).backward()
    assert files_of(tmp_path / "own") == files_of(tmp_path / "collected")


def test_streamed_rows_are_those_of_collect(gpu, there):
    settings = {"buffer_rows": 30, "batch_size": 8, "backend": "native", "batch_tokens": 72} | SETTINGS
    seen = []
    for batch in tlfast.stream(tiny_model().to(gpu.device), EXAMPLES, POINTS["gpt2"], non_finite="keep", **settings):
        for point in there.points:
            assert batch[point].device.type == gpu.device.type
            assert torch.equal(batch[point].cpu(), there[point][batch["id"].tolist()])
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(40))
    with pytest.raises(FloatingPointError, match=r"NaN or infinity in example \d+ of u00000"):
        list(tlfast.stream(tiny_model().to(gpu.device), EXAMPLES, POINTS["gpt2"], **settings))
