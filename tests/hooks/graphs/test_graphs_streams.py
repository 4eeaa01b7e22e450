"""On which stream a step is warmed up and recorded, and which one is current after a failure; without a GPU."""

from contextlib import contextmanager

import pytest
import torch

from tlfast.hooks import graph_step

DEVICE = torch.device("cuda", 1)
UNEXPLAINED = "operation failed due to a previous error during capture"


class FakeStream:
    """A name, and a note of what it waits for."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def fake(monkeypatch):
    """CUDA graphs over streams that only take notes: (the graphs, the notes, the current streams, innermost last)."""
    log = []
    current = [FakeStream("here", log)]

    @contextmanager
    def stream(chosen):
        before = list(current)
        current.append(chosen)
        try:
            yield
        finally:
            current[:] = before

    class Recording:
        """As torch's: where the recording can't be ended, its stream stays the current one."""

        def __init__(self, graph, stream, capture_error_mode):
            self.stream = stream
            log.append(f"{capture_error_mode} on {stream.name}")

        def __enter__(self):
            current.append(self.stream)

        def __exit__(self, kind, error, trace):
            if error is not None:
                raise RuntimeError(UNEXPLAINED)
            current.pop()

    @contextmanager
    def device(chosen):
        log.append(f"device {chosen}")
        yield

    class Graph:
        def replay(self):
            log.append("replay")

    for name, value in {
        "Stream": lambda device: FakeStream(f"side of {device}", log),
        "current_stream": lambda device: current[-1],
        "stream": stream, "device": device, "graph": Recording, "CUDAGraph": Graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    graph_step._stream_of.cache_clear()
    yield graph_step.graphs_for(DEVICE), log, current
    graph_step._stream_of.cache_clear()


def test_a_step_is_warmed_up_and_recorded_on_one_stream_of_its_device(fake):
    made, log, current = fake
    seen = []
    made.warm_up(lambda: seen.append(current[-1].name))
    replay, out = made.record(lambda: seen.append(current[-1].name) or 3)
    replay()
    assert graph_step.graphs_for(DEVICE)._stream is made._stream
    assert (seen, out) == (["side of cuda:1"] * 2, 3)
    assert log == [
        "side of cuda:1 waits for here", "here waits for side of cuda:1",
        "device cuda:1", "thread_local on side of cuda:1", "replay",
    ]  # fmt: skip
    assert [stream.name for stream in current] == ["here"]


def fail():
    raise ValueError("the step is wrong")


def test_what_follows_a_failed_warm_up_waits_for_it(fake):
    made, log, _ = fake
    with pytest.raises(ValueError, match="the step is wrong"):
        made.warm_up(fail)
    assert log == ["side of cuda:1 waits for here", "here waits for side of cuda:1"]


def test_a_broken_recording_says_why_and_gives_the_stream_back(fake):
    made, _, current = fake
    with pytest.raises(ValueError, match="the step is wrong"):
        made.record(fail)
    assert [stream.name for stream in current] == ["here"]


def test_a_recording_that_cannot_be_ended_says_so(fake, monkeypatch):
    made, _, current = fake

    def cannot_end(self, kind, error, trace):
        raise RuntimeError(UNEXPLAINED)

    monkeypatch.setattr(torch.cuda.graph, "__exit__", cannot_end)
    with pytest.raises(RuntimeError, match=UNEXPLAINED):
        made.record(lambda: None)
    assert [stream.name for stream in current] == ["here"]
