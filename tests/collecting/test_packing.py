"""Several texts in one example: none sees another; rows are those of the texts; models that can't are refused."""

from __future__ import annotations

import random

import pytest
import torch
from record_files import RECORDS, N, save_chat_model, save_records, save_task_model
from task_models import gradients_alone, task_model
from tiny_models import collect, complaint_of, save_text, unit_bytes
from torch import nn

import tlfast
from tlfast.cli import main
from tlfast.collecting import huggingface
from tlfast.collecting.batches import Batching
from tlfast.collecting.examples import ExampleReader
from tlfast.collecting.packing import check_packs, packed, preference_pair
from tlfast.collecting.skipped import BadExamples
from tlfast.dataset import Example


def examples(n=9):
    draw = random.Random(2)
    lengths = [draw.randrange(3, 14) for _ in range(n)]
    return [Example(k, [draw.randrange(3, 64) for _ in range(m)], "a", k, m) for k, m in enumerate(lengths)]


def test_they_fill_an_example_in_their_order():
    texts = examples()
    packs = packed(texts, 20)
    assert [list(pack["input_ids"]) for pack in packs if len(pack["input_ids"]) > 20] == []
    assert [t for pack in packs for t in pack["input_ids"]] == [t for text in texts for t in text.input_ids]
    assert 1 < len(packs) < len(texts)
    for pack in packs:
        begins = pack["position_ids"] == 0
        assert begins[0]
        assert (pack["labels"] == -100).tolist() == begins.tolist()


def test_labels_stay_those_of_the_texts():
    one = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "source": "a", "start": 3}
    (pack,) = packed([one, one], 6)
    assert pack["labels"].tolist() == [-100, -100, 7] * 2
    assert (pack["source"], pack["start"]) == ("a", 3)


def test_one_that_fills_an_example_is_alone():
    texts = [Example(k, list(range(3, 9)), "a", k, 6) for k in range(3)]
    assert [len(pack["input_ids"]) for pack in packed(texts, 6)] == [6, 6, 6]


class Blurred(nn.Module):
    """Takes positions, and lets each token see all those before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids, position_ids=None):
        return self.out(self.embed(input_ids).cumsum(1))


class Blind(Blurred):
    def forward(self, input_ids):
        return self.out(self.embed(input_ids))


def test_a_model_whose_texts_see_each_other_is_refused():
    packs = packed(examples(), 20)
    check_packs(task_model("llama", "causal"), packs)
    with pytest.raises(
        ValueError, match=r"pack must be for a model whose texts don't see each other, got Blurred, with"
    ):
        check_packs(Blurred(), packs)
    with pytest.raises(
        ValueError, match=r"pack must be for a model that takes position_ids, got Blind, which takes no"
    ):
        check_packs(Blind(), packs)


def words(folder, out, *more):
    return [
        "collect", "--model", str(folder / "model"), "--out", str(out), "--points", "transformer.h.*",
        "--reduce", "sum", "--dtype", "float32", "--seq-len", "64", "--pack", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    save_records(folder / "data", "r.jsonl")
    save_chat_model(folder / "model")
    save_text(folder / "text")
    return folder


def test_rows_are_the_sums_of_those_of_the_texts(folder, tmp_path):
    columns = (
        "--dataset",
        str(folder / "data" / "r.jsonl"),
        "--prompt-column",
        "prompt",
        "--response-column",
        "answer",
    )
    assert main(words(folder, tmp_path / "out", *columns)) == 0
    dataset = tlfast.open_dataset(tmp_path / "out")
    assert len(dataset) < N
    assert dataset.header["text"]["pack"] is True
    tokenizer = huggingface.load_tokenizer(str(folder / "model"))
    model = huggingface.load_model(str(folder / "model"), None, torch.device("cpu")).eval()
    encode = huggingface.encoder(tokenizer)
    texts = [(encode(one["prompt"]), encode(one["answer"] + "~")) for one in RECORDS]
    taken = iter(texts)
    for k, example in enumerate(dataset.examples):
        sums, n = dict.fromkeys(dataset.points, 0), 0
        while n < example["length"]:
            prompt, answer = next(taken)
            ids, labels = torch.tensor([prompt + answer]), torch.tensor([-100] * len(prompt) + answer)

            def loss(ids=ids, labels=labels):
                logits = model(ids).logits[0, :-1].double()
                return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")

            for point, grad in gradients_alone(model, dataset.points, loss).items():
                sums[point] = sums[point] + grad[0].sum(0)
            n += ids.shape[1]
        assert n == example["length"]
        for point, row in sums.items():
            torch.testing.assert_close(dataset[point][k], row, rtol=1e-3, atol=1e-4)
    assert next(taken, None) is None


def test_no_token_is_the_next_of_another_text_in_a_loss_without_labels(tmp_path):
    """By positions alone: of tokens that are asked for one by one, and of the losses that have no labels."""
    packs = packed(examples(), 20)
    bare = [{name: value for name, value in pack.items() if name != "labels"} for pack in packs]
    model = task_model("llama", "causal")
    settings = {"points": "model.layers.*", "reduce": "sum", "batch_tokens": 64}
    for name, given, loss in (("labels", packs, "response"), ("alone", bare, "next_token")):
        collect(model, tmp_path / name, given, loss=loss, **settings)
    one, other = (tlfast.open_dataset(tmp_path / name) for name in ("labels", "alone"))
    for point in one.points:
        torch.testing.assert_close(one[point][:], other[point][:], rtol=1e-4, atol=1e-5)


def test_texts_that_were_joined_in_a_dataset_go_on_so(tmp_path, monkeypatch):
    packs = [{name: value for name, value in pack.items() if name != "labels"} for pack in packed(examples(), 20)]
    model = task_model("llama", "causal")
    settings = {"points": "model.layers.*", "reduce": "sum", "rows_per_unit": 1}
    with monkeypatch.context() as patch:
        patch.setattr("tlfast.collecting.run.next_tokens_as_begun", lambda out, overwrite: False)
        collect(model, tmp_path / "old", packs, **settings)
        collect(model, tmp_path / "begun", packs, units="0:1", **settings)
    collect(model, tmp_path / "begun", packs, **settings)
    assert unit_bytes(tmp_path / "begun") == unit_bytes(tmp_path / "old")
    for turn in ("0:1", ""):
        collect(model, tmp_path / "new", packs, units=turn, **settings)
    batching = [tlfast.open_dataset(tmp_path / name).header["batching"] for name in ("old", "begun", "new")]
    assert [said.get("next_tokens") for said in batching] == [None, None, "within texts"]
    assert unit_bytes(tmp_path / "new") != unit_bytes(tmp_path / "old")


def test_next_tokens_of_an_example_are_the_same_beside_any_other():
    """Positions may begin anew in one of them alone, or be odd."""
    lines = [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2], [3, 3, 4]]
    parts = [{"input_ids": list(range(1, 1 + len(line))), "position_ids": torch.tensor(line)} for line in lines]
    together = next_tokens_of(parts)
    for part, row in zip(parts, together, strict=True):
        assert next_tokens_of([part])[0].tolist() == row[: len(part["input_ids"])].tolist()
        assert (row[len(part["input_ids"]) :] == -100).all()
    assert together[0].tolist() == [2, 3, -100, -100, 6, -100]


def next_tokens_of(parts):
    reader = ExampleReader(BadExamples())
    reader.read(parts)
    batching = Batching(64, source=reader.source)
    return batching.batch(reader.examples, max(len(part["input_ids"]) for part in parts)).next_tokens


OWN_LOSS = """
from torch.nn.functional import cross_entropy
from tlfast.collecting.loss import token_logits

def own(model, batch):
    logits = token_logits(model, batch).flatten(0, 1)
    return cross_entropy(logits, batch.next_tokens.flatten(), ignore_index=-100, reduction="sum")
"""


def test_a_loss_of_ones_own_needs_no_labels_of_packed_texts(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_loss_of_packs.py").write_text(OWN_LOSS)
    text, own = ["--text", str(folder / "text"), "--max-examples", "5"], ["--loss", "own_loss_of_packs:own"]
    assert main(words(folder, tmp_path / "named", *text)) == 0
    assert main(words(folder, tmp_path / "own", *text, *own)) == 0
    named, found = (tlfast.open_dataset(tmp_path / name) for name in ("named", "own"))
    for point in named.points:
        torch.testing.assert_close(found[point][:], named[point][:], rtol=1e-4, atol=1e-5)
    answers = ["--dataset", str(folder / "data"), "--prompt-column", "prompt", "--response-column", "answer"]
    refused = complaint_of(capsys, words(folder, tmp_path / "o", *answers, *own))
    assert "fields of the examples must be used by the model or the loss, or be kept, got labels." in refused


def test_a_dataset_with_one_pack_in_a_batch_goes_on_so(folder, tmp_path, monkeypatch):
    short = ("--text", str(folder / "text"), "--max-examples", "12", "--rows-per-unit", "3", "--batch-tokens", "256")
    with monkeypatch.context() as patch:
        patch.setattr("tlfast.collecting.from_text.packs_as_begun", lambda out, overwrite: 1)
        assert main(words(folder, tmp_path / "old", *short)) == 0
        assert main(words(folder, tmp_path / "begun", *short, "--units", "0:1")) == 0
    assert main(words(folder, tmp_path / "begun", *short)) == 0
    assert unit_bytes(tmp_path / "begun") == unit_bytes(tmp_path / "old")
    assert main(words(folder, tmp_path / "new", *short)) == 0
    batching = [tlfast.open_dataset(tmp_path / name).header["batching"] for name in ("begun", "new")]
    assert [said.get("batch_examples") for said in batching] == [1, None]


def test_texts_are_packed_too(folder, tmp_path):
    short = ("--text", str(folder / "text"), "--filter", "length < 40")
    assert main(words(folder, tmp_path / "out", *short)) == 0
    assert len(tlfast.open_dataset(tmp_path / "out")) > 0


@pytest.mark.parametrize(
    "more, text",
    [
        (["--keep-fields", "topic"], "keep_fields must be left out with pack, got "),
        (["--loss", "next_token"], "loss must be response with pack, or a function, got 'next_token'. Leave it out"),
    ],
)
def test_what_several_texts_can_not_have(folder, tmp_path, capsys, more, text):
    columns = ("--dataset", str(folder / "data" / "r.jsonl"), "--column", "text")
    assert text in complaint_of(capsys, words(folder, tmp_path / "out", *columns, *more))


def test_an_encoder_has_no_packs(folder, tmp_path, capsys):
    save_task_model(tmp_path / "model", "bert", "masked", vocab_size=256)
    given = words(tmp_path, tmp_path / "out", "--dataset", str(folder / "data" / "r.jsonl"), "--column", "text")
    given[given.index("transformer.h.*")] = "bert.encoder.layer.0"
    text = "pack must be for a causal language model, got BertForMaskedLM, a masked language model. Leave it out."
    assert text in complaint_of(capsys, given)


# Pairs.


def pairs():
    draw = random.Random(5)
    lengths = [(4, 3, 6), (2, 5, 2), (6, 1, 4), (3, 7, 7)]
    return [[[draw.randrange(3, 64) for _ in range(n)] for n in sizes] for sizes in lengths]


def logprob(model, prompt, answer):
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


def test_rows_of_a_pair_are_the_chosen_answers_minus_the_rejected_ones(tmp_path):
    model = task_model("llama", "causal")
    given = [preference_pair(*pair) for pair in pairs()]
    given.insert(1, given[0] | {"position_ids": None})
    settings = {"points": "model.layers.*", "loss": "preference", "reduce": "sum", "dtype": "float32"}
    for n_rows, more in ((1, {"batch_examples": 1}), (3, {}), (16, {}), (17, {"padding_side": "left"})):
        out = tmp_path / str(n_rows)
        collect(model, out, given, rows_per_unit=n_rows, **settings, **more)
        dataset = tlfast.open_dataset(out)
        assert len(dataset) == 4
        assert dataset.skipped[0][2] == "no field 'position_ids', other than the first"
        for k, (prompt, chosen, rejected) in enumerate(pairs()):
            parts = [
                gradients_alone(model, dataset.points, lambda answer=answer: logprob(model, prompt, answer))  # noqa: B023
                for answer in (chosen, rejected)
            ]
            for point in dataset.points:
                row = parts[0][point][0].sum(0) - parts[1][point][0].sum(0)
                torch.testing.assert_close(dataset[point][k], row, rtol=1e-3, atol=1e-4)


def test_pairs_beside_each_other_are_refused_where_a_mask_stands_in_for_that_of_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.collecting.batches._restarts", lambda positions: False)
    given = [preference_pair(*pair) for pair in pairs()]
    with pytest.raises(ValueError, match="a row must be the same as with its example alone"):
        collect(task_model("llama", "causal"), tmp_path / "out", given, points="model.layers.*", loss="preference")
    assert not (tmp_path / "out").exists()


def test_examples_that_are_no_pairs_are_refused(tmp_path):
    text = (
        r"examples must be made by preference_pair for loss preference, got tokens alone\. tlfast\.collecting\.packing"
    )
    with pytest.raises(ValueError, match=text):
        collect(task_model("llama", "causal"), tmp_path / "out", [[1, 2]], points="model.layers.0", loss="preference")
    with pytest.raises(
        ValueError, match=r"^preference_pair: rejected must hold tokens, got none\. A prompt is a token"
    ):
        preference_pair([1], [2], [])
