"""Datasets whose examples earlier versions made otherwise: they go on as they were begun, and are searched so."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from record_files import RECORDS, save_chat_model, save_task_model
from tiny_models import byte_tokenizer, complaint_of
from tokenizers.processors import TemplateProcessing

import tlfast
from tlfast.attribution.text_query import text_query
from tlfast.cli import main
from tlfast.collecting import from_text
from tlfast.collecting.checks import positions_of
from tlfast.collecting.from_text import Collection
from tlfast.collecting.huggingface import load_tokenizer
from tlfast.collecting.resume import most_have_around
from tlfast.dataset import DatasetWriter, Example, Plan

LOSS = """
from tlfast.collecting.loss import call_model

def own(model, batch):
    weights = (batch.fields["labels"] != -100).sum(1) if "labels" in batch.fields else 1
    return (call_model(model, batch).logits[:, 0] * weights).sum()
"""
LONGEST = 32


@pytest.fixture(autouse=True)
def own_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss_of_earlier.py").write_text(LOSS)


@contextmanager
def earlier_version(monkeypatch):
    """Examples are made, and settings taken, as before tokenizers were left alone with what they put around a text."""
    made = Collection._records
    with monkeypatch.context() as patches:
        patches.setattr(Collection, "_records", lambda self, settings, earlier=False: made(self, settings, True))
        patches.setattr(from_text, "check_texts", lambda model, settings: None)
        patches.setattr(from_text, "check_fits", lambda model, settings, goes_on: None)
        yield


def words(place, records, model, points, **settings):
    (place / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    settings = {
        "model": str(model), "dataset": str(place / "r.jsonl"), "out": str(place / "out"), "points": points,
        "reduce": "sum", "rows_per_unit": "2",
    } | settings  # fmt: skip
    given = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
    return ["collect", *(word for flag, value in given for word in (flag, value) if word)]


def tokens(place):
    return [list(row["input_ids"]) for row in tlfast.open_dataset(place / "out").examples]


@pytest.fixture(scope="module", params=["", "^"], ids=["none of its own", "a beginning of its own"])
def classifier(request, tmp_path_factory):
    """A classifier with a tokenizer that puts nothing around a text, as GPT-2's, or a beginning, as Llama's."""
    model = save_task_model(tmp_path_factory.mktemp("classifier") / "model", "bert", "sequence", vocab_size=256)
    tokenizer = byte_tokenizer(bos_token="^", eos_token="~", pad_token="|")
    if request.param:
        ends = [("^", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("^ $A", "^ $A ^ $B", ends)
    tokenizer.save_pretrained(model)
    return SimpleNamespace(model=model, own=request.param)


def test_prompts_and_responses_with_tokens_around_them(classifier, tmp_path, monkeypatch):
    """Whatever the rows show that are there: here one is cut, and one was given as tokens."""
    encode = load_tokenizer(str(classifier.model))
    bos, eos = encode.bos_token_id, encode.eos_token_id
    records = [{"prompt": one["prompt"], "answer": one["answer"][:9]} for one in RECORDS[:7]]
    records[0]["answer"] = [5, 6, 7]
    records[1]["answer"] *= 4
    columns = {"prompt_column": "prompt", "response_column": "answer", "truncate": "", "seq_len": str(LONGEST)}
    columns["loss"] = "loss_of_earlier:own"
    for name, more in (("auto", {}), ("never", {"bos": "never"}), ("always", {"bos": "always"})):
        if name == ("always" if classifier.own else "never"):
            continue  # what "auto" is
        place = tmp_path / name
        place.mkdir()
        told = words(place, records, classifier.model, "bert.encoder.layer.0", **columns, **more)
        first = [bos] if more.get("bos", "always" if classifier.own else "never") == "always" else []
        truth = [
            [*first, *encode(one["prompt"])["input_ids"], *encode(one["answer"])["input_ids"], eos][:LONGEST]
            for one in records[1:]
        ]
        truth.insert(0, [*first, *encode(records[0]["prompt"])["input_ids"], 5, 6, 7])
        with earlier_version(monkeypatch):
            assert main([*told, "--units", "0:1"]) == 0
        assert main(told) == 0
        assert tokens(place) == truth
        with text_query(tlfast.open_dataset(place / "out"), records[3]["prompt"], response=records[3]["answer"]) as it:
            assert list(it.examples[0]["input_ids"]) == truth[3]


def test_todays_go_on_as_today(classifier, tmp_path):
    """Also where the texts end as earlier versions ended them."""
    encode = load_tokenizer(str(classifier.model))
    records = [{"prompt": one["prompt"], "answer": f"{one['answer'][:9]}~"} for one in RECORDS[:5]]
    columns = {"prompt_column": "prompt", "response_column": "answer", "loss": "loss_of_earlier:own"}
    told = words(tmp_path, records, classifier.model, "bert.encoder.layer.0", **columns)
    assert main([*told, "--units", "0:1"]) == 0
    assert main(told) == 0
    assert tokens(tmp_path) == [
        [*encode(one["prompt"])["input_ids"], *encode(one["answer"])["input_ids"]] for one in records
    ]


def test_examples_of_neither_way_are_told_as_todays(tmp_path, capsys):
    """A text that is longer than the model has positions, which earlier versions took; fewer texts than there are."""
    roberta = {"vocab_size": 256, "max_position_embeddings": 28, "pad_token_id": 3}
    model = save_task_model(tmp_path / "model", "roberta", "sequence", **roberta)
    tokenizer = byte_tokenizer(bos_token="^", eos_token="~", pad_token="|")
    ends = [("^", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("^ $A", "^ $A ^ $B", ends)
    tokenizer.save_pretrained(model)
    columns = {"column": "text", "loss": "loss_of_earlier:own", "bos": "always"}
    begun = [{"text": "abc"}, {"text": "de"}, {"text": "fghi"}]

    def told(records, *more):
        return [*words(tmp_path, records, model, "roberta.encoder.layer.0", **columns), *more]

    assert main(told(begun)) == 0
    longer = [*begun, {"text": "x" * 25}]
    assert "26 tokens, more than 24" in complaint_of(capsys, told(longer, "--extend", "--bad-examples", "stop"))
    assert main(told([*begun, {"text": "k"}], "--extend")) == 0
    refused = complaint_of(capsys, told(begun))
    assert "examples must be all 4 of the dataset, which was extended, got the first 3 of them." in refused


def test_what_is_refused_behind_the_examples_of_todays(tmp_path, capsys):
    """Where both ways make the same of all that a dataset has: a longer text is refused as in any other."""
    roberta = {"vocab_size": 256, "max_position_embeddings": 28, "pad_token_id": 3}
    model = save_task_model(tmp_path / "model", "roberta", "sequence", **roberta)
    begun, longer = [{"text": "abc"}, {"text": "de"}, {"text": "fghi"}], {"text": "x" * 25}
    columns = {"column": "text", "loss": "loss_of_earlier:own", "bad_examples": "stop"}

    def told(records, *more):
        return [*words(tmp_path, records, model, "roberta.encoder.layer.0", **columns), *more]

    assert main(told(begun)) == 0
    rule = "a record must be an example, got 25 tokens, more than 24, in record 3 of r.jsonl"
    assert rule in complaint_of(capsys, told([*begun, longer], "--extend"))
    assert main(told([*begun, {"text": "jk"}], "--extend")) == 0
    assert [len(found) for found in tokens(tmp_path)] == [3, 2, 4, 2]


def test_data_that_cannot_be_read_are_not_read_again(classifier, tmp_path, monkeypatch, capsys):
    """Examples are made as earlier versions did because of what a dataset holds, and for no other reason."""
    columns = {"prompt_column": "prompt", "response_column": "answer", "loss": "loss_of_earlier:own"}
    records = [{"prompt": one["prompt"], "answer": one["answer"][:9]} for one in RECORDS[:5]]
    told = words(tmp_path, records, classifier.model, "bert.encoder.layer.0", **columns)
    with earlier_version(monkeypatch):
        assert main([*told, "--units", "0:1"]) == 0
    words(tmp_path, [{"prompt": "a"}], classifier.model, "bert.encoder.layer.0", **columns)
    made, ways = Collection._records, []

    def noted(self, settings, earlier=False):
        ways.append(earlier)
        return made(self, settings, earlier)

    monkeypatch.setattr(Collection, "_records", noted)
    assert "the columns must name columns of the data (prompt), got 'answer'" in complaint_of(capsys, told)
    assert ways == [False]


def test_what_is_refused_today_is_searched(tmp_path, monkeypatch):
    """Tokens asked for around conversations, where they were dropped; more positions than there are."""
    chat, wide = tmp_path / "chat", tmp_path / "wide"
    for place in (chat, wide):
        place.mkdir()
    model = save_chat_model(chat / "model")
    roberta = {"vocab_size": 256, "max_position_embeddings": 68, "pad_token_id": 3}
    save_task_model(wide / "model", "roberta", "sequence", **roberta)
    conversations = words(chat, RECORDS[:2], model, "transformer.h.0", messages_column="messages", eos="always")
    more = {"column": "text", "loss": "loss_of_earlier:own", "seq_len": "68"}
    texts = words(wide, RECORDS[:2], wide / "model", "roberta.encoder.layer.0", **more)
    with earlier_version(monkeypatch):
        assert main(conversations) == 0
        assert main(texts) == 0
    turns = RECORDS[0]["messages"]
    with text_query(tlfast.open_dataset(chat / "out"), turns[0]["content"], response=turns[1]["content"]) as made:
        assert list(made.examples[0]["input_ids"]) == tokens(chat)[0]
    with text_query(tlfast.open_dataset(wide / "out"), RECORDS[1]["text"]) as made:
        assert list(made.examples[0]["input_ids"]) == tokens(wide)[1]
    with (
        pytest.raises(ValueError, match=r"tlfast search: dataset must hold examples, got .* 65 tokens, more than 64"),
        text_query(tlfast.open_dataset(wide / "out"), "a" * 65),
    ):
        pass


def test_packs_as_long_as_a_config_says_go_on(tmp_path, monkeypatch):
    model = save_chat_model(tmp_path / "model")
    columns = {"prompt_column": "prompt", "response_column": "answer", "pack": "", "rows_per_unit": "1"}
    told = words(tmp_path, RECORDS, model, "transformer.h.0", **columns)
    assert main([*told, "--units", "0:1"]) == 0
    (row,) = tlfast.open_dataset(tmp_path / "out", partial=True).examples
    begun = list(row["input_ids"])
    monkeypatch.setattr("tlfast.collecting.resume.positions_of", lambda model: len(begun) - 1)
    assert main(told) == 0
    assert tokens(tmp_path)[0] == begun


def test_a_list_among_labels_has_the_reason_that_it_had(tmp_path, monkeypatch):
    model = save_task_model(tmp_path / "model", "bert", "sequence", vocab_size=256)
    records = [{"text": one["text"], "label": [0, 1] if k == 2 else one["label"]} for k, one in enumerate(RECORDS[:5])]
    told = words(tmp_path, records, model, "bert.encoder.layer.0", column="text", label_column="label")
    with earlier_version(monkeypatch):
        assert main([*told, "--units", "0:1"]) == 0
    assert main(told) == 0
    found = tlfast.open_dataset(tmp_path / "out")
    assert len(found) == 4
    assert [reason.startswith("2 labels for ") for *_, reason in found.skipped] == [True]


@pytest.mark.parametrize(
    "texts, around",
    [
        ([[1, 5, 2]], True),
        ([[1, 5, 6, 7]], True),  # one that was cut shows its beginning
        ([[5, 6, 7, 2]], False),  # by chance: what is cut has no end of its own
        ([[5, 6]], False),
        ([[5, 6]] * 90 + [[1, 5, 2]] * 110, True),  # the first ones are others
        ([[1, 5, 2]] * 90 + [[5, 6]] * 110, False),
    ],
)
def test_few_texts_and_first_ones_that_are_others(texts, around, tmp_path):
    plan = Plan(len(texts), 64)
    with DatasetWriter(tmp_path / "out", header={}, columns={"a": (torch.float32, (1,))}, plan=plan) as writer:
        for unit in plan.units:
            examples = [Example(k, texts[k], "a", k, len(texts[k])) for k in range(unit.start, unit.stop)]
            writer.write_unit(unit, {"a": torch.ones(len(unit), 1)}, examples)
    assert most_have_around(tmp_path / "out", [1], [2], 4) is around


class Clamping(torch.nn.Embedding):
    """Finds its positions itself, and gives the last one to all tokens behind, as ProphetNet's."""

    def forward(self, mask):
        return super().forward((mask.cumsum(1) + self.padding_idx).clamp(max=self.num_embeddings - 1))


@pytest.mark.parametrize("kind, n", [(torch.nn.Embedding, 15), (Clamping, 16)])
def test_positions_that_a_model_finds_itself_are_as_many_as_its_config_says(kind, n):
    model = torch.nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=16)
    model.position_embeddings = kind(16, 4, padding_idx=0)
    assert positions_of(model) == n
