"""A capture on real GPUs: backwards on several streams, recordings on one of them, a model spread over two."""

from __future__ import annotations

import pytest
import torch
from backends import usable
from gpu_device import Gpu
from torch import nn

import tlfast

B, P, D = 2, 3, 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request):
    """A GPU, or the CPU in its place: one queue for all streams."""
    usable("native")
    return Gpu(torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda"))


@pytest.fixture
def two_gpus(cuda):
    """The second of two CUDA devices, and the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    return torch.device("cuda", 1), torch.device("cuda", 0)


def test_a_stream_waits_for_rows_that_another_one_fills(gpu):
    model = nn.Sequential(nn.Identity())
    inputs = [torch.ones(B, P, D, device=gpu.device, requires_grad=True) for _ in range(2)]
    gpu.finish()
    with tlfast.capture(model, "0", rows=2 * B, backend="native") as cap:
        for x, busy in zip(inputs, (True, False), strict=True):
            with gpu.side_stream():
                if busy:
                    gpu.busy()
                model(x).sum().backward()
        gpu.finish()
        assert cap["0"].tolist() == torch.ones(2 * B, P, D).tolist()
        assert cap.counts["0"] == {"nonfinite": 0, "saturated": 0}


def test_a_stack_of_calls_on_a_side_stream(gpu):
    """The forward runs there, the backward is called elsewhere: what is stacked at its end was written there."""
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=10 * B, calls="stack", backend="native") as cap:
        for k in range(10):
            with gpu.side_stream():
                x = torch.full((B, P, D), float(k), device=gpu.device, requires_grad=True)
                loss = (model(model(x) * 3) * k).sum()
            gpu.busy()
            loss.backward()
        gpu.finish()
        for k in range(10):
            rows = cap["0"][k * B : k * B + B]  # [B, calls, P, D]
            assert rows.tolist() == torch.tensor([3.0 * k, k]).view(1, 2, 1, 1).expand(B, 2, P, D).tolist()


def rows_of_steps_and_replays(gpu):
    model = nn.Sequential(nn.Embedding(5, D), nn.Linear(D, D)).to(gpu.device)
    batches = [torch.randint(5, (B, P), device=gpu.device) for _ in range(3)]

    def run(tokens):
        model(tokens).square().sum().backward()

    with tlfast.freeze(model), tlfast.capture(model, "0", rows=6 * B, backend="native") as cap:
        for batch in batches:
            run(batch)
        step = gpu.graph_step(cap, run, batches[0])
        for batch in batches:
            step(batch)
        return cap["0"].cpu().split(3 * B)


def test_replays_have_the_rows_of_steps(gpu):
    torch.testing.assert_close(*rows_of_steps_and_replays(gpu))


@pytest.mark.gpu
def test_a_step_recorded_on_the_second_gpu(two_gpus):
    for device in two_gpus:  # torch's own stream for recordings is of the device that it saw first
        torch.testing.assert_close(*rows_of_steps_and_replays(Gpu(device)))


@pytest.mark.gpu
def test_a_mask_for_a_model_on_two_gpus(two_gpus):
    first, second = nn.Linear(D, D).to(two_gpus[0]), nn.Linear(D, D).to(two_gpus[1])
    model = nn.ModuleList((first, second))
    x = torch.ones(B, P, D, device=two_gpus[0], requires_grad=True)
    mask = torch.ones(B, P, dtype=torch.bool, device=two_gpus[0])
    mask[:, 1:] = False
    with tlfast.capture(model, ["0", "1"], reduce="sum", rows=B, backend="native") as cap:
        with cap.batch(mask=mask):
            second(first(x).to(two_gpus[1])).sum().backward()
        assert cap["1"].device == two_gpus[1]
        assert cap["1"].tolist() == torch.ones(B, D).tolist()
