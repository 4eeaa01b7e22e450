"""Encoders, encoder-decoders, vision and audio models: rows are those of each example alone, or there are none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from task_kinds import FAMILIES, TEXT, examples_for, gradients, loss_alone, n_terms, points_of, tiny_config, tiny_model
from tiny_models import collect
from transformers import LxmertConfig, LxmertModel, UMT5ForTokenClassification

import tlfast
from tlfast.collecting.batches import Batching
from tlfast.collecting.examples import ExampleReader
from tlfast.collecting.loss import call_model
from tlfast.collecting.losses import LOSSES
from tlfast.collecting.skipped import BadExamples

A_ROW = "collect: a row must be the same as with its example alone, got a row at "
# Beside this one, what a kind is refused for, and why that is true.
TRUE_REASONS = {
    "bart mbart mvp": "loss must be seq2seq for ",  # as an encoder it is one beside a decoder
    "led longformer pegasus_x": 'over="pos" must mean a dimension 1 that is the positions',  # padded to whole windows
    "prophetnet": "a gradient must have the positions, as many as the batch has, as dimension 1",  # of several streams
}
BATCHES = ({"batch_tokens": 1}, {"batch_tokens": 50}, {"batch_tokens": 1000})


def truth(model, points, examples):
    """For each example the gradient at each point, alone."""
    return [gradients(model, points, lambda example=example: loss_alone(model, example)) for example in examples]


def far_off(model, found, grad, n):
    """Whether a row isn't the mean of a gradient over its ``n`` positions, or the gradient, up to rounding."""
    expected = grad[0] if n is None else grad[0].mean(0)
    bound = n_terms(model, grad[0]) * torch.finfo(torch.float32).eps * grad[0].norm() / (n or 1) ** 0.5
    return not (found - expected).norm() <= bound


def is_wrong_in_a_batch(family, model, points, true, examples, side):
    """The same by `torch.autograd.grad` in a padded batch: whether some row is off by more than rounding."""
    apart = frozenset({"labels"} if family == "encoder-decoder" else ())
    reader = ExampleReader(BadExamples("stop"), apart=apart)
    read = list(reader.read(examples))
    batching = Batching(1000, None, side, source=reader.source)
    batch = batching.batch(read, max(e.length for e in read))
    grads = gradients(model, points, lambda: LOSSES[FAMILIES[family][2]](model, batch).sum())
    for i, alone in enumerate(true):
        for point, grad in alone.items():
            if grad is None or grads.get(point) is None:
                continue
            found = grads[point][i]
            n = grad.shape[1]
            real = found[-n:] if side == "left" and n == read[i].length else found[:n]
            if found.shape[0] < n or far_off(model, real.mean(0), grad, n):
                return True
    return False


def rows_or_none(family, model, side, out):
    """ "" where collect took the model, else why not; an AssertionError where its rows, or its refusal, are wrong."""
    examples = examples_for(family, model)
    points = points_of(model, examples[0])
    if not points:
        pytest.skip("no list of layers")
    true = truth(model, points, examples)
    bad = {"input_ids": [5], "labels": "none"} if family in TEXT else dict(examples[0], labels="none")
    settings = {"padding_side": side} if family in TEXT else {"embedding": points[0]}
    for number, batches in enumerate(BATCHES):
        more = batches if family in TEXT else {"batch_examples": (1, 2, 8)[number]}
        reduce, refusal = "mean" if family in TEXT else "none", ""
        try:
            collect(
                model, out / str(number), [*examples[:2], bad, *examples[2:]], points=points, reduce=reduce,
                loss=FAMILIES[family][2], dtype="float32", pad_id=getattr(model.config, "pad_token_id", None) or 0,
                **settings, **more,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            refusal = str(error)
        if refusal:
            assert not (out / str(number)).exists()
            if refusal.startswith(A_ROW):
                assert is_wrong_in_a_batch(family, model, points, true, examples, side), refusal
            return refusal
        dataset = tlfast.open_dataset(out / str(number))
        assert len(dataset.skipped) == 1
        for i, grads in enumerate(true):
            for point, grad in grads.items():
                n = grad.shape[1] if reduce == "mean" else None
                assert not far_off(model, dataset[point][i], grad, n), f"row {i} at {point} is off, {more} {side}"
    return ""


def sides(family):
    return ("right", "left") if family in TEXT else ("right",)


ALL = [(family, kind) for family, (_, kinds, _) in FAMILIES.items() for kind in sorted(kinds)]


@pytest.mark.every_model
@pytest.mark.filterwarnings("ignore")  # of transformers and torch, for what a kind does in itself
@pytest.mark.parametrize("family, kind", ALL, ids=lambda word: word)
def test_every_kind(tmp_path, family, kind):
    try:
        model = tiny_model(family, kind)
        examples = examples_for(family, model)
        loss_alone(model, examples[0])
    except Exception as error:
        pytest.skip(f"no tiny {kind}: {type(error).__name__}: {str(error)[:80]}")
    for side in sides(family):
        reason = rows_or_none(family, model, side, tmp_path / side)
        known = next((words for kinds, words in TRUE_REASONS.items() if kind in kinds.split()), A_ROW)
        assert not reason or known in reason or reason.startswith(A_ROW), reason
        print(f"\n{family} {kind} {side}: {reason or 'right rows'}")


@pytest.mark.every_model
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("families, least", [(("encoder",), 20), (("encoder-decoder",), 10), (("vision", "audio"), 10)])
def test_there_are_enough_kinds(families, least):
    def can_be_made(family, kind):
        try:
            model = tiny_model(family, kind)
            return bool(points_of(model, examples_for(family, model)[0]))
        except Exception:
            return False

    assert sum(can_be_made(family, kind) for family, kind in ALL if family in families) >= least


# Some of each family in every run of the tests.


@pytest.mark.parametrize(
    "family, kind, side, taken",
    [
        ("encoder", "mpnet", "left", True),
        ("encoder", "roformer", "left", False),
        ("encoder-decoder", "m2m_100", "left", True),
        ("vision", "swinv2", "right", True),
        ("audio", "wav2vec2", "right", True),
        ("speech", "whisper", "right", True),
    ],
)
def test_some_kinds(tmp_path, family, kind, side, taken):
    assert (rows_or_none(family, tiny_model(family, kind), side, tmp_path) == "") == taken


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_of_tokens_stand_at_their_tokens_beside_a_config_of_a_decoder(tmp_path, side):
    """UMT5 as an encoder alone, whose config speaks of a decoder."""
    model = UMT5ForTokenClassification(tiny_config("umt5", num_labels=3)).eval()
    assert model.config.is_encoder_decoder
    examples = examples_for("encoder", model)
    for example in examples:
        example["labels"] = [label if label < 0 else label % 3 for label in example["labels"]]
    points = points_of(model, examples[0])
    collect(model, tmp_path, examples, points=points, loss="classification", dtype="float32", padding_side=side)
    dataset = tlfast.open_dataset(tmp_path)
    for i, grads in enumerate(truth(model, points, examples)):
        for point, grad in grads.items():
            assert not far_off(model, dataset[point][i], grad, grad.shape[1])


def test_a_wrong_row_is_found(tmp_path):
    model = tiny_model("encoder", "mpnet")
    examples = examples_for("encoder", model)
    points = points_of(model, examples[0])
    grad = next(iter(truth(model, points, examples)[0].values()))
    row = grad[0].mean(0)
    assert not far_off(model, row, grad, grad.shape[1])
    assert far_off(model, row + 1e-3 * row.norm(), grad, grad.shape[1])
    assert far_off(model, torch.full_like(row, float("nan")), grad, grad.shape[1])


def padded_sound(examples):
    """Waveforms of several lengths, with a mask of their own."""
    longest = max(len(example["input_values"]) for example in examples)
    pad = [longest - len(example["input_values"]) for example in examples]
    waves = [F.pad(example["input_values"], (0, n)) for example, n in zip(examples, pad, strict=True)]
    mask = torch.tensor([[1] * (longest - n) + [0] * n for n in pad])
    return {
        "input_values": torch.stack(waves), "attention_mask": mask,
        "labels": torch.stack([example["labels"] for example in examples]),
    }  # fmt: skip


def test_sound_of_several_lengths(tmp_path):
    """The mask is a field like others where there are no tokens; what it leaves out gets no gradient."""
    model = tiny_model("audio", "wav2vec2", feat_extract_norm="layer")
    draw = torch.Generator().manual_seed(0)
    examples = [{"input_values": torch.randn(n, generator=draw), "labels": n % 3} for n in (400, 700, 500)]
    points = [f"wav2vec2.encoder.layers.{k}" for k in range(2)]
    collect(
        model, tmp_path, examples, points=points, over=1, reduce="sum", loss="classification", dtype="float32",
        embedding="wav2vec2.feature_projection", collate=padded_sound,
    )  # fmt: skip
    dataset = tlfast.open_dataset(tmp_path)
    for k, grads in enumerate(truth(model, dataset.points, examples)):
        for point, grad in grads.items():
            n = grad.shape[1]
            assert not far_off(model, dataset[point][k] / n, grad, n)


def test_positions_that_are_counted_from_zero_beside_one_for_padding(tmp_path, monkeypatch):
    """LXMERT's: an example may have all of them. A dataset of an earlier version, which left that out, goes on so."""
    torch.manual_seed(0)
    config = LxmertConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, intermediate_size=32, l_layers=2, x_layers=1, r_layers=1,
        max_position_embeddings=24, visual_feat_dim=8,
    )  # fmt: skip
    model, points = LxmertModel(config).eval(), ["encoder.layer.0", "encoder.layer.1"]
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    seen = [{"visual_feats": torch.randn(5, 8), "visual_pos": torch.rand(5, 4)} for _ in range(4)]
    lengths = (9, 12, 24, 20)
    examples = [{"input_ids": torch.randint(5, 64, (n,)).tolist(), **one} for n, one in zip(lengths, seen, strict=True)]

    def loss(model, batch):
        return call_model(model, batch).pooled_output.square().sum()

    def made(out, **more):
        settings = {"loss": loss, "identity": "squares", "reduce": "mean", "dtype": "float32", "rows_per_unit": 2}
        collect(model, out, examples, points=points, **settings, **more)
        return tlfast.open_dataset(out, partial=True)

    for batch_tokens in (1, 60):
        dataset = made(tmp_path / str(batch_tokens), batch_tokens=batch_tokens)
        assert dataset.skipped == []
        for k, example in enumerate(examples):
            inputs = {name: torch.as_tensor(value)[None] for name, value in example.items()}
            grads = gradients(model, points, lambda inputs=inputs: model(**inputs).pooled_output.square().sum())
            for point, grad in grads.items():
                assert not far_off(model, dataset[point][k], grad, grad.shape[1])
    with pytest.raises(ValueError, match=r'padding_side="right" .* gives the right rows'):
        made(tmp_path / "left", padding_side="left")
    with monkeypatch.context() as patches:
        patches.setattr("tlfast.collecting.run.positions_as_begun", lambda out, model, overwrite: 23)
        made(tmp_path / "begun", units="0:1")
    dataset = made(tmp_path / "begun")
    assert len(dataset) == 3
    assert [reason for *_, reason in dataset.skipped] == ["24 tokens, more than 23"]
