"""A whole collection whose steps are recorded: the same bytes on disk, and no unit of rows that were lost."""

import sys

import pytest
from tiny_models import collect, sequences, tiny_model, unit_bytes

import tlfast
import tlfast.collecting.run

pytestmark = pytest.mark.simt

EXAMPLES = sequences(60, longest=24)
SETTINGS = {"rows_per_unit": 20, "batch_tokens": 72}


@pytest.fixture
def recorded(rerun, monkeypatch):
    """Let `collect` record its steps; the graphs that were made, in order."""
    made = []

    def graph_step(cap, step, *inputs):
        recorded_step, graph = rerun(cap, step, *inputs)
        made.append(graph)
        return recorded_step

    module = sys.modules["tlfast.collecting.run"]
    monkeypatch.setattr(module, "graphs_wanted", lambda cuda_graph, devices, backend: cuda_graph != "off")
    monkeypatch.setattr(module, "graph_step", graph_step)
    return made


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_the_bytes_are_those_of_single_steps(tmp_path, recorded, monkeypatch, reduce):
    collect(tiny_model(), tmp_path / "recorded", EXAMPLES, reduce=reduce, **SETTINGS)
    assert sum(graph.n_replays for graph in recorded) > len(recorded) > 0
    monkeypatch.setattr(sys.modules["tlfast.collecting.run"], "graph_step", refuse)
    with pytest.warns(RuntimeWarning, match="no CUDA graph could be made of this model: not now"):
        collect(tiny_model(), tmp_path / "steps", EXAMPLES, reduce=reduce, **SETTINGS)
    assert unit_bytes(tmp_path / "recorded") == unit_bytes(tmp_path / "steps")


def refuse(cap, step, *inputs):
    raise RuntimeError("not now")


def test_a_unit_of_lost_rows_is_not_written(tmp_path, recorded, rerun, monkeypatch):
    def graph_step(cap, step, *inputs):
        recorded_step, graph = rerun(cap, step, *inputs)
        recorded.append(graph)
        if len(recorded) == 2:
            graph.instead = lambda: None
        return recorded_step

    monkeypatch.setattr(sys.modules["tlfast.collecting.run"], "graph_step", graph_step)
    with pytest.raises(RuntimeError, match=r"collect at transformer\.h\.0: rows must have been written \d+ times, got"):
        collect(tiny_model(), tmp_path, EXAMPLES, **SETTINGS)
    assert len(recorded) >= 2
    assert len(tlfast.open_dataset(tmp_path, partial=True)) < len(EXAMPLES)
