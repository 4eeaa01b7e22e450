"""Steps as CUDA graphs: which batches are replayed, what stands for a graph here, and what happens without one."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from tiny_models import collect, sequences, tiny_model, unit_bytes

import tlfast
import tlfast.collecting.loss
import tlfast.collecting.run
from tlfast.collecting.batches import Batch, Batching, as_examples, bucket_lengths
from tlfast.collecting.graph_cache import MOST_GRAPHS, Replays, graphs_wanted
from tlfast.dataset import DatasetError

EXAMPLES = sequences(60, longest=24)
BATCH_TOKENS = 72
SETTINGS = {"rows_per_unit": 20, "batch_tokens": BATCH_TOKENS}
CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


class FakeGraphs:
    """`graph_step` without CUDA: the step runs on inputs of its own. ``factor`` changes the loss, and so the rows."""

    def __init__(self, factor=1.0, error=None):
        self.factor, self.error = factor, error
        self.made, self.replayed, self.inside = [], [], False

    def graph_step(self, cap, step, *example_inputs, warmup=2):
        if self.error is not None:
            raise self.error
        static = [example.clone() for example in example_inputs]
        self.made.append(tuple(static[0].shape))

        def graph(*inputs):
            for mine, new in zip(static, inputs, strict=True):
                mine.copy_(new)
            self.replayed.append(tuple(static[0].shape))
            self.inside = True
            step(*static)
            self.inside = False

        return graph

    def loss(self, model, batch):
        assert batch.mask is not None
        loss = tlfast.collecting.loss.next_token_loss(model, batch)
        return loss * self.factor if self.inside else loss


@pytest.fixture
def graphs(monkeypatch):
    """Let `collect` make fake graphs, as if the model were on a GPU."""

    def use(**settings):
        fake = FakeGraphs(**settings)
        module = sys.modules["tlfast.collecting.run"]
        monkeypatch.setattr(module, "graphs_wanted", lambda cuda_graph, devices, backend: cuda_graph != "off")
        monkeypatch.setattr(module, "graph_step", fake.graph_step)
        return fake

    return use


@pytest.mark.parametrize("reduce", ["mean", "none"])
def test_full_batches_are_replayed_and_rows_are_those_of_single_steps(tmp_path, graphs, reduce):
    fake = graphs()
    collect(tiny_model(), tmp_path / "graphs", EXAMPLES, reduce=reduce, **SETTINGS)
    assert fake.made
    assert len(fake.made) == len(set(fake.made)) <= MOST_GRAPHS
    assert len(fake.replayed) > len(fake.made)
    assert all(n_rows == BATCH_TOKENS // n_positions for n_rows, n_positions in fake.made)
    graphs(error=RuntimeError("no graph"))
    with pytest.warns(RuntimeWarning, match="no graph"):
        collect(tiny_model(), tmp_path / "steps", EXAMPLES, reduce=reduce, **SETTINGS)
    assert unit_bytes(tmp_path / "graphs") == unit_bytes(tmp_path / "steps")


def test_padding_to_buckets_changes_rounding_alone(tmp_path, graphs):
    collect(tiny_model(), tmp_path / "off", EXAMPLES, cuda_graph="off", **SETTINGS)
    graphs()
    collect(tiny_model(), tmp_path / "on", EXAMPLES, **SETTINGS)
    off, on = (tlfast.open_dataset(tmp_path / name) for name in ("off", "on"))
    for point in off.points:
        torch.testing.assert_close(on[point][:], off[point][:])
    assert "buckets" not in off.header["batching"]
    assert on.header["batching"]["buckets"] == list(bucket_lengths(max(map(len, EXAMPLES))))


def test_what_is_replayed_depends_on_the_unit_alone(tmp_path, graphs):
    """With graphs that give other rows than single steps, a unit made later has the same bytes nevertheless."""
    fake = graphs(factor=2.0)
    settings = SETTINGS | {"loss": fake.loss, "identity": "twice"}
    collect(tiny_model(), tmp_path, EXAMPLES, **settings)
    before = unit_bytes(tmp_path)
    replayed = len(fake.replayed)
    assert replayed
    (tmp_path / "commits" / "u000001.json").unlink()
    (tmp_path / "data" / "u000001.safetensors").unlink()
    assert collect(tiny_model(), tmp_path, EXAMPLES, **settings).n_units == 1
    assert len(fake.replayed) > replayed
    assert unit_bytes(tmp_path) == before


def test_a_dataset_with_buckets_is_not_continued_without(tmp_path, graphs):
    graphs()
    collect(tiny_model(), tmp_path, EXAMPLES, **SETTINGS)
    with pytest.raises(DatasetError, match=r"header\.batching"):
        collect(tiny_model(), tmp_path, EXAMPLES, cuda_graph="off", **SETTINGS)


def test_a_model_that_makes_no_graph_is_warned_of_once(tmp_path, graphs):
    graphs(error=RuntimeError("operation not permitted\nwhen stream is capturing"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        collect(tiny_model(), tmp_path, EXAMPLES, **SETTINGS)
    (text,) = [str(one.message) for one in told if issubclass(one.category, RuntimeWarning)]
    assert text == (
        "collect: the steps run one by one, since no CUDA graph could be made of this model: "
        "operation not permitted when stream is capturing"
    )
    assert tlfast.open_dataset(tmp_path).verify().ok


def test_a_graph_that_is_required_and_cannot_be_made(tmp_path, graphs):
    graphs(error=RuntimeError("operation not permitted"))
    with pytest.raises(
        ValueError,
        match=r'collect: cuda_graph must be "auto" or "off" for a model that can\'t run inside a CUDA graph, got "on": '
        r'<operation not permitted>\. Pass cuda_graph="auto"',
    ):
        collect(tiny_model(), tmp_path, EXAMPLES, cuda_graph="on", **SETTINGS)


def test_other_errors_are_not_hidden_by_the_fallback(tmp_path, graphs):
    graphs(error=KeyError("not of CUDA"))
    with pytest.raises(KeyError, match="not of CUDA"):
        collect(tiny_model(), tmp_path, EXAMPLES, **SETTINGS)


@pytest.mark.parametrize(
    "cuda_graph, devices, backend, wanted",
    [
        ("auto", {CPU}, "native", False),
        ("auto", {GPU}, "native", True),
        ("auto", {GPU}, "python", False),
        ("auto", {GPU, OTHER_GPU}, "native", False),
        ("auto", set(), "native", False),
        ("on", {GPU}, "native", True),
        ("off", {GPU}, "native", False),
        ("off", {CPU}, "python", False),
    ],
)
def test_where_graphs_are_wanted(cuda_graph, devices, backend, wanted):
    assert graphs_wanted(cuda_graph, devices, lambda: backend) is wanted


@pytest.mark.parametrize(
    "devices, backend, got",
    [
        ({CPU}, "native", '"on" with a model on cpu'),
        ({GPU, CPU}, "native", '"on" with a model on cpu, cuda:0'),
        ({GPU}, "python", '"on" with a model on cuda:0 and the python backend'),
    ],
)
def test_graphs_that_cannot_be_are_refused(devices, backend, got):
    with pytest.raises(ValueError, match="cuda_graph must be") as refused:
        graphs_wanted("on", devices, lambda: backend)
    assert str(refused.value) == (
        'collect: cuda_graph must be "auto" or "off" unless the model is on one CUDA device and the native code runs '
        f"there, got {got}. Leave it out."
    )


@pytest.mark.parametrize(
    "cuda_graph, error", [("on", 'got "on" with a model on cpu'), ("yes", "cuda_graph must be one of auto, on, off")]
)
def test_nothing_is_written_where_graphs_are_refused(tmp_path, cuda_graph, error):
    with pytest.raises(ValueError, match=error):
        collect(tiny_model(), tmp_path / "out", EXAMPLES, cuda_graph=cuda_graph)
    assert not (tmp_path / "out").exists()


def test_the_graph_that_was_used_least_lately_goes_first():
    fake = FakeGraphs()
    replays = Replays(None, fake.graph_step)

    def step(n_positions):
        replays.step(lambda batch: None, Batch(torch.zeros(1, n_positions), torch.ones(1, n_positions).bool()))

    lengths = list(range(1, MOST_GRAPHS + 1))
    for n_positions in [*lengths, 1, MOST_GRAPHS + 1, 1]:
        step(n_positions)
    assert len(fake.made) == MOST_GRAPHS + 1, "the first graph was kept, since it was used again"
    step(2)
    assert fake.made[-1] == (1, 2), "the second one had to go"


@pytest.mark.parametrize("longest", [2, 3, 24, 128, 129, 1000, 1024])
def test_buckets_are_few_and_never_much_too_long(longest):
    buckets = bucket_lengths(longest)
    assert list(buckets) == sorted(set(buckets))
    assert len(buckets) <= MOST_GRAPHS
    assert buckets[-1] == longest
    batching = Batching(64, buckets=buckets)
    for length in range(2, longest + 1):
        padded = batching.n_positions(length)
        assert length <= padded <= max(1.5 * length, buckets[0])


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_of_buckets_have_few_shapes_and_always_a_mask(side):
    examples = as_examples(EXAMPLES)
    batching = Batching(BATCH_TOKENS, None, side, 7, bucket_lengths(24))
    seen = []
    for rows, batch in batching.batches(examples, batching.order(examples)):
        n_rows, n_positions = batch.input_ids.shape
        assert n_positions in batching.buckets
        assert n_rows == batching.n_examples(n_positions) or len(seen) + n_rows == len(examples), "only the last isn't"
        for i, ids, real in zip(rows, batch.input_ids, batch.mask, strict=True):
            assert ids[real].tolist() == list(examples[i].input_ids)
            assert (ids[~real] == 7).all()
        seen += rows
    assert sorted(seen) == list(range(len(examples)))
