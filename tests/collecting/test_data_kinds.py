"""Data of every kind give the same dataset: sequences, Hugging Face's, DataLoaders, generators, tuples, images."""

from __future__ import annotations

import random

import datasets
import pytest
import torch
from task_models import Pixels, examples_of, gradients_alone, task_model
from tiny_models import collect, tiny_model, unit_bytes
from torch.utils.data import DataLoader, Dataset

from tlfast.collecting.examples import ExampleReader, Refetched, Spooled
from tlfast.collecting.skipped import BadExamples
from tlfast.collecting.unit import Runner
from tlfast.dataset import DatasetError, open_dataset

EXAMPLES = examples_of("response")
SETTINGS = {"points": "model.layers.*", "loss": "response", "rows_per_unit": 4, "batch_tokens": 40}


class MapStyle(Dataset):
    """A data set with a length that never raises IndexError."""

    def __init__(self, examples):
        self.examples, self.asked = examples, 0

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        self.asked += 1
        return self.examples[index % len(self.examples)]


def padded(examples):
    """What a collate function of transformers makes of examples."""
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "labels": -100}
    rows = {
        name: torch.tensor([[*example[name], *[value] * (width - len(example[name]))] for example in examples])
        for name, value in fill.items()
    }
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    return rows | {"attention_mask": mask}


KINDS = {
    "list": lambda: EXAMPLES,
    "list of lists": lambda: [EXAMPLES[:2], EXAMPLES[2:]],
    "tensors": lambda: [{name: torch.tensor(value) for name, value in example.items()} for example in EXAMPLES],
    "generator": lambda: (example for example in EXAMPLES),
    "map-style": lambda: MapStyle(EXAMPLES),
    "datasets.Dataset": lambda: datasets.Dataset.from_list(EXAMPLES),
    "datasets.Dataset of torch": lambda: datasets.Dataset.from_list(EXAMPLES).with_format("torch"),
    "datasets.IterableDataset": lambda: datasets.Dataset.from_list(EXAMPLES).to_iterable_dataset(),
    "DataLoader of lists": lambda: DataLoader(MapStyle(EXAMPLES), batch_size=4, collate_fn=list),
    "DataLoader of batches": lambda: DataLoader(MapStyle(EXAMPLES), batch_size=4, collate_fn=padded),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_data_changes_no_byte(tmp_path, kind):
    model = task_model("llama", "causal")
    collect(model, tmp_path / "list", EXAMPLES, **SETTINGS)
    collect(model, tmp_path / "other", KINDS[kind](), **SETTINGS)
    assert unit_bytes(tmp_path / "other") == unit_bytes(tmp_path / "list")
    # One continues what the other began.
    (tmp_path / "other" / "commits" / "u000001.json").unlink()
    assert collect(model, tmp_path / "other", EXAMPLES, **SETTINGS).n_rows_before == 4
    assert unit_bytes(tmp_path / "other") == unit_bytes(tmp_path / "list")


def test_other_fields_are_another_dataset(tmp_path):
    model = task_model("llama", "causal")
    collect(model, tmp_path, EXAMPLES, units="0:1", **SETTINGS)
    changed = [*EXAMPLES[:-1], EXAMPLES[-1] | {"labels": [-100, *EXAMPLES[-1]["input_ids"][1:]]}]
    with pytest.raises(DatasetError, match=r"header\.examples\.sha256"):
        collect(model, tmp_path, changed, **SETTINGS)


def test_extensions_are_of_examples_with_fields_too(tmp_path):
    model = task_model("llama", "causal")
    collect(model, tmp_path / "grown", EXAMPLES[:4], **SETTINGS)
    collect(model, tmp_path / "grown", iter(EXAMPLES), extend=True, **SETTINGS)
    collect(model, tmp_path / "whole", EXAMPLES, **SETTINGS)
    assert unit_bytes(tmp_path / "grown") == unit_bytes(tmp_path / "whole")


def test_a_fingerprint_stands_for_the_examples(tmp_path):
    model = task_model("llama", "causal")
    collect(model, tmp_path, EXAMPLES, units="0:1", fingerprint="mine, version 1", **SETTINGS)
    assert open_dataset(tmp_path, partial=True).header["examples"]["fingerprint"] == "mine, version 1"
    with pytest.raises(DatasetError, match=r"header\.examples"):
        collect(model, tmp_path, EXAMPLES, fingerprint="mine, version 2", **SETTINGS)
    with pytest.raises(DatasetError, match=r"header\.examples"):
        collect(model, tmp_path, EXAMPLES, **SETTINGS)
    assert collect(model, tmp_path, EXAMPLES, fingerprint="mine, version 1", **SETTINGS).n_rows_before == 4


class Images:
    """Images that are decoded when they are asked for."""

    def __init__(self, images):
        self.images, self.decoded = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        self.decoded.append(number)
        return self.images[number]


def test_images_that_are_vouched_for_are_not_decoded_again(tmp_path):
    """But the first two, which are tried, and the last; where that is another one, all are read as without a file."""
    model, images = task_model("vit", "image"), examples_of("image", 9)
    more = {"points": "vit.layers.*", "over": 1, "loss": "classification", "fingerprint": "mine", "rows_per_unit": 2}
    collect(model, tmp_path / "whole", Images(images), **more)
    collect(model, tmp_path / "part", Images(images), units="0:4", **more)
    data = Images(images)
    assert collect(model, tmp_path / "part", data, **more).n_rows_before == 8
    assert set(data.decoded) == {0, 1, 8}
    assert unit_bytes(tmp_path / "part") == unit_bytes(tmp_path / "whole")
    collect(model, tmp_path / "other", Images(images), units="0:4", **more)
    data = Images([*images[:-1], images[-1] | {"labels": 0 * images[-1]["labels"] + 1}])
    assert collect(model, tmp_path / "other", data, **more).n_rows_before == 8
    assert set(data.decoded) == set(range(9))


def read(data, **settings):
    reader = ExampleReader(BadExamples("stop"), **settings)
    reader.read(data)
    return reader


def test_what_is_given_once_is_read_once_and_spooled():
    reads = []

    def generate():
        for k, example in enumerate(EXAMPLES):
            reads.append(k)
            yield example | {"extra": {"x": torch.ones(2, dtype=torch.bfloat16), "names": ["a"], "none": []}}

    reader = read(generate())
    assert isinstance(reader.source, Spooled)
    for _ in range(2):
        found = reader.source.fetch([3, 0])
        assert [fields["labels"].tolist() for fields in found] == [EXAMPLES[3]["labels"], EXAMPLES[0]["labels"]]
        assert torch.equal(found[0]["extra"]["x"], torch.ones(2, dtype=torch.bfloat16))
        assert found[0]["extra"]["names"] == ("a",)
        assert found[0]["extra"]["none"].shape == (0,)
    assert reads == list(range(len(EXAMPLES)))


def test_a_spool_leaves_nothing_behind(tmp_path):
    reader = read(iter(EXAMPLES), spool_in=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(reader.source.fetch([0])) == 1


def test_what_gives_its_items_again_is_not_held():
    reader = read(MapStyle(EXAMPLES))
    assert isinstance(reader.source, Refetched)
    assert reader.source.fetch([2, 2])[1]["labels"].tolist() == EXAMPLES[2]["labels"]


def test_data_that_change_between_two_looks_are_an_error():
    draw = random.Random(0)

    class Augmented(MapStyle):
        def __getitem__(self, index):
            return {"x": torch.tensor(draw.random())}

    reader = read(Augmented(EXAMPLES))
    text = "batches must give an example the same fields each time, got others for example 1. Let nothing random"
    with pytest.raises(ValueError, match=text):
        reader.source.fetch([1])


def test_splits_are_told_apart():
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(EXAMPLES)})
    with pytest.raises(TypeError, match=r"got a mapping with train\. Give one of its splits: data\['train'\]"):
        read(splits)


def test_fields_say_which_columns_are_taken_and_how_they_are_called(tmp_path):
    model = task_model("llama", "causal")
    renamed = datasets.Dataset.from_list(
        [{"tokens": e["input_ids"], "target": e["labels"], "text": "a"} for e in EXAMPLES]
    )
    collect(model, tmp_path / "list", EXAMPLES, **SETTINGS)
    fields = {"input_ids": "tokens", "labels": "target"}
    collect(model, tmp_path / "renamed", renamed, fields=fields, **SETTINGS)
    assert unit_bytes(tmp_path / "renamed") == unit_bytes(tmp_path / "list")
    as_tuples = [(e["input_ids"], e["labels"], "a") for e in EXAMPLES]
    assert [e.length for e in read(as_tuples, fields={"input_ids": 0, "labels": 1}).examples] == [
        len(e["input_ids"]) for e in EXAMPLES
    ]


@pytest.mark.parametrize(
    "item, fields, text",
    [
        ((1, 2), {"a": 0, "b": 5}, r"batches\[0\] must have the parts that fields= names, got 2 parts for a, b"),
        (3, {"a": 0, "b": 1}, r"batches\[0\] must have the fields a, b, got a int\. Give tuples or mappings"),
    ],
)
def test_items_without_these_parts_are_refused(item, fields, text):
    with pytest.raises(ValueError, match=text):
        read([item], fields=fields)


# Without tokens.


def summed_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")


IMAGES = [{"x": image, "labels": k % 3} for k, image in enumerate(torch.randn(7, 3, 6, 6, generator=torch.Generator()))]
PIXELS = {"points": ["first", "head"], "embedding": "first", "reduce": "none", "dtype": "float32"}
TUPLES = {
    "mappings": (lambda: IMAGES, {}),
    "tuples": (lambda: [(e["x"], e["labels"]) for e in IMAGES], {"fields": ("x", "labels")}),
    "DataLoader": (lambda: DataLoader([(e["x"], e["labels"]) for e in IMAGES], 2), {"fields": ("x", "labels")}),
    "DataLoader of mappings": (lambda: DataLoader(IMAGES, 3), {}),
}


@pytest.mark.parametrize("kind", TUPLES)
def test_images_are_cut_by_their_number_and_rows_are_those_of_autograd(tmp_path, kind):
    model, (data, more) = Pixels(), TUPLES[kind]
    for n in (1, 2, 16):
        out = tmp_path / str(n)
        collect(model, out, data(), loss=summed_loss, batch_examples=n, rows_per_unit=4, **PIXELS, **more)
        dataset = open_dataset(out)
        assert dataset.examples[0]["length"] == 0
        for k, example in enumerate(IMAGES):
            labels = torch.tensor([example["labels"]])
            grads = gradients_alone(
                model, ["first", "head"],
                lambda x=example["x"], labels=labels: torch.nn.functional.cross_entropy(model(x[None]), labels),
            )  # fmt: skip
            for point, grad in grads.items():
                torch.testing.assert_close(dataset[point][k], grad[0], rtol=1e-4, atol=1e-6)


def test_images_are_resumed_to_the_byte(tmp_path):
    model, settings = Pixels(), {"loss": summed_loss, "rows_per_unit": 3, **PIXELS}
    collect(model, tmp_path / "whole", IMAGES, **settings)
    collect(model, tmp_path / "parts", iter(IMAGES), units="1:2", **settings)
    collect(model, tmp_path / "parts", MapStyle(IMAGES), **settings)
    assert unit_bytes(tmp_path / "parts") == unit_bytes(tmp_path / "whole")


KILLED = {  # model, data, settings: batches of a mapping, and images
    "mappings": (lambda: task_model("llama", "causal"), EXAMPLES, SETTINGS | {"rows_per_unit": 2}),
    "images": (Pixels, IMAGES, {"loss": summed_loss, "rows_per_unit": 2, **PIXELS}),
}


@pytest.mark.parametrize("given_once", [False, True], ids=["again", "once"])
@pytest.mark.parametrize("kind", KILLED)
def test_what_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch, kind, given_once):
    make, data, settings = KILLED[kind]
    settings = settings | {"keep_fields": ("number",)}
    data = [example | {"number": k} for k, example in enumerate(data)]
    collect(make(), tmp_path / "whole", data, **settings)
    fill, begun, out = Runner.fill_ring, [], tmp_path / "killed"

    def killed(self, examples, step_done):
        begun.append(examples)
        return fill(self, examples, stopped if len(begun) == 3 else step_done)

    def stopped(n_examples, n_tokens):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "fill_ring", killed)
    with pytest.raises(KeyboardInterrupt, match="units are kept in"):
        collect(make(), out, iter(data) if given_once else data, **settings)
    monkeypatch.undo()
    n_before = len(open_dataset(out, partial=True))
    assert 0 < n_before < len(data)
    assert collect(make(), out, iter(data) if given_once else data, **settings).n_rows_before == n_before
    assert unit_bytes(out) == unit_bytes(tmp_path / "whole")
    ours, theirs = open_dataset(out), open_dataset(tmp_path / "whole")
    assert list(ours.examples) == list(theirs.examples)
    assert [row["number"] for row in ours.examples] == list(range(len(data)))
    assert ours.verify().ok


def test_the_number_in_a_batch_is_part_of_the_identity(tmp_path):
    model, settings = Pixels(), {"loss": summed_loss, "rows_per_unit": 3, **PIXELS}
    collect(model, tmp_path, IMAGES, units="0:1", **settings)
    with pytest.raises(DatasetError, match=r"header\.batching\.batch_examples: 16 there, 2 here"):
        collect(model, tmp_path, IMAGES, batch_examples=2, **settings)


class Sums(torch.nn.Module):
    """Adds up a set of vectors, however many."""

    def __init__(self):
        super().__init__()
        self.lift = torch.nn.Linear(2, 4)

    def forward(self, vectors):
        return self.lift(vectors).tanh().sum(1)


def padded_sets(examples):
    most = max(len(example["vectors"]) for example in examples)
    rows = [torch.nn.functional.pad(e["vectors"], (0, 0, 0, most - len(e["vectors"]))) for e in examples]
    real = [torch.arange(most) < len(example["vectors"]) for example in examples]
    return {"vectors": torch.stack(rows), "real": torch.stack(real)}


def of_real_ones(model, batch):
    lifted = model.lift(batch["vectors"]).tanh() * batch["real"][..., None]
    return lifted.sum(1).square().sum(1)


SETS = [{"vectors": torch.randn(n, 2, generator=torch.Generator().manual_seed(n))} for n in (2, 5, 3, 4, 1)]


def test_a_size_fills_batches_and_collate_puts_them_together(tmp_path):
    seen = []

    def loss(model, batch):
        seen.append(tuple(batch["vectors"].shape[:2]))
        return of_real_ones(model, batch)

    def n_vectors(fields):
        return len(fields["vectors"])

    settings = {"points": "lift", "over": 1, "reduce": "sum", "embedding": "lift", "dtype": "float32"}
    collect(Sums(), tmp_path, SETS, loss=loss, collate=padded_sets, size=n_vectors, batch_tokens=9, **settings)
    assert seen[-3:] == [(1, 5), (2, 4), (2, 2)]


def test_a_size_of_tokens_or_of_nothing_is_refused():
    with pytest.raises(ValueError, match="size must be left out where examples have input_ids"):
        read(EXAMPLES, size=len)
    with pytest.raises(ValueError, match="size must return a positive int, got 0"):
        read(IMAGES, size=lambda fields: 0)


def random_collate(examples):
    return padded(examples) | {"labels": torch.randint(0, 9, (len(examples), 20))}


@pytest.mark.parametrize(
    "collate, kind, text",
    [
        (random_collate, ValueError, "collate must make the same batch of the same examples each time"),
        (lambda examples: None, TypeError, "collate must return a mapping, got NoneType"),
        (lambda examples: {"input_ids": torch.zeros(1, 3).int()}, ValueError, r"got \[1, 3\] torch.int32 as input"),
        (lambda examples: padded(examples) | {"x": torch.zeros(5)}, ValueError, "got 5 in 'x'"),
        (
            lambda examples: padded(examples) | {"attention_mask": torch.zeros(2, 1)}, ValueError,
            "got an attention_mask that isn't 0 or 1 at each token",
        ),
        (lambda examples: padded(examples) | {"x": torch.zeros(len(examples))}, ValueError, "be kept, got x"),
    ],
    ids=["random", "nothing", "too few", "too many", "mask", "unused"],
)  # fmt: skip
def test_a_collate_that_makes_no_batch_is_refused(tmp_path, collate, kind, text):
    with pytest.raises(kind, match=text):
        collect(task_model("llama", "causal"), tmp_path / "out", EXAMPLES, collate=collate, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_collate_of_ones_own_gives_the_same_rows(tmp_path):
    model, settings = task_model("llama", "causal"), SETTINGS | {"dtype": "float32"}
    collect(model, tmp_path / "ours", EXAMPLES, **settings)
    collect(model, tmp_path / "theirs", EXAMPLES, collate=padded, **settings)
    assert unit_bytes(tmp_path / "ours") == unit_bytes(tmp_path / "theirs")
    with pytest.raises(DatasetError, match=r"header\.collate"):
        collect(model, tmp_path / "theirs", EXAMPLES, **settings)


def test_without_an_embedding_the_graph_starts_at_the_floats(tmp_path):
    """The rows are those of a graph that starts elsewhere, to the bit."""
    for out, embedding in (("inputs", None), ("module", "first")):
        collect(Pixels(), tmp_path / out, IMAGES, loss=summed_loss, **PIXELS | {"embedding": embedding})
    found, told = (open_dataset(tmp_path / out) for out in ("inputs", "module"))
    assert found.header == told.header
    for point in found.points:
        assert torch.equal(found[point][:], told[point][:])


def test_what_fails_in_a_forward_is_told(tmp_path):
    def wrong(model, batch):
        return model(batch["x"][:, :2]).sum()

    message = (
        r"collect: the model and the loss must take the first examples without an error, got RuntimeError in forward"
        r", line \d+ of task_models.py: .*expected input.* to have 3 channels, but got 2 channels instead\. The"
    )
    with pytest.raises(ValueError, match=message) as error:
        collect(Pixels(), tmp_path / "out", IMAGES, loss=wrong, **PIXELS)
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match="collect: input_ids must be tokens that GPT2LMHeadModel has, 0 to 255, got 3"):
        collect(tiny_model(), tmp_path / "out", [[1, 2, 300], [4, 5]])
    assert not (tmp_path / "out").exists()
