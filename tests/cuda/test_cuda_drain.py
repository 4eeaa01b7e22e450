"""The drain on a real GPU: rows right behind slow work, and no wait of the host in a step or a drain."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
import torch
from fake_streams import FakeStreams
from gpu_device import Gpu, no_wait_of_the_host
from tiny_models import collect, sequences, tiny_model

import tlfast
from tlfast.collecting.batches import Batching, as_examples
from tlfast.collecting.drain import N_COUNTERS, CudaStreams, Drain, streams_for
from tlfast.collecting.unit import Runner
from tlfast.dataset.format.layout import Column

N_ROWS = 64
WIDTH = 1024
COLUMNS = {"a": Column(torch.float32, (WIDTH,)), "b": Column(torch.bfloat16, (2, WIDTH))}


@pytest.mark.gpu
def test_a_wait_of_the_host_is_noticed(cuda):
    with no_wait_of_the_host(), pytest.raises(RuntimeError, match="synchron"):
        torch.ones(1, device=cuda).item()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """A device and its streams: a GPU's, or fake ones that lag behind on the CPU."""
    if request.param == "cpu":
        return Gpu(torch.device("cpu")), FakeStreams(Random(1))
    device = request.getfixturevalue("cuda")
    streams = streams_for({device})
    assert isinstance(streams, CudaStreams)
    return Gpu(device), streams


@pytest.mark.parametrize("busy", ["compute", "side", "neither"])
def test_units_arrive_behind_slow_work(place, busy):
    gpu, streams = place
    drain = Drain(streams, COLUMNS, N_ROWS)
    rings = {name: torch.zeros(N_ROWS, *c.row_shape, dtype=c.dtype, device=gpu.device) for name, c in COLUMNS.items()}
    counters = [torch.zeros(N_COUNTERS, dtype=torch.int64, device=gpu.device) for _ in COLUMNS]
    base = {name: torch.arange(N_ROWS).reshape(-1, *(1 for _ in c.row_shape)) for name, c in COLUMNS.items()}
    there = {name: numbers.to(gpu.device) for name, numbers in base.items()}
    for slot in drain._slots:
        for tensor in (*slot.host.block(N_ROWS).values(), slot.host_counters):
            assert tensor.is_pinned() == gpu.real
    random, pending = Random(0), []

    def compute(unit):
        for name, ring in rings.items():
            ring.copy_((there[name] + unit).expand(ring.shape))
        for counter in counters:
            counter[:1].add_(1)

    def finish():
        unit, places, arrived = pending.pop(0)
        block, counted = arrived()
        for name, rows in block.items():
            expected = (base[name][places] + unit).expand(rows.shape).to(rows.dtype)
            assert torch.equal(rows, expected), f"unit {unit}, column {name}"
        assert counted.tolist() == [[unit + 1] + [0] * (N_COUNTERS - 1)] * len(COLUMNS)

    with gpu.side_stream():  # any stream may be the one that computes
        for unit in range(6):
            places = torch.tensor(random.sample(range(N_ROWS), N_ROWS))
            with gpu.no_wait():
                if busy != "neither":
                    streams.run(busy, gpu.busy)
                streams.run("compute", partial(compute, unit))
                arrived = drain.drain(rings, counters, places, lambda: None if len(pending) < 2 else finish())
            pending.append((unit, places, arrived))
        while pending:
            finish()


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_step_does_not_wait(place, backend, padding_side):
    gpu, _ = place
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256)).to(gpu.device)
    examples = as_examples(sequences(16))
    batching = Batching(32, None, padding_side)
    with (
        tlfast.freeze(model),
        tlfast.capture(model, "1", reduce="mean", dtype=torch.float16, rows=16, backend=backend) as cap,
    ):
        runner = Runner(model, cap, batching, summed_logits, 1.0)
        runner.fill_ring(examples, lambda n_examples, n_tokens: None)  # the first step allocates
        with gpu.no_wait():
            runner.fill_ring(examples, lambda n_examples, n_tokens: None)
        assert cap.counters[0].device == gpu.device
        assert cap.counts["1"] == {"nonfinite": 0, "saturated": 0}


def summed_logits(model, batch):
    logits = model(batch.input_ids).float()
    assert batch.position_ids is None or batch.position_ids.device == logits.device
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.next_tokens.flatten(), ignore_index=-100, reduction="sum"
    )


def test_a_collection_has_the_rows_of_the_cpu(place, backend, tmp_path):
    examples = sequences(40)
    for name, device in (("cpu", "cpu"), ("here", place[0].device)):
        model = tiny_model(dtype=torch.float64).to(device)
        collect(
            model, tmp_path / name, examples, rows_per_unit=6, backend=backend, cuda_graph="off"
        )  # fmt: skip
    there, here = (tlfast.open_dataset(tmp_path / name) for name in ("cpu", "here"))
    assert here.verify().ok
    assert here.points == there.points
    for point in there.points:
        torch.testing.assert_close(here[point][:], there[point][:])
