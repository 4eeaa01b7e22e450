"""A capture on a GPU: the right rows in both attachments, on any stream, without a wait and without an allocation."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_captured, assert_same_bits, assert_untouched
from models import Residual, uneven

import tlfast

POINTS = ["embed", "hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1", "blocks.0.down"]
REDUCTIONS = ("none", "sum", "mean", "last", "norm", "absmax")
B, P, WIDTH = 3, 9, 40


@pytest.fixture
def model(gpu):
    return Residual(width=WIDTH).to(gpu.device)


def batches(gpu, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (B, P), generator=generator).to(gpu.device) for _ in range(n)]


def loss(model, tokens):
    logits = model(tokens)
    weight = torch.arange(logits.numel(), device=logits.device).reshape(logits.shape) / logits.numel()
    return (logits * (weight - 0.5)).sum() + logits.square().sum() / 7


def whole_gradients(model, tokens):
    """Every gradient as it is, by the Python backend."""
    with tlfast.capture(model, POINTS, rows=B, attach="tensor", backend="python") as cap:
        loss(model, tokens).backward()
    return {name: cap[name].cpu() for name in POINTS}


def test_the_weights_make_uneven_gradients():
    x = torch.zeros(2, 3, requires_grad=True)
    assert len(set(torch.autograd.grad(uneven(x), x)[0].flatten().tolist())) == 6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_rows_of_both_attachments(gpu, model, attach, reduce, masked):
    given = batches(gpu, 2)
    mask = torch.ones(B, P, dtype=torch.bool)
    mask[0, 4:] = mask[2, :3] = False
    with tlfast.capture(model, POINTS, reduce=reduce, dtype=torch.bfloat16, rows=7, attach=attach) as cap:
        assert cap.backend == "native"
        for tokens in given:
            if masked:
                with cap.batch(mask=mask.to(gpu.device)):
                    loss(model, tokens).backward()
            else:
                loss(model, tokens).backward()
    for number, tokens in enumerate(given):
        right = whole_gradients(model, tokens)
        for name in POINTS:
            rows = cap[name][number * B : (number + 1) * B]
            assert rows.device == gpu.device
            assert_captured(rows.cpu(), right[name], reduce, (1,), mask if masked else None, what=name)
    for name in POINTS:
        assert_untouched(cap._columns[name].rows.cpu(), 2 * B)
        assert cap.counts[name] == {"nonfinite": 0, "saturated": 0}


@pytest.mark.parametrize("calls", ["sum", "stack", "last"])
def test_a_module_called_more_than_once(gpu, calls):
    torch.manual_seed(0)
    shared = torch.nn.Linear(WIDTH, WIDTH).to(gpu.device)
    x = torch.randn(B, P, WIDTH).to(gpu.device)

    def backward():
        y = x
        for _ in range(3):
            y = torch.tanh(shared(y))
        y.square().sum().backward()

    caps = {}
    for backend in ("native", "python"):
        with tlfast.capture(shared, "", reduce="none", rows=4, calls=calls, backend=backend) as caps[backend]:
            backward()
    assert_same_bits(caps["native"][""].cpu(), caps["python"][""].cpu())


def test_what_is_not_finite_is_counted_on_the_device(gpu):
    linear = torch.nn.Linear(4, 4).to(gpu.device)
    with tlfast.capture(linear, "", dtype=torch.float16, rows=4) as cap:
        out = linear(torch.ones(2, 3, 4, device=gpu.device))
        scale = torch.ones(2, 3, 4)
        scale[0, 0, 0], scale[1, 2, 3], scale[1, 0, 0] = float("nan"), float("inf"), 1e6
        (out * scale.to(gpu.device)).sum().backward()
        assert cap.counters[0].device == gpu.device
    assert cap.counts[""] == {"nonfinite": 3, "saturated": 1}


@pytest.mark.parametrize("busy", ["forward", "backward", "neither"])
def test_any_stream_may_be_the_current_one(gpu, model, attach, busy):
    given = batches(gpu, 3)
    right = [whole_gradients(model, tokens) for tokens in given]
    gpu.finish()
    with gpu.side_stream(), tlfast.capture(model, POINTS, reduce="sum", rows=3 * B, attach=attach) as cap:
        for tokens in given:
            if busy == "forward":
                gpu.busy()
            held = loss(model, tokens)
            if busy == "backward":
                gpu.busy()
            held.backward()
        rows = {name: cap[name].cpu() for name in POINTS}  # ordered behind the kernels, on this stream
    for number in range(3):
        for name in POINTS:
            assert_captured(rows[name][number * B : (number + 1) * B], right[number][name], "sum", (1,), what=name)


def test_streams_take_turns_over_one_ring(gpu, model):
    given = batches(gpu, 4)
    right = [whole_gradients(model, tokens) for tokens in given]
    with tlfast.capture(model, POINTS, reduce="mean", rows=4 * B) as cap:
        for tokens in given:
            gpu.finish()
            with gpu.side_stream():
                gpu.busy()
                loss(model, tokens).backward()
        gpu.finish()
    for number in range(4):
        for name in POINTS:
            rows = cap[name][number * B : (number + 1) * B].cpu()
            assert_captured(rows, right[number][name], "mean", (1,), what=name)


def test_an_allocation_is_noticed(gpu):
    assert gpu.n_allocations(lambda: torch.empty(5000, device=gpu.device)) >= 1
    assert gpu.n_allocations(lambda: None) == 0


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_step_neither_waits_nor_allocates(gpu, model, reduce):
    """The same step allocates as often with taps as without: only the model does."""
    tokens, mask = batches(gpu, 1)[0], torch.ones(B, P, dtype=torch.bool, device=gpu.device)

    def steps(n):
        with gpu.no_wait():
            for _ in range(n):
                loss(model, tokens).backward()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with tlfast.freeze(model):
        steps(2)
        bare = gpu.n_allocations(lambda: steps(3))
        capture = tlfast.capture(model, POINTS, reduce=reduce, dtype=torch.bfloat16, rows=100)
        with capture as cap, cap.batch(mask=mask):
            steps(2)  # the first allocates rows and counters
            taken = gpu.n_allocations(lambda: steps(3))
    assert taken == bare > 0
    assert cap.rows == 5 * B
