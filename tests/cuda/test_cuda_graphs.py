"""A step as a real CUDA graph: replays fill the rows that single steps fill, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from comparison import assert_same_bits, assert_untouched
from models import HookPoint

import tlfast

B, P, WIDTH, N = 4, 6, 24, 5


class Branches(torch.nn.Module):
    """A point called twice, one called once, and one that a gradient reaches only by a detour."""

    def __init__(self):
        super().__init__()
        self.embed, self.shared, self.hook = torch.nn.Embedding(11, WIDTH), torch.nn.Linear(WIDTH, WIDTH), HookPoint()
        self.beside, self.detour = torch.nn.Linear(WIDTH, WIDTH), False

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.beside(x)
        if self.detour:
            x = x + y
        return self.hook(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


def backward(model, tokens):
    out = model(tokens)
    (out * out.detach().cos()).sum().backward()


def batches(gpu, n=N):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(11, (B, P), generator=generator).to(gpu.device) for _ in range(n)]


def rows_of(gpu, given, step_of, **settings):
    """A capture with the rows of all batches; ``step_of`` makes the step from the capture and a function.

    With ``missing``, a detour comes first: rows of a point are made when it first fires.
    """
    torch.manual_seed(0)
    model = Branches().to(gpu.device)
    with (
        tlfast.freeze(model),
        tlfast.capture(model, rows=(len(given) + 2) * B, backend="native", **settings) as cap,
    ):
        if "missing" in settings:
            model.detour = True
            backward(model, given[-1])
            model.detour = False
        step = step_of(cap, lambda tokens: backward(model, tokens), given[0])
        for tokens in given:
            step(tokens)
        gpu.finish()
    return cap


@pytest.mark.parametrize("reduce", ["none", "mean", "norm", "last"])
@pytest.mark.parametrize(
    "settings",
    [
        {"points": ["embed", "hook"]},
        {"points": ["hook", "shared"], "calls": "sum"},
        {"points": ["hook", "shared"], "calls": "stack"},
        {"points": ["shared"], "calls": "last"},
        {"points": ["hook", "beside"], "missing": "nan"},
    ],
    ids=str,
)
def test_replays_make_the_rows_of_single_steps(gpu, settings, reduce):
    given = batches(gpu)
    settings = {**settings, "reduce": reduce, "dtype": torch.bfloat16}
    eager = rows_of(gpu, given, lambda cap, step, tokens: step, **settings)
    graph = rows_of(gpu, given, gpu.graph_step, **settings)
    first = B if "missing" in settings else 0
    assert graph.rows == eager.rows == first + N * B
    for name in eager.names:
        assert_same_bits(graph[name].cpu(), eager[name].cpu(), name)
        assert torch.equal(graph.missing[name], eager.missing[name])
        replayed = graph[name][first:].cpu()
        if name == "beside":
            assert replayed.isnan().all()
            assert graph.missing[name].tolist() == [False] * B + [True] * N * B
        else:
            assert_untouched(graph._columns[name].rows.cpu(), first + N * B)
            blocks = replayed.split(B)
            assert not any(torch.equal(a, b) for a, b in itertools.pairwise(blocks))
    assert graph.counts == eager.counts


def test_single_steps_and_replays_take_turns(gpu):
    given = batches(gpu)
    eager = rows_of(gpu, given, lambda cap, step, tokens: step, points=["embed", "hook"], reduce="mean")

    def mixed(cap, step, tokens):
        graph, turns = gpu.graph_step(cap, step, tokens), iter([True, False, False, True, True])
        return lambda tokens: (graph if next(turns) else step)(tokens)

    both = rows_of(gpu, given, mixed, points=["embed", "hook"], reduce="mean")
    for name in eager.names:
        assert_same_bits(both[name].cpu(), eager[name].cpu(), name)


def test_a_replay_neither_waits_nor_allocates(gpu):
    given = batches(gpu)
    torch.manual_seed(0)
    model = Branches().to(gpu.device)
    with tlfast.freeze(model), tlfast.capture(model, ["embed", "hook"], reduce="mean", rows=3 * N * B) as cap:
        step = gpu.graph_step(cap, lambda tokens: backward(model, tokens), given[0])
        step(given[0])

        def replays():
            with gpu.no_wait():
                for tokens in given:
                    step(tokens)

        n_allocations = gpu.n_allocations(replays)
        assert n_allocations == 0 or not gpu.real  # what stands for a graph runs the model
        gpu.finish()
    assert cap.rows == (N + 1) * B


def test_a_replay_on_another_stream(gpu):
    given = batches(gpu)
    eager = rows_of(gpu, given, lambda cap, step, tokens: step, points=["hook"], reduce="sum")
    with gpu.side_stream():

        def slow(cap, step, tokens):
            graph = gpu.graph_step(cap, step, tokens)
            return lambda tokens: (gpu.busy(), graph(tokens))

        graph = rows_of(gpu, given, slow, points=["hook"], reduce="sum")
    assert_same_bits(graph["hook"].cpu(), eager["hook"].cpu())


def test_clear_between_replays(gpu):
    given = batches(gpu)
    torch.manual_seed(0)
    model = Branches().to(gpu.device)
    with tlfast.freeze(model), tlfast.capture(model, "hook", reduce="mean", rows=2 * B) as cap:
        step = gpu.graph_step(cap, lambda tokens: backward(model, tokens), given[0])
        kept = []
        for tokens in (given[0], given[1], given[0]):
            cap.clear()
            step(tokens)
            kept.append(cap["hook"].cpu().clone())
    assert_same_bits(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])
