"""The fields of examples: what values they may have, how they are padded, and who must use them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_models import examples_of, task_model
from tiny_models import collect

from tlfast.collecting.batches import Batching
from tlfast.collecting.examples import ExampleReader
from tlfast.collecting.fields import BadField, FieldRules, FieldsOfBatch, NoField, as_kept, as_value, digest_of
from tlfast.collecting.skipped import BadExamples
from tlfast.dataset import DatasetError, open_dataset

POINTS = "model.layers.*"


def read(data, **settings):
    reader = ExampleReader(settings.pop("bad", BadExamples("stop")), **settings)
    return reader.read(data), reader


def batch_of(data, side="right", width=None, **settings):
    examples, reader = read(data, **settings)
    longest = max(example.length for example in examples)
    batching = Batching(1000, width, side, 0, source=reader.source)
    return batching.batch(examples, batching.n_positions(longest))


@pytest.mark.parametrize(
    "given, value",
    [
        (True, torch.tensor(True)),
        (3, torch.tensor(3)),
        (0.5, torch.tensor(0.5)),
        ([1, 2], torch.tensor([1, 2])),
        ([[0.5], [1.0]], torch.tensor([[0.5], [1.0]])),
        (np.float64(0.5), torch.tensor(0.5, dtype=torch.float64)),
        (np.arange(3, dtype=np.int32), torch.arange(3, dtype=torch.int32)),
        ([np.ones(2), np.zeros(2)], torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)),
        (torch.ones(2, requires_grad=True).bfloat16(), torch.ones(2, dtype=torch.bfloat16)),
    ],
    ids=str,
)
def test_numbers_are_tensors(given, value):
    made = as_value(given, "x")
    assert made.dtype == value.dtype
    assert torch.equal(made, value)
    assert not made.requires_grad


def test_texts_and_mappings_are_values_too():
    given = {"a": {"b": 1, "c": None}, "name": "x", "parts": ["x", "y"]}
    assert {name: as_value(value, name) for name, value in given.items()} == {
        "a": {"b": torch.tensor(1)}, "name": "x", "parts": ("x", "y"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, text",
    [
        ([[1], [1, 2]], "x is no array of numbers"),
        ([1, "a"], "x is no array of numbers"),
        (object(), "x is a object, not numbers or text"),
        (b"ab", "x is a bytes, not numbers or text"),
        (torch.ones(2).to_sparse(), "x is no dense tensor"),
        ({"y": object()}, r"x\.y is a object"),
        (np.array(["a"]), "x is a ndarray"),
    ],
)
def test_what_is_neither_is_a_bad_field(given, text):
    with pytest.raises(BadField, match=text):
        as_value(given, "x")


def test_a_digest_is_of_names_and_values_whatever_their_order():
    def digest(**fields):
        return digest_of({name: as_value(value, name) for name, value in fields.items()})

    assert digest(a=1, b="x") == digest(b="x", a=1)
    others = [digest(a=1), digest(a=2), digest(b=1), digest(a=1.0), digest(a=[1]), digest(a="1"), digest(a={"b": 1})]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("side", ["right", "left"])
def test_fields_as_long_as_the_tokens_are_padded_as_they_are(side):
    data = [
        {"input_ids": [5, 6, 7], "labels": [1, 2, 3], "token_type_ids": [1, 1, 1], "weights": [0.5, 1.0]},
        {"input_ids": [8, 9], "labels": [4, 5], "token_type_ids": [1, 1], "weights": [2.0, 3.0]},
    ]
    batch = batch_of(data, side)
    short = [-100, 4, 5] if side == "left" else [4, 5, -100]
    assert batch["labels"].tolist() == [[1, 2, 3], short]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [0, 1, 1] if side == "left" else [1, 1, 0]]
    assert batch["weights"].tolist() == [[0.5, 1.0], [2.0, 3.0]]
    assert batch.labels is batch["labels"]


def test_others_are_padded_on_the_right_by_their_names():
    data = [
        {"input_ids": [5, 6], "decoder_input_ids": [1, 2], "answer_ids": [3], "span_mask": [1, 1, 1], "a": {"ids": 1}},
        {"input_ids": [8, 9, 4], "decoder_input_ids": [1], "answer_ids": [3, 4], "span_mask": [1], "a": {"ids": 2}},
    ]
    batch = batch_of(data, "left", pad_id=7)
    assert batch["decoder_input_ids"].tolist() == [[1, 2], [1, 7]]
    assert batch["answer_ids"].tolist() == [[3, 7], [3, 4]]
    assert batch["span_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["a"]["ids"].tolist() == [1, 2]


def test_labels_apart_from_the_tokens_tell_what_a_decoder_reads():
    data = [{"input_ids": [5, 6], "labels": [1, 2]}, {"input_ids": [8, 9], "labels": [3]}]
    batch = batch_of(data, "left", 4, apart=frozenset({"labels"}))
    assert batch["labels"].tolist() == [[1, 2], [3, -100]]
    assert batch.decoder_mask.tolist() == [[True, True], [True, False]]
    assert batch.n_decoded == 2
    assert batch_of(data, "left", 4).decoder_mask is None


def test_dtypes_are_promoted_and_texts_are_lists():
    data = [{"input_ids": [5, 6], "reward": 1, "name": "a"}, {"input_ids": [8, 9], "reward": 0.5, "name": "b"}]
    batch = batch_of(data)
    assert batch["reward"].tolist() == [1.0, 0.5]
    assert batch["name"] == ["a", "b"]


@pytest.mark.parametrize(
    "second, reason",
    [
        ({"input_ids": [1, 2]}, "no field 'labels', other than the first"),
        ({"input_ids": [1, 2], "labels": [1, 2], "more": 1}, "a field 'more', other than the first"),
        ({"input_ids": [1, 2], "labels": 1}, "field 'labels' of another kind"),
        ({"input_ids": [1, 2], "labels": "a"}, "field 'labels' of another kind"),
        ({"labels": [1, 2]}, "no input_ids, other than the first"),
        ({"input_ids": [1, 2], "labels": [[1], [2, 3]]}, "labels is no array of numbers"),
        ({"input_ids": [1], "labels": [1]}, "1 token, less than 2"),
    ],
)
def test_an_example_that_does_not_fit_is_skipped_with_the_reason(second, reason):
    data = [{"input_ids": [3, 4], "labels": [3, 4]}, second, {"input_ids": [5, 6], "labels": [5, 6]}]
    bad = BadExamples("skip")
    examples, reader = read(data, bad=bad)
    assert [list(example.input_ids) for example in examples] == [[3, 4], [5, 6]]
    assert [fields["labels"].tolist() for fields in reader.source.fetch([0, 1])] == [[3, 4], [5, 6]]
    assert bad.skipped[0][:2] == ["#1", 0]
    assert bad.skipped[0][2].startswith(reason)
    with pytest.raises(ValueError, match="example 1"):
        read(data)


def test_a_shape_that_nobody_can_pad_is_refused():
    data = [{"input_ids": [3, 4], "x": [1.0]}, {"input_ids": [3, 4], "x": [1.0, 2.0]}]
    text = r"a field must have one shape .*, got several in 'x'\. Names that end in labels, _ids or mask are"
    with pytest.raises(ValueError, match=text):
        read(data)
    with pytest.raises(ValueError, match="'x_ids'"):
        read([{"x_ids": torch.zeros(1, 2)}, {"x_ids": torch.zeros(2, 3)}])


def test_padded_batches_lose_their_padding_in_every_field():
    data = [
        {
            "input_ids": torch.tensor([[5, 6, 0], [0, 8, 9]]),
            "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
            "labels": torch.tensor([[1, 2, -100], [-100, 3, 4]]),
            "box": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        }
    ]
    examples, reader = read(data)
    assert [list(example.input_ids) for example in examples] == [[5, 6], [8, 9]]
    fields = reader.source.fetch([1, 0])
    assert [one["labels"].tolist() for one in fields] == [[3, 4], [1, 2]]
    assert fields[0]["box"].tolist() == [4.0, 5.0, 6.0]


def test_a_field_of_a_batch_is_asked_for_by_name_and_remembered():
    fields = FieldsOfBatch({"a": 1, "b": 2})
    assert "a" in fields
    assert fields.get("c") is None
    assert fields["b"] == 2
    assert fields.use.read == {"b"}
    assert dict(**fields) == {"a": 1, "b": 2}
    assert fields.use.read == {"a", "b"}
    with pytest.raises(NoField, match=r"what is asked of a batch must be a field of the examples \(a, b\), got 'c'"):
        fields["c"]


@pytest.mark.parametrize(
    "value, kept",
    [("a", "a"), (torch.tensor(2), 2), (torch.tensor([0.5]), [0.5]), (torch.tensor(True), True)],
)
def test_small_values_are_kept(value, kept):
    assert as_kept("x", value) == kept


@pytest.mark.parametrize("value", [torch.zeros(2, 2), torch.zeros(1025), ("a",), {"a": 1}], ids=str)
def test_large_ones_are_not(value):
    with pytest.raises(ValueError, match="field 'x' must be a number, a text or 1024 numbers at most, to be kept"):
        as_kept("x", value)


def test_the_type_of_a_kept_field_is_that_of_all_examples():
    rules = FieldRules()
    for fields in ({"a": 1, "b": [1.0], "c": "x", "d": True}, {"a": 0.5, "b": [2.0], "c": "y", "d": False}):
        assert rules.refusal({name: as_value(value, name) for name, value in fields.items()}, None) is None
    assert [rules.kept_type(name) for name in "abcd"] == ["float64", "list<float64>", "string", "bool"]


# Who must use them.


def test_a_field_that_nobody_uses_is_an_error_before_anything_is_written(tmp_path):
    examples = [example | {"color": "red", "weight": 1.0} for example in examples_of("response")]
    text = "^collect: fields of the examples must be used by the model or the loss, or be kept, got color, weight. keep"
    with pytest.raises(ValueError, match=text):
        collect(task_model("llama", "causal"), tmp_path / "out", examples, points=POINTS, loss="response")
    assert not (tmp_path / "out").exists()


def test_labels_without_a_loss_for_them_are_not_used(tmp_path):
    with pytest.raises(ValueError, match="got labels"):
        collect(task_model("llama", "causal"), tmp_path / "out", examples_of("response"), points=POINTS)


def test_text_is_no_example_of_tokens(tmp_path):
    text = r"^collect: examples must have input_ids for loss next_token, got text\. Tokenize text first; loss= may be"
    with pytest.raises(ValueError, match=text):
        collect(task_model("llama", "causal"), tmp_path / "out", [{"text": "a"}] * 2, points=POINTS)


def test_kept_fields_are_in_the_row_table_and_in_the_identity(tmp_path):
    model = task_model("llama", "causal")
    examples = [
        example | {"color": "red", "weight": k / 2, "spans": list(range(k))}
        for k, example in enumerate(examples_of("response"))
    ]
    settings = {"points": POINTS, "loss": "response", "rows_per_unit": 4, "dtype": "float32"}
    collect(model, tmp_path / "kept", examples, keep_fields=("color", "weight", "spans"), **settings)
    dataset = open_dataset(tmp_path / "kept")
    assert dataset.fields[-3:] == ["color", "weight", "spans"]
    row = dataset.examples[5]
    assert (row["color"], row["weight"], row["spans"]) == ("red", 2.5, [0, 1, 2, 3, 4])
    assert len(dataset.filter("weight > 1 and color == 'red'")) == 3
    assert dataset.verify().ok
    collect(model, tmp_path / "plain", examples_of("response"), **settings)
    plain = open_dataset(tmp_path / "plain")
    assert "color" not in plain.examples[5]
    for point in plain.points:
        assert torch.equal(plain[point][:], dataset[point][:])
    with pytest.raises(DatasetError, match="fields"):
        collect(model, tmp_path / "kept", examples, keep_fields=("weight", "color", "spans"), **settings)
    changed = [example | {"weight": 7.0} for example in examples]
    with pytest.raises(DatasetError, match="examples"):
        collect(model, tmp_path / "kept", changed, keep_fields=("color", "weight", "spans"), **settings)


def test_a_kept_field_that_no_example_has_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"keep_fields must name fields of the examples \(labels\), got 'color'"):
        collect(task_model("llama", "causal"), tmp_path / "out", examples_of("response"), points=POINTS,
                loss="response", keep_fields=("color",))  # fmt: skip


@pytest.mark.parametrize(
    "change, kind, text",
    [
        ({"keep_fields": "labels"}, ValueError, "keep_fields must be a list of names, each once, got 'labels'"),
        (
            {"keep_fields": ("id",)},
            ValueError,
            "keep_fields must have other names than id, input_ids, .*, got 'id'. fie",
        ),
        ({"fields": ("a", "a")}, ValueError, "fields must be a list of names, each once, got "),
        ({"collate": 3}, TypeError, "collate must be a function, got int"),
        ({"size": 3}, TypeError, "size must be a function, got int"),
        ({"batch_examples": 0}, ValueError, "batch_examples must be a positive number, got 0"),
        ({"fingerprint": 3}, TypeError, "fingerprint must be a text, got int"),
        ({"fingerprint": "a", "extend": True}, ValueError, "fingerprint must be left out with extend=True, got 'a'"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, change, kind, text):
    with pytest.raises(kind, match=f"^collect: {text}"):
        collect(task_model("llama", "causal"), tmp_path / "out", [[1, 2]], points=POINTS, **change)
