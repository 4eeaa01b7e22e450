"""A model, batches, and graphs that run on the CPU."""

import pytest
import torch
from rerun_graphs import B, Model, N, P, RerunGraphs

from tlfast import _build_info
from tlfast.hooks import graph_step


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batches():
    return [torch.randint(11, (B, P)) for _ in range(N)]


@pytest.fixture
def rerun(native, monkeypatch):
    """Graphs that run on the CPU, on the build whose GPU path does."""
    if not _build_info.SIMT:
        pytest.skip("tlfast._C is not the build of make simt")
    made = []

    def graphs_for(device):
        made.append(RerunGraphs(made_for[0]))
        return made[-1]

    made_for = []
    monkeypatch.setattr(graph_step, "graphs_for", graphs_for)

    def record(cap, step, *inputs, **options):
        made_for[:] = [cap]
        step = graph_step.graph_step(cap, step, *inputs, **options)
        return step, made[-1]

    return record
