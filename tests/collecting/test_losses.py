"""Each loss that has a name: its rows are those of autograd with the example alone, whatever stands beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from task_models import N_CLASSES, Pixels, examples_of, gradients_alone, task_model
from tiny_models import collect

from tlfast.collecting.batches import Batch
from tlfast.collecting.fields import FieldsOfBatch
from tlfast.collecting.losses import LOSSES, OF_ONE_TOKEN, SAID, classification_loss, loss_called, name_of, seq2seq_loss
from tlfast.collecting.tasks import LOSSES_OF, check_task, task_of
from tlfast.dataset import open_dataset


def ids_of(example):
    return torch.tensor([example["input_ids"]])


def next_token(logits, targets):
    return F.cross_entropy(logits[0, :-1].double(), targets[1:], ignore_index=-100, reduction="sum")


def truth_next(model, example):
    return next_token(model(ids_of(example)).logits, torch.tensor(example["input_ids"]))


def truth_response(model, example):
    return next_token(model(ids_of(example)).logits, torch.tensor(example["labels"]))


def truth_masked(model, example):
    logits = model(ids_of(example)).logits[0].double()
    return F.cross_entropy(logits, torch.tensor(example["labels"]), ignore_index=-100, reduction="sum")


def truth_own(model, example):
    """What transformers makes of one example: a mean over it alone, times how many there are."""
    labels = torch.tensor([example["labels"]])
    inputs = {name: torch.as_tensor(example[name])[None] for name in ("input_ids", "pixel_values") if name in example}
    return model(**inputs, labels=labels).loss.double() * (labels != -100).sum()


def truth_reward(model, example):
    logprobs = model(ids_of(example)).logits[0, :-1].double().log_softmax(-1)
    return example["reward"] * logprobs.gather(1, torch.tensor(example["input_ids"])[1:, None]).sum()


def truth_difference(model, example):
    last = model(ids_of(example)).logits[0, -1].double()
    return last[example["answer_ids"]] - last[example["wrong_ids"]]


CASES = {  # kind, head, examples, loss, points, truth
    "next_token": ("llama", "causal", "plain", "next_token", "model.layers.*", truth_next),
    "response": ("llama", "causal", "response", "response", "model.layers.*", truth_response),
    "reward_logprob": ("llama", "causal", "reward", "reward_logprob", "model.layers.*", truth_reward),
    "logit_difference": ("llama", "causal", "difference", "logit_difference", "model.layers.*", truth_difference),
    "masked_lm": ("bert", "masked", "masked", "masked_lm", "bert.encoder.layer.*", truth_masked),
    "masked_lm of roberta": ("roberta", "masked", "masked", "masked_lm", "roberta.encoder.layer.*", truth_masked),
    "masked_lm of distilbert": (
        "distilbert", "masked", "masked", "masked_lm", "distilbert.transformer.layer.*", truth_masked,
    ),
    "classification": ("bert", "sequence", "sequence", "classification", "bert.encoder.layer.*", truth_own),
    "token classification": ("bert", "tokens", "tokens", "classification", "bert.encoder.layer.*", truth_own),
    "seq2seq, encoder": ("t5", "seq2seq", "seq2seq", "seq2seq", "encoder.block.*", truth_own),
    "seq2seq of bart": ("bart", "seq2seq", "seq2seq", "seq2seq", "model.encoder.layers.*", truth_own),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "last"])
@pytest.mark.parametrize("backend", ["native", "python"])
def test_a_decoder_has_positions_and_a_mask_of_its_own(tmp_path, kind, reduce, backend):
    """Cross-attention reads the encoder's positions; all else behind it has as many as there are labels."""
    model, examples = task_model(kind, "seq2seq"), examples_of("seq2seq")
    points = {
        "t5": ["encoder.block.1", "decoder.block.0", "decoder.block.1.layer.1.EncDecAttention.k", "decoder.block.1"],
        "bart": ["model.encoder.layers.1", "model.decoder.layers.0", "model.decoder.layers.1.encoder_attn.k_proj"],
    }[kind]
    for batch_tokens in (1, 1000):
        out = tmp_path / f"{batch_tokens}"
        collect(
            model, out, examples, points=points, loss="seq2seq", reduce=reduce, dtype="float32",
            batch_tokens=batch_tokens, backend=backend,
        )  # fmt: skip
        dataset = open_dataset(out)
        for k, example in enumerate(examples):
            grads = gradients_alone(model, points, lambda example=example: truth_own(model, example))
            for point, grad in grads.items():
                n_decoded = len(example["labels"])
                reads = point.startswith(("encoder", "model.encoder")) or point.endswith(("k_proj", ".k"))
                assert grad.shape[1] == (len(example["input_ids"]) if reads else n_decoded)
                expected = {"sum": grad[0].sum(0), "mean": grad[0].mean(0), "last": grad[0, -1]}[reduce]
                torch.testing.assert_close(dataset[point][k], expected.float(), rtol=1e-3, atol=1e-4)


def test_a_vision_transformer_and_images_of_one_size(tmp_path):
    model, examples = task_model("vit", "image"), examples_of("image")
    bad = {"pixel_values": [[1.0], [1.0, 2.0]], "labels": 0}
    for n in (1, 4, 16):
        out = tmp_path / f"{n}"
        collect(
            model, out, [*examples[:3], bad, *examples[3:]], points="vit.layers.*", over=1, reduce="sum",
            loss="classification", dtype="float32", batch_examples=n,
        )  # fmt: skip
        dataset = open_dataset(out)
        assert len(dataset) == len(examples)
        assert dataset.skipped[0][2].startswith("pixel_values is no array of numbers")
        for k, example in enumerate(examples):
            grads = gradients_alone(model, dataset.points, lambda example=example: truth_own(model, example))
            for point, grad in grads.items():
                torch.testing.assert_close(dataset[point][k], grad[0].sum(0).float(), rtol=1e-3, atol=1e-4)


def policy():
    """What chooses one of 5 actions by what it sees."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 5))


def policy_loss(model, batch):
    """The loss of a policy gradient, [B]."""
    chosen = model(batch["seen"]).log_softmax(-1).gather(1, batch["action"][:, None])[:, 0]
    return -batch["advantage"] * chosen


def test_a_policy_gradient_of_steps(tmp_path):
    draw = torch.Generator().manual_seed(4)
    steps = [
        {"seen": torch.randn(6, generator=draw), "action": k % 5, "advantage": (k - 4) / 3, "episode": k // 3}
        for k in range(9)
    ]
    given = [*steps[:4], steps[4] | {"action": None}, {"seen": "nothing"}, *steps[4:]]
    model = policy()
    for n in (1, 4, 16):
        collect(
            model, tmp_path / f"{n}", given, points=["0", "2"], reduce="none", loss=policy_loss, dtype="float32",
            embedding="0", batch_examples=n, keep_fields=("episode", "advantage"),
        )  # fmt: skip
        dataset = open_dataset(tmp_path / f"{n}")
        assert [reason for _, _, reason in dataset.skipped] == [
            "no field 'action', other than the first", "no field 'action', other than the first",
        ]  # fmt: skip
        for k, step in enumerate(steps):

            def alone(step=step):
                chosen = model(step["seen"][None]).log_softmax(-1)[0, step["action"]]
                return -step["advantage"] * chosen

            for point, grad in gradients_alone(model, ["0", "2"], alone).items():
                torch.testing.assert_close(dataset[point][k], grad[0], rtol=1e-4, atol=1e-6)
        assert dataset.filter("episode == 1 and advantage > 0").ids.tolist() == [5]


def test_positions_of_images_are_named_by_numbers(tmp_path):
    with pytest.raises(ValueError, match=r'over="pos" must mean a dimension 1 that is the positions.*over= \(--over\)'):
        collect(
            task_model("vit", "image"), tmp_path / "out", examples_of("image"), points="vit.layers.*",
            loss="classification",
        )  # fmt: skip


def with_bad_ones(examples):
    """The examples with two among them that are none: without tokens, and with a field that the others lack."""
    empty, odd = examples[0] | {"input_ids": []}, examples[1] | {"odd": 1}
    return [*examples[:2], empty, *examples[2:4], odd, *examples[4:]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_each_example_alone(tmp_path, case, side):
    kind, head, task, loss, points, truth = CASES[case]
    model, examples = task_model(kind, head), examples_of(task)
    settings = {"points": points, "loss": loss, "reduce": "sum", "dtype": "float32", "padding_side": side}
    # It takes no positions, or the first one for its class: seen where an example is padded, and refused.
    takes_no_left = side == "left" and (kind == "bart" or case == "classification")
    for batch_tokens in (1, 32, 1000):
        out = tmp_path / f"{batch_tokens}"
        if takes_no_left and batch_tokens > 1:
            with pytest.raises(ValueError, match=r'a row must be the same .* padding_side="right"'):
                collect(model, out, with_bad_ones(examples), batch_tokens=batch_tokens, **settings)
            continue
        collect(model, out, with_bad_ones(examples), batch_tokens=batch_tokens, **settings)
        dataset = open_dataset(out)
        assert [(source, reason) for source, _, reason in dataset.skipped] == [
            ("#2", "0 tokens, less than 1" if loss in OF_ONE_TOKEN else "0 tokens, less than 2"),
            ("#5", "a field 'odd', other than the first"),
        ]
        for k, example in enumerate(examples):
            grads = gradients_alone(model, dataset.points, lambda example=example: truth(model, example))
            for point, grad in grads.items():
                expected = grad[0].sum(0)
                torch.testing.assert_close(dataset[point][k], expected.float(), rtol=1e-3, atol=1e-4)


def test_a_wrong_row_is_seen():
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.tensor([1.0]), torch.tensor([1.01]), rtol=1e-3, atol=1e-4)


class Returns(torch.nn.Module):
    def __init__(self, logits, problem_type=None):
        super().__init__()
        self.logits = logits
        self.config = type("Config", (), {"problem_type": problem_type})()

    def forward(self):
        return self.logits


@pytest.mark.parametrize(
    "logits, labels, kind, truth",
    [
        ([[2.0, 0.0], [0.0, 1.0]], [0, 1], None, "classes"),
        ([[2.0], [1.0]], [0.5, 3.0], None, 2.25 + 4.0),
        ([[2.0], [1.0]], [[0.5], [3.0]], None, 2.25 + 4.0),
        ([[2.0, 1.0]], [[1.0, 3.0]], "regression", 1.0 + 4.0),
        ([[2.0], [1.0]], [1, 3], "regression", 1.0 + 4.0),
        ([[2.0, -1.0]], [[1.0, 0.0]], None, "each"),
        ([[2.0, -1.0]], [[1, 0]], None, "each"),
        ([[2.0, -1.0]], [[1, 1]], "multi_label_classification", "each"),
        ([[2.0, -1.0]], [1], "multi_label_classification", "classes"),
    ],
    ids=[
        "classes", "one output", "one output, a column", "several targets", "whole targets", "several classes",
        "whole numbers", "whole numbers by the config", "classes against the config",
    ],
)  # fmt: skip
def test_what_labels_mean_to_a_classifier(logits, labels, kind, truth):
    logits, labels = torch.tensor(logits), torch.tensor(labels)
    if truth == "classes":
        truth = F.cross_entropy(logits, labels, reduction="sum").item()
    if truth == "each":
        truth = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum").item()
    batch = Batch(torch.zeros(len(labels), 0, dtype=torch.long), None, fields=FieldsOfBatch({"labels": labels}))
    assert classification_loss(Returns(logits, kind), batch).item() == pytest.approx(truth)


def test_labels_of_another_shape_are_refused():
    batch = Batch(torch.zeros(2, 0, dtype=torch.long), None, fields=FieldsOfBatch({"labels": torch.zeros(2, 5).long()}))
    with pytest.raises(ValueError, match=r"labels must have the shape \[2\] of what the model predicts, got \[2, 5\]"):
        classification_loss(Returns(torch.zeros(2, N_CLASSES)), batch)
    batch = Batch(batch.input_ids[:1], None, fields=FieldsOfBatch({"labels": torch.tensor([[0, 2, 1]])}))
    with pytest.raises(ValueError, match=r"labels must be 0 or 1 for each class, got 0 to 2. Give one class an"):
        classification_loss(Returns(torch.zeros(1, N_CLASSES)), batch)


@pytest.mark.parametrize(
    "loss, absent",
    [("response", "labels"), ("reward_logprob", "reward"), ("logit_difference", "answer_ids")],
)
def test_a_field_that_a_loss_asks_for_and_nobody_gave(tmp_path, loss, absent):
    text = f"examples must have the field {absent} .*got none. Give each example a field '{absent}', numbers."
    with pytest.raises(ValueError, match=text):
        collect(
            task_model("llama", "causal"), tmp_path / "out", examples_of("plain"), points="model.layers.0", loss=loss
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, head, loss, wanted",
    [
        ("bert", "masked", "next_token", "masked_lm or logit_difference for BertForMaskedLM, a masked language model"),
        ("bert", "sequence", "masked_lm", "classification for BertForSequenceClassification, a classifier"),
        ("t5", "seq2seq", "next_token", "seq2seq for T5ForConditionalGeneration, an encoder-decoder"),
        ("llama", "causal", "classification", "next_token or response or .* for LlamaForCausalLM, a causal language"),
        ("vit", "image", "response", "classification for ViTForImageClassification, a classifier"),
    ],
)
def test_a_loss_that_the_model_is_not_for_is_refused(tmp_path, kind, head, loss, wanted):
    model = task_model(kind, head)
    with pytest.raises(ValueError, match=f"^collect: loss must be {wanted}.*, got {loss}. Or a function of model"):
        collect(model, tmp_path / "out", examples_of("plain"), points="**", loss=loss)
    assert not (tmp_path / "out").exists()


def test_the_task_of_what_is_wrapped_and_of_a_class_that_says_nothing():
    model = task_model("llama", "causal")
    assert task_of(torch.compile(model, backend="eager")) == task_of(model) == "a causal language model"
    assert task_of(Pixels()) is None
    for causal, task in ((True, "a causal language model"), (False, "a masked language model")):
        told = type("XLMWithLMHeadModel", (torch.nn.Module,), {"config": SimpleNamespace(causal=causal)})()
        assert task_of(told) == task
    check_task(Pixels(), "next_token")


def test_every_loss_has_a_name_a_word_for_the_dataset_and_a_task():
    assert set(LOSSES) == set(SAID) == {name for names in LOSSES_OF.values() for name in names}
    assert all(name_of(loss_called(name)) == name for name in LOSSES)
    assert len(set(SAID.values())) == len(SAID)
    assert name_of(len) is None


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^collect: loss must be one of next_token, .* or a function, got 'nexttoken'"
    ):
        collect(task_model("llama", "causal"), tmp_path / "out", examples_of("plain"), points="**", loss="nexttoken")


def test_a_function_may_return_a_number_for_each_example(tmp_path):
    def each(model, batch):
        logits = model(batch.input_ids, attention_mask=None if batch.mask is None else batch.mask.long()).logits
        found = F.cross_entropy(logits.flatten(0, 1), batch.next_tokens.flatten(), ignore_index=-100, reduction="none")
        return found.view(batch.next_tokens.shape).sum(1)

    model, examples = task_model("llama", "causal"), examples_of("plain")
    collect(model, tmp_path / "each", examples, points="model.layers.*", loss=each, dtype="float32")
    collect(model, tmp_path / "named", examples, points="model.layers.*", loss="next_token", dtype="float32")
    one, other = open_dataset(tmp_path / "each"), open_dataset(tmp_path / "named")
    for point in one.points:
        torch.testing.assert_close(one[point][:], other[point][:], rtol=1e-4, atol=1e-5)


def test_a_decoder_without_a_first_token_is_told_what_it_lacks():
    batch = Batch(torch.ones(1, 2).long(), None, fields=FieldsOfBatch({"labels": torch.ones(1, 2).long()}))
    with pytest.raises(
        ValueError, match=r"say decoder_start_token_id and pad_token_id .* Give each example decoder_in"
    ):
        seq2seq_loss(Returns(torch.zeros(1, 2, 4)), batch)
