"""`tlfast collect --dataset`: records of every kind of file, columns, chats, losses, adapters, filters, a dry run."""

from __future__ import annotations

import json
import re
import warnings
from types import SimpleNamespace

import datasets
import pytest
import torch
from record_files import FLAT, KINDS, RECORDS, N, save_chat_model, save_records, save_task_model
from task_models import gradients_alone, task_model
from tiny_models import byte_tokenizer, complaint_of, save_text, unit_bytes
from tokenizers.processors import TemplateProcessing

import tlfast
from tlfast.cli import main
from tlfast.collecting import huggingface
from tlfast.collecting.begun_examples import Ways
from tlfast.collecting.settings import load_settings

OWN_LOSS = """
import torch

def first_logit(model, batch):
    return model(batch.input_ids).logits[:, 0, 0].sum()

NUMBER = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with records of every kind, and models."""
    folder = tmp_path_factory.mktemp("records")
    torch.set_num_threads(1)  # as every test has it; this comes before
    save_records(folder / "data")
    save_chat_model(folder / "model")
    return folder


def words(folder, out, dataset="r.jsonl", model="model", **changes):
    settings = {
        "model": str(folder / model), "dataset": dataset and str(folder / "data" / dataset), "out": str(out),
        "points": "transformer.h.*", "dtype": "float32", "rows_per_unit": "5", "reduce": "sum", "seq_len": "64",
    } | changes  # fmt: skip
    given = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items() if value is not None]
    return ["collect", *[word for flag, value in given for word in (flag, *value.split("\n")) if word]]


RESPONSE = {"prompt_column": "prompt", "response_column": "answer"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(folder, tmp_path, capsys, kind):
    """Which are those of the function with the same examples."""
    assert main(words(folder, tmp_path / "out", kind, column="text")) == 0
    assert capsys.readouterr().out.startswith(f"{N} rows in 3 units, ")
    dataset = tlfast.open_dataset(tmp_path / "out")
    model = huggingface.load_model(str(folder / "model"), None, torch.device("cpu"))
    examples = [list(one["text"].encode()) for one in RECORDS]
    alphabet = huggingface.load_tokenizer(str(folder / "model"))
    examples = [alphabet(one["text"], add_special_tokens=False)["input_ids"] for one in RECORDS]
    settings = {"points": "transformer.h.*", "dtype": "float32", "reduce": "sum", "rows_per_unit": 5}
    tlfast.collect(model, examples, tmp_path / "function", progress=False, **settings)
    assert unit_bytes(tmp_path / "out") == unit_bytes(tmp_path / "function")
    assert dataset.header["loss"].startswith("next-token cross-entropy")
    assert {row["source"] for row in dataset.examples} <= {kind, "a.jsonl", "b.jsonl", "train"}


def rows_alone(folder, example, points, loss):
    model = huggingface.load_model(str(folder / "model"), None, torch.device("cpu")).eval()
    grads = gradients_alone(model, points, lambda: loss(model, example))
    return {point: grad[0].sum(0) for point, grad in grads.items()}


def labelled(model, example):
    ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
    logits = model(ids).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")


def check_labelled(folder, dataset, truth):
    """Fail unless tokens and rows are those of the examples, which have labels."""
    assert [row["input_ids"] for row in dataset.examples] == [example["input_ids"] for example in truth]
    for k in (0, 3, len(truth) - 1):
        for point, row in rows_alone(folder, truth[k], dataset.points, labelled).items():
            torch.testing.assert_close(dataset[point][k], row.float(), rtol=1e-3, atol=1e-4)


def test_a_loss_of_the_response_alone(folder, tmp_path):
    assert main(words(folder, tmp_path / "out", **RESPONSE, keep_fields="topic\nscore")) == 0
    dataset = tlfast.open_dataset(tmp_path / "out")
    encode = huggingface.encoder(huggingface.load_tokenizer(str(folder / "model")))
    (end,) = encode("~")
    parts = [(encode(one["prompt"]), [*encode(one["answer"]), end]) for one in RECORDS]
    truth = [{"input_ids": a + b, "labels": [-100] * len(a) + b} for a, b in parts]
    check_labelled(folder, dataset, truth)
    assert dataset.header["loss"] == "next-token cross-entropy, summed over the tokens that labels name"
    assert [row["topic"] for row in dataset.examples] == [one["topic"] for one in RECORDS]
    assert dataset.filter("score > 1 and topic == 't1'").ids.tolist() == [5, 7, 9, 11]


@pytest.mark.parametrize("template", ["plain", "generation"])
def test_a_loss_of_the_assistants_turns(folder, tmp_path, template):
    model = save_chat_model(tmp_path / "model")
    if template == "generation":
        tokenizer = huggingface.load_tokenizer(str(model))
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</>"
            "{% endgeneration %}{% else %}{{ m.content }}</>{% endif %}{% endfor %}"
        )
        tokenizer.save_pretrained(model)
    assert main(words(folder, tmp_path / "out", model=str(model), messages_column="messages")) == 0
    encode = huggingface.encoder(huggingface.load_tokenizer(str(model)))
    truth = []
    for one in RECORDS:
        ids, labels = [], []
        for message in one["messages"]:
            head, body = encode(f"<{message['role']}>"), encode(f"{message['content']}</>")
            ids += head + body
            labels += [-100] * len(head) + (body if message["role"] == "assistant" else [-100] * len(body))
        if len(ids) <= 64:
            truth.append({"input_ids": ids, "labels": labels})
    assert 3 < len(truth) < N
    dataset = tlfast.open_dataset(tmp_path / "out")
    check_labelled(folder, dataset, truth)
    assert len(dataset.skipped) == N - len(truth)
    assert re.fullmatch(r"\d+ tokens, more than 64", dataset.skipped[0][2])


def test_what_is_too_long_is_left_out_or_cut(folder, tmp_path):
    settings = RESPONSE | {"seq_len": "24"}
    assert main(words(folder, tmp_path / "out", **settings)) == 0
    left = tlfast.open_dataset(tmp_path / "out")
    assert len(left) + len(left.skipped) == N
    assert len(left.skipped) > 2
    assert main([*words(folder, tmp_path / "cut", **settings), "--truncate"]) == 0
    cut = tlfast.open_dataset(tmp_path / "cut")
    assert len(cut) == N
    assert max(row["length"] for row in cut.examples) == 24
    assert main([*words(folder, tmp_path / "none", **settings | {"seq_len": "15"}), "--truncate"]) == 0
    none = tlfast.open_dataset(tmp_path / "none")
    assert any(reason.startswith("no label among its ") for _, _, reason in none.skipped) or len(none) == N


def test_a_filter_takes_records_by_their_values_and_tokens(folder, tmp_path, capsys):
    assert main(words(folder, tmp_path / "out", column="text", filter="length > 24 and score < 2 and label != 1")) == 0
    dataset = tlfast.open_dataset(tmp_path / "out")
    wanted = [one for one in RECORDS if len(one["text"]) > 24 and one["score"] < 2 and one["label"] != 1]
    assert [row["start"] // 2 for row in dataset.examples] == [RECORDS.index(one) for one in wanted]
    said = capsys.readouterr().err
    assert said.count("collect: columns that are not used: prompt, answer, messages, mood, topic\n") == 1
    text = "collect: condition must name values that rows have, got colour. There are answer, label, length, "
    found = complaint_of(capsys, words(folder, tmp_path / "o", column="text", filter="colour == 3"))
    assert found.startswith(text)
    assert "must compare values of a row" in complaint_of(
        capsys, words(folder, tmp_path / "o", column="text", filter="length >")
    )
    assert not (tmp_path / "o").exists()


def test_a_filter_of_text(folder, tmp_path):
    save_text(tmp_path / "text")
    settings = {"dataset": None, "text": str(tmp_path / "text"), "seq_len": "32"}
    assert main(words(folder, tmp_path / "all", **settings)) == 0
    assert main(words(folder, tmp_path / "some", **settings, filter="length > 10 and 'inner' not in source")) == 0
    kept = [
        row["input_ids"]
        for row in tlfast.open_dataset(tmp_path / "all").examples
        if row["length"] > 10 and "inner" not in row["source"]
    ]
    assert [row["input_ids"] for row in tlfast.open_dataset(tmp_path / "some").examples] == kept


def test_tokens_and_their_labels_are_columns_too(folder, tmp_path):
    lines = [{"ids": [5 + k, 6, 7, 8], "targets": [-100, 6, 7, 8]} for k in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = words(folder, tmp_path / "out", str(tmp_path / "t.jsonl"), column="ids", label_column="targets")
    assert main(found) == 0
    truth = [{"input_ids": line["ids"], "labels": line["targets"]} for line in lines]
    check_labelled(folder, tlfast.open_dataset(tmp_path / "out"), truth)


TASKS = {  # kind, head, points, columns, and the beginning of what dataset.json says of the loss
    "sequence": ("bert", "sequence", "bert.encoder.layer.*", {"column": "text", "label_column": "label"}, "classific"),
    "names": ("bert", "sequence", "bert.encoder.layer.*", {"column": "text", "label_column": "mood"}, "classific"),
    "seq2seq": ("t5", "seq2seq", "encoder.block.*", RESPONSE, "cross-entropy of the labels behind"),
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_by_what_the_model_is_for(folder, tmp_path, task):
    kind, head, points, columns, said = TASKS[task]
    named = {"id2label": {0: "glad", 1: "sad", 2: "odd"}, "label2id": {"glad": 0, "sad": 1, "odd": 2}}
    save_task_model(tmp_path / "model", kind, head, vocab_size=256, **(named if task == "names" else {}))
    found = words(folder, tmp_path / "out", model=str(tmp_path / "model"), points=points, **columns)
    assert main(found) == 0
    dataset = tlfast.open_dataset(tmp_path / "out")
    assert dataset.header["loss"].startswith(said)
    tokenizer = huggingface.load_tokenizer(str(tmp_path / "model"))
    loading = huggingface.Loading("auto")
    model = huggingface.load_model(str(tmp_path / "model"), None, torch.device("cpu"), "", loading).eval()
    for k in (0, 5, len(dataset) - 1):
        example = dataset.examples[k]
        one = RECORDS[example["start"] // 2]
        labels = torch.tensor(tokenizer(text_target=one["answer"])["input_ids"] if head == "seq2seq" else one["label"])

        ids = torch.tensor([example["input_ids"]])

        def loss(ids=ids, labels=labels):
            return model(input_ids=ids, labels=labels[None]).loss * labels.numel()

        for point, grad in gradients_alone(model, dataset.points, loss).items():
            torch.testing.assert_close(dataset[point][k], grad[0].sum(0), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def own_ends(tmp_path_factory):
    """A classifier whose tokenizer puts ^ and ~ around a text, as RoBERTa's does."""
    model = save_task_model(tmp_path_factory.mktemp("ends") / "model", "bert", "sequence", vocab_size=256)
    tokenizer = byte_tokenizer(bos_token="^", eos_token="~", pad_token="|")
    tokenizer.chat_template = "{{ messages }}"
    ends = [("^", tokenizer.bos_token_id), ("~", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("^ $A ~", "^ $A ~ $B ~", ends)
    tokenizer.save_pretrained(model)
    return model


def test_what_a_tokenizer_puts_around_a_text_stands_there_once(folder, tmp_path, capsys, monkeypatch, own_ends):
    columns = {"column": "text", "label_column": "label", "points": "bert.encoder.layer.0", "model": str(own_ends)}
    tokenizer = huggingface.load_tokenizer(str(own_ends))
    truth = [tokenizer(one["text"])["input_ids"] for one in RECORDS]
    for more in ({}, {"eos": "always", "bos": "always"}):
        assert main(words(folder, tmp_path / f"out{len(more)}", **columns, **more)) == 0
        assert [row["input_ids"] for row in tlfast.open_dataset(tmp_path / f"out{len(more)}").examples] == truth
    refused = complaint_of(capsys, words(folder, tmp_path / "o", **columns, bos="never"))
    assert "bos must be auto for this tokenizer, got 'never'. It puts the token to each text itself." in refused

    def twice(self, earlier):
        return [tokenizer.bos_token_id], []

    with monkeypatch.context() as patches:
        patches.setattr(Ways, "around", twice)
        assert main([*words(folder, tmp_path / "old", **columns, bos="always"), "--units", "0:1"]) == 0
    assert main(words(folder, tmp_path / "old", **columns, bos="always")) == 0
    found = [row["input_ids"] for row in tlfast.open_dataset(tmp_path / "old").examples]
    assert found == [[tokenizer.bos_token_id, *ids] for ids in truth], "what was begun goes on as it was"


def test_positions_before_that_of_padding_are_no_tokens(folder, tmp_path, monkeypatch, capsys):
    """RoBERTa's kin have fewer than their config says; a dataset that went by that goes on by it."""
    settings = {"vocab_size": 256, "max_position_embeddings": 28, "pad_token_id": 3}
    model = str(save_task_model(tmp_path / "model", "roberta", "sequence", **settings))
    columns = {"column": "text", "label_column": "label", "model": model, "seq_len": None}
    columns["points"] = "roberta.encoder.layer.0"
    assert main([*words(folder, tmp_path / "cut", **columns), "--truncate"]) == 0
    assert max(row["length"] for row in tlfast.open_dataset(tmp_path / "cut").examples) == 24
    refused = complaint_of(capsys, words(folder, tmp_path / "o", **columns | {"seq_len": "25"}))
    assert "seq_len must be at most 24, the positions of the model, got 25." in refused

    short = {**columns, "filter": "length < 23 or length > 28"}
    with monkeypatch.context() as patches:
        for module in ("begun_examples", "run"):
            patches.setattr(f"tlfast.collecting.{module}.positions_as_begun", lambda out, model, overwrite: 28)
        assert main([*words(folder, tmp_path / "old", **short), "--units", "0:1"]) == 0
    assert main(words(folder, tmp_path / "old", **short)) == 0
    reasons = {reason for *_, reason in tlfast.open_dataset(tmp_path / "old").skipped}
    assert reasons
    assert all(reason.endswith(" tokens, more than 28") for reason in reasons)


def test_labels_of_each_class(folder, tmp_path, own_ends):
    """A list of 0 and 1 in the data, of an example whose text has another number of tokens."""
    rows = [{"text": one["text"], "is": [k % 2, 1, k // 2 % 2]} for k, one in enumerate(RECORDS[:5])]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"column": "text", "label_column": "is", "points": "bert.encoder.layer.0", "model": str(own_ends)}
    assert main(words(folder, tmp_path / "out", str(tmp_path / "l.jsonl"), **columns)) == 0
    dataset = tlfast.open_dataset(tmp_path / "out")
    model = huggingface.load_model(str(own_ends), None, torch.device("cpu"), "", huggingface.Loading("auto")).eval()
    for row, example in enumerate(dataset.examples):
        ids, truth = torch.tensor([example["input_ids"]]), torch.tensor([rows[row]["is"]]).float()

        def loss(ids=ids, truth=truth):
            logits = model(input_ids=ids).logits
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum")

        for point, grad in gradients_alone(model, dataset.points, loss).items():
            torch.testing.assert_close(dataset[point][row], grad[0].sum(0), rtol=1e-3, atol=1e-4)


def test_columns_of_which_a_models_loss_makes_nothing_are_refused(folder, tmp_path, capsys, own_ends):
    found = {"model": str(own_ends), "points": "bert.encoder.layer.0"}
    refused = complaint_of(capsys, words(folder, tmp_path / "o", **found, messages_column="messages"))
    assert "the columns must be --column and --label-column for BertForSequenceClassification" in refused
    refused = complaint_of(capsys, words(folder, tmp_path / "o", **found, **RESPONSE))
    assert "got --prompt-column and --response-column" in refused
    refused = complaint_of(capsys, words(folder, tmp_path / "o", messages_column="messages", eos="always"))
    assert "eos must be left out with --messages-column, got 'always'" in refused


def test_a_conversation_that_a_template_refuses_is_left_out(folder, tmp_path):
    """Also where the template says itself which tokens are the assistant's."""
    model = save_chat_model(tmp_path / "model")
    tokenizer = huggingface.load_tokenizer(str(model))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'so.' %}{{ raise_exception('nothing follows') }}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    assert main(words(folder, tmp_path / "out", model=str(model), messages_column="messages")) == 0
    skipped = tlfast.open_dataset(tmp_path / "out").skipped
    assert [reason for *_, reason in skipped] == ["the chat template refuses it: nothing follows"] * (N // 2)


def test_a_mismatch_of_model_and_loss_is_refused(folder, tmp_path, capsys):
    found = complaint_of(capsys, words(folder, tmp_path / "out", column="text", loss="masked_lm"))
    assert found.startswith("collect: loss must be next_token or response or ")
    assert not (tmp_path / "out").exists()


def test_a_loss_out_of_a_module(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses_of_mine.py").write_text(OWN_LOSS)
    assert main(words(folder, tmp_path / "out", column="text", loss="losses_of_mine:first_logit")) == 0
    assert tlfast.open_dataset(tmp_path / "out").header["loss"] == "losses_of_mine.first_logit"
    config = tmp_path / "out" / "config.yaml"
    assert main(["collect", str(config)]) == 0
    assert f"0 rows beside {N} that were there" in capsys.readouterr().out
    for text, got in (
        ("losses_of_mine:second", "has no attribute 'second'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("losses_of_mine:NUMBER", "got a int, 'losses_of_mine:NUMBER'. Name a function."),
        ("nexttoken", "loss must be one of next_token, response"),
    ):
        assert got in complaint_of(capsys, words(folder, tmp_path / "o", column="text", loss=text))
    assert not (tmp_path / "o").exists()


def test_a_replay_makes_the_same_bytes(folder, tmp_path):
    found = words(folder, tmp_path / "out", **RESPONSE, keep_fields="topic", filter="length > 3", eos="never")
    assert main([*found, "--units", "0:1", "--trust-remote-code"]) == 0
    config = tmp_path / "out" / "config.yaml"
    settings = load_settings(config)
    assert (settings.filter, settings.keep_fields, settings.eos) == ("length > 3", ("topic",), "never")
    assert settings.dataset == str(folder / "data" / "r.jsonl")
    assert "trust_remote_code" not in config.read_text()
    assert main(["collect", str(config)]) == 0
    assert main(["collect", str(config), "--out", str(tmp_path / "again")]) == 0
    assert unit_bytes(tmp_path / "again") == unit_bytes(tmp_path / "out")
    assert len(unit_bytes(tmp_path / "out")) == 3


class Builder:
    """What datasets makes of a name on the hub."""

    def __init__(self, name, config, cache_dir="no such folder"):
        if name != "mine/records":
            raise FileNotFoundError(f"no {name} there")
        self.cache_dir, self.config = cache_dir, SimpleNamespace(data_files={"train": ["a"], "test": ["b"]})
        ASKED.append((name, config))

    def download_and_prepare(self, verification_mode):
        ASKED.append(self.config.data_files)

    def as_dataset(self, split):
        return datasets.Dataset.from_list(FLAT)


ASKED = []


def test_a_data_set_of_the_hub(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    monkeypatch.setattr(datasets, "load_dataset", Builder)

    def of_hub(place, **more):
        return [*words(folder, tmp_path / "out", None, column="text", **more), "--dataset", place]

    assert "split must be one of train, test, got none. Say --split." in complaint_of(capsys, of_hub("mine/records"))
    assert "got 'dev'. Say --split." in complaint_of(capsys, of_hub("mine/records", split="dev"))
    assert "'mine/other': no mine/other there. Check the path" in complaint_of(capsys, of_hub("mine/other"))
    assert not (tmp_path / "out").exists()
    assert main(of_hub("mine/records", split="train", name="plain")) == 0
    assert ASKED[-2:] == [("mine/records", "plain"), {"train": ["a"]}], "the other split isn't fetched"
    dataset = tlfast.open_dataset(tmp_path / "out")
    assert (dataset.examples[3]["source"], dataset.examples[3]["start"]) == ("mine/records/train", 3)
    assert dataset.header["text"] == {"bos": "auto", "split": "train", "name": "plain", "column": "text", "seq_len": 64}


def test_a_dry_run_shows_and_writes_nothing(folder, tmp_path, capsys):
    assert main([*words(folder, tmp_path / "out", **RESPONSE), "--dry-run"]) == 0
    shown = re.sub(r"about \d+ s by", "about SOME s by", capsys.readouterr().out).splitlines()
    n_tokens = sum(len(one["text"]) + 1 for one in RECORDS)
    assert shown == [
        "model     GPT2LMHeadModel, a causal language model, on cpu",
        "loss      next-token cross-entropy, summed over the tokens that labels name",
        f"examples  {N}, {n_tokens} tokens, in 3 batches",
        "not used  text, messages, label, mood, score, topic: columns of the data",
        f"out       {tmp_path / 'out'}: 3 units of 5 rows at most, 1.5 KB",
        "time      about SOME s by 1 batches that were tried",
        "points    2, a row of each",
        "  transformer.h.0  GPT2Block, F32 [16]",
        "  transformer.h.1  GPT2Block, F32 [16]",
    ]
    assert not (tmp_path / "out").exists()
    assert main(words(folder, tmp_path / "out", **RESPONSE)) == 0
    assert main([*words(folder, tmp_path / "out", **RESPONSE), "--dry-run"]) == 0
    assert ", begun before\n" in capsys.readouterr().out
    refused = complaint_of(capsys, [*words(folder, tmp_path / "o", column="text", points="nothing.*"), "--dry-run"])
    assert "points must match a module" in refused
    refused = complaint_of(capsys, [*words(folder, tmp_path / "o", column="text", engine="ray"), "--dry-run"])
    assert "--dry-run must stand without --engine ray, got both" in refused


REFUSED = {
    "no columns": ({}, "the columns must be --column, --prompt-column and --response-column, .*, got none"),
    "half a pair": ({"prompt_column": "prompt"}, "the columns must be .*, got --prompt-column"),
    "two kinds": ({"column": "text", **RESPONSE}, "got --column, --prompt-column, --response-column"),
    "no such column": ({"column": "txet"}, r"the columns must name columns of the data \(text, prompt, .*got 'txet'"),
    "no such field": ({"column": "text", "keep_fields": "colour"}, "got 'colour'. Correct the name"),
    "labels beside a response": ({**RESPONSE, "label_column": "label"}, "label_column must stand beside --column"),
    "a split of a file": ({"column": "text", "split": "train"}, "split must be left out for a file, got 'train'"),
    "a name of a file": ({"column": "text", "name": "main"}, "name must be left out for a file, got 'main'"),
    "numbers": ({"column": "score"}, "dataset must hold examples, got 12 records without; 12 bad .*score is a float"),
    "a pattern": ({"column": "text", "pattern": "*.jsonl"}, "pattern must be left out with dataset"),
    "both": ({"column": "text", "text": "FOLDER"}, "text must name one at least, or dataset in its place, got both"),
    "no chat": ({"messages_column": "prompt"}, "messages are no list, or an empty one"),
    "a kind": ({"column": "text", "dataset": "FOLDER/model/tokenizer.x"}, "dataset must be a file, a folder or a n"),
    "no data": ({"column": "text", "dataset": "FOLDER/model"}, "the columns must name|hold one list of JSON objects"),
    "an adapter": ({"column": "text", "adapter": "FOLDER"}, "peft must be installed|adapter must be a PEFT adapter"),
    "a task": ({"column": "text", "task": "vision"}, "task must be one of auto, causal, masked, seq"),
    "an eos": ({"column": "text", "eos": "yes"}, "eos must be one of auto, always, never, got 'yes'"),
    "no such file": (
        {"column": "text", "dataset": "nosuch.jsonl"},
        "or a name on the hub, got '.*nosuch.jsonl', no such f",
    ),
    "stop": ({"column": "score", "bad_examples": "stop"}, "a record must be an example, got score is a float, no text"),
}


@pytest.mark.parametrize("change, text", REFUSED.values(), ids=REFUSED)
def test_what_is_no_data_is_one_line_and_exit_code_2(folder, tmp_path, capsys, change, text):
    changes = {name: value.replace("FOLDER", str(folder)) for name, value in change.items()}
    dataset = changes.pop("dataset", "r.jsonl")
    complaint = complaint_of(capsys, words(folder, tmp_path / "out", dataset, **changes))
    assert re.search(text, complaint), complaint
    assert not (tmp_path / "out").exists()


def test_labels_that_no_column_makes(folder, tmp_path, capsys):
    save_task_model(tmp_path / "model", "bert", "sequence", vocab_size=256)
    complaint = complaint_of(
        capsys, words(folder, tmp_path / "out", model=str(tmp_path / "model"), column="text", points="**")
    )
    text = "labels must come from --dataset and --label-column for loss classification, got --column text alone. Or"
    assert text in complaint


def test_a_model_of_images_reads_no_text(folder, tmp_path, capsys):
    task_model("vit", "image").save_pretrained(tmp_path / "model")
    complaint = complaint_of(capsys, words(folder, tmp_path / "out", model=str(tmp_path / "model"), column="text"))
    assert re.search(
        r"model must read text, got '.*model', of type vit\. --image-column and --audio-column are for", complaint
    )


def test_text_takes_nothing_that_is_for_records(folder, tmp_path, capsys):
    save_text(tmp_path / "text", 1)
    settings = {"dataset": None, "text": str(tmp_path / "text"), "column": "text"}
    found = complaint_of(capsys, words(folder, tmp_path / "out", **settings))
    assert found == "collect: column must be left out with text, got 'text'. It is for --dataset."


def test_a_model_without_a_chat_template_has_no_conversations(folder, tmp_path, capsys):
    save_task_model(tmp_path / "model", "llama", "causal", vocab_size=256)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    found = words(
        folder, tmp_path / "out", model=str(tmp_path / "model"), points="model.layers.0", messages_column="messages"
    )
    assert "tokenizer must have a chat template, got " in complaint_of(capsys, found)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter of the model, and what the model gives with it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True, r=2)
    base = huggingface.load_model(str(folder / "model"), None, torch.device("cpu"))
    base.name_or_path = base.config._name_or_path = str(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks transformers for what is called otherwise by now
        model = peft.get_peft_model(base, config)
    place = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(place)
    return place, model.eval()


@pytest.mark.parametrize("given", ["beside", "alone"])
def test_an_adapter_is_put_into_the_model_whose_points_keep_their_names(folder, adapter, tmp_path, capsys, given):
    place, truth = adapter
    how = {"model": str(place)} if given == "alone" else {"adapter": str(place)}
    assert main(words(folder, tmp_path / "out", column="text", **how)) == 0
    dataset = tlfast.open_dataset(tmp_path / "out")
    inner = [f"base_model.model.{point}" for point in dataset.points]
    ids = torch.tensor([dataset.examples[4]["input_ids"]])

    def loss():
        logits = truth(ids).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")

    for point, grad in zip(dataset.points, gradients_alone(truth, inner, loss).values(), strict=True):
        torch.testing.assert_close(dataset[point][4], grad[0].sum(0), rtol=1e-3, atol=1e-4)
    assert main(words(folder, tmp_path / "plain", column="text")) == 0
    plain = tlfast.open_dataset(tmp_path / "plain")
    assert not torch.allclose(plain["transformer.h.0"][:], dataset["transformer.h.0"][:], rtol=0.1)
    assert plain.header["model"]["fingerprint"] != dataset.header["model"]["fingerprint"]
    assert main(["points", str(place), "transformer.h.0.attn.c_attn.*"]) == 0
    assert "transformer.h.0.attn.c_attn.base_layer" in capsys.readouterr().out


def test_an_adapter_of_another_model_is_refused(folder, adapter, tmp_path, capsys):
    save_task_model(tmp_path / "model", "llama", "causal", vocab_size=256)
    other = words(folder, tmp_path / "out", model=str(tmp_path / "model"), points="model.layers.0", column="text")
    complaint = complaint_of(capsys, [*other, "--adapter", str(adapter[0])])
    assert complaint.startswith(f"collect: adapter must be a PEFT adapter of the model, got '{adapter[0]}': ")
    assert not (tmp_path / "out").exists()


FIRST_VERSION = {  # what the first version took, and what is said of it in a new dataset
    "twice.jsonl": ('{"text": "one", "text": "two"}\n' + '{"text": "three four"}\n' * 5, None),
    "twice.json": ('{"of": 1, "data": [{"text": "one", "text": "two"}' + ', {"text": "three four"}' * 5 + "]}", None),
    "columns.csv": ("text,text\n" + "one,two\n" * 6, "have one column of each name that is asked for"),
    "open.csv": ("text,n\n" + "one,2\n" * 6 + '"two,3\none,4\n', "close each quote"),
    "large.csv": ("text,n\n" + "one,1.5\n" * 5 + f"two,{2**60 + 1}\n", "have whole numbers that a float64 holds"),
}


@pytest.mark.parametrize("name", FIRST_VERSION)
def test_a_dataset_of_the_first_version_goes_on(folder, tmp_path, capsys, monkeypatch, name):
    """A new one leaves such records out, or refuses them."""
    content, refusal = FIRST_VERSION[name]
    (tmp_path / name).write_text(content)
    more = {"keep_fields": "n"} if name == "large.csv" else {}
    given = words(folder, tmp_path / "old", tmp_path / name, column="text", **more, units="0:1")
    with monkeypatch.context() as patch:
        patch.setattr("tlfast.collecting.from_text.records_as_begun", lambda out: True)
        assert main(given) == 0, capsys.readouterr().err
        whole = [str(tmp_path / "whole") if word == str(tmp_path / "old") else word for word in given[:-2]]
        assert main(whole) == 0
    assert main(["collect", str(tmp_path / "old" / "config.yaml")]) == 0, capsys.readouterr().err
    assert unit_bytes(tmp_path / "old") == unit_bytes(tmp_path / "whole")
    assert len(tlfast.open_dataset(tmp_path / "old")) == 6
    new = [str(tmp_path / "new") if word == str(tmp_path / "old") else word for word in given]
    if refusal is not None:
        assert refusal in complaint_of(capsys, new)
        return
    assert main(new) == 0
    assert [reason for *_, reason in tlfast.open_dataset(tmp_path / "new", partial=True).skipped] == [
        "the key 'text' twice, with two values"
    ]
    assert main(["collect", str(tmp_path / "new" / "config.yaml")]) == 0, "a new one goes on as it was, too"
    assert len(tlfast.open_dataset(tmp_path / "new")) == 5
