"""Two examples are taken through alone and in one batch first: rows that padding, or company, changes are refused."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from backends import ATTACHMENTS
from tiny_models import collect, sequences, tiny_model, unit_bytes
from torch import nn

import tlfast
import tlfast.collecting.run
from tlfast.collecting.batches import Batching, as_examples
from tlfast.collecting.graph_cache import Replays
from tlfast.collecting.loss import next_token_loss
from tlfast.collecting.probe import Probe

EXAMPLES = [[3, 1, 4, 1, 5, 9, 2, 6], [2] * 20, [1, 2, 3, 4, 5, 6, 7, 8, 9]]
EQUAL = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]]


class Mixing(nn.Module):
    """What a position sees of those before it goes by the number of positions, padding too."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.point, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.to(dtype)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(torch.tanh(self.point(x + 2 * x.cumsum(1) / x.shape[1])))


class Counting(Mixing):
    """Positions counted from the left end of the batch, as BART's kin do."""

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = x + torch.arange(input_ids.shape[1], dtype=x.dtype)[:, None] / 8
        return self.head(torch.tanh(self.point(x)))


class Apart(Mixing):
    """No position sees another one: any padding is right."""

    def forward(self, input_ids):
        return self.head(torch.tanh(self.point(self.embed(input_ids))))


def run(model, out, examples=EXAMPLES, **settings):
    return collect(model, out, examples, **{"points": "point"} | settings)


ALONE = "Give examples of one length, or one a batch: batch_tokens=1 (--batch-tokens 1)."


def told(side, remedy, batch="20 and 8 tokens, padded on the {side} to 20"):
    return (
        r"collect: a row must be the same as with its example alone, got a row at point that is off by [\d.e+-]+ of "
        rf"its size, where rounding explains [\d.e+-]+ \(a batch of {batch.format(side=side)}\)\. {re.escape(remedy)}"
    )


@pytest.mark.parametrize("attach", ATTACHMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduce", ["mean", "norm", "none"])
def test_trap_46_wrong_padding_is_refused_and_right_padding_is_not(tmp_path, backend, attach, reduce, dtype):
    settings = {"backend": backend, "attach": attach, "reduce": reduce}
    alone = "Give examples of 20 tokens each." if reduce == "none" else ALONE
    for model, side, remedy in (
        (Mixing(dtype), "right", alone),
        (Mixing(dtype), "left", alone),
        (Counting(dtype), "left", f'padding_side="right" (--padding-side right) gives the right rows. Or: {alone}'),
    ):
        with pytest.raises(ValueError, match=f"^{told(side, remedy)}$"):
            run(model, tmp_path / "out", padding_side=side, **settings)
        assert not (tmp_path / "out").exists()
    run(Counting(dtype), tmp_path / "counting", padding_side="right", **settings)
    for side in ("right", "left"):
        run(Apart(dtype), tmp_path / f"apart_{side}", padding_side=side, **settings)


@pytest.mark.parametrize("model", [Mixing, Counting])
@pytest.mark.parametrize("settings", [{"examples": EQUAL}, {"batch_tokens": 1}, {"rows_per_unit": 1}])
def test_without_padding_nothing_is_wrong_with_it(tmp_path, model, settings):
    run(model(), tmp_path, padding_side="left", **settings)
    rows = tlfast.open_dataset(tmp_path)["point"]
    for i, tokens in enumerate(settings.get("examples", EXAMPLES)):
        kept = []
        made = model()
        made.point.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        logits = made(torch.tensor([tokens]))[0, :-1]
        loss = nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum")
        true = torch.autograd.grad(loss, kept)[0][0].mean(0)
        assert (rows[i] - true).norm() <= 1000 * torch.finfo().eps * true.norm()  # sums of some hundred terms


def test_examples_of_one_length_are_padded_where_rows_are_wider(tmp_path):
    text = told("left", "Give examples of 9 tokens each.", "5 and 5 tokens, padded on the {side} to 9")
    with pytest.raises(ValueError, match=text.replace("Give", ".*Give")):
        run(Counting(), tmp_path, EQUAL, reduce="none", seq_len=9, padding_side="left")
    run(Counting(), tmp_path, EQUAL, reduce="none", seq_len=5, padding_side="left")


def test_graphs_pad_too(tmp_path, monkeypatch):
    module = sys.modules["tlfast.collecting.run"]
    monkeypatch.setattr(module, "graphs_wanted", lambda cuda_graph, devices, backend: cuda_graph != "off")
    monkeypatch.setattr(Replays, "step", lambda self, eager, batch: eager(batch))
    remedy = f'{ALONE.removesuffix(".")} with cuda_graph="off" (--cuda-graph off).'
    with pytest.raises(ValueError, match=told("right", remedy)):
        run(Mixing(), tmp_path / "out")
    run(Mixing(), tmp_path / "out", batch_tokens=1, cuda_graph="off")


def mean_loss(model, batch):
    return next_token_loss(model, batch) / batch.next_tokens.ne(-100).sum()


def test_a_loss_that_is_no_sum_is_refused_without_padding_too(tmp_path):
    remedy = "The loss must be a sum over examples; batch_tokens=1 (--batch-tokens 1) takes each alone."
    with pytest.raises(ValueError, match=f"^{told('', remedy, '5 and 5 tokens')}$"):
        run(Apart(), tmp_path / "out", EQUAL, loss=mean_loss)
    remedy = f"Check that the loss is a sum over examples, and gives the model batch.mask. Or: {ALONE}"
    with pytest.raises(ValueError, match=told("right", remedy)):
        run(Apart(), tmp_path / "out", loss=mean_loss)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_deep_model_of_few_bits_is_not_refused(tmp_path, kind, dtype, side):
    model = tiny_model(kind, dtype)
    layers = model.transformer.h if kind == "gpt2" else model.model.layers
    for number in range(2, 10):
        layers.append(copy.deepcopy(layers[number % 2]))
    model.config.num_hidden_layers = len(layers)  # of a Llama, which goes by it
    points = "transformer.h.*" if kind == "gpt2" else "model.layers.*"
    assert collect(model, tmp_path, sequences(6, 40), points=points, padding_side=side).n_rows == 6


class Nan(Apart):
    """NaN where a 7 is, or with `padding` where the padding token is."""

    def __init__(self, token):
        super().__init__()
        self.token = token

    def forward(self, input_ids):
        bad = torch.where(input_ids == self.token, torch.nan, 1.0)
        return super().forward(input_ids) * (bad.sum(1) / bad.shape[1])[:, None, None]


def test_a_row_that_is_not_finite_alone_may_be_so_in_a_batch(tmp_path):
    examples = [[7, *tokens[1:]] for tokens in EQUAL]
    assert run(Nan(7), tmp_path, [*examples, [1, 2, 7, 3, 4, 5, 6, 1, 2]]).n_nonfinite_rows == 4


def test_a_row_that_is_not_finite_through_padding_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="off by inf of its size"):
        run(Nan(0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sums_that_are_zero_are_no_reason(tmp_path):
    """The keys of attention have a gradient whose sum over positions is zero: what is left is rounding alone."""

    class Keys(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.point, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, input_ids, attention_mask=None):
            x, n = self.embed(input_ids), input_ids.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool).tril()[None]
            if attention_mask is not None:
                seen = (seen & attention_mask.bool()[:, None]) | torch.eye(n, dtype=torch.bool)
            scores = (x @ self.point(x).mT).masked_fill(~seen, -torch.inf)
            return self.head(scores.softmax(-1) @ x)

    for side in ("right", "left"):
        for over in ("pos", (1, 2)):
            run(Keys(), tmp_path / f"{side}{over}", reduce="sum", over=over, padding_side=side)


def test_the_loss_is_first_called_with_whole_examples_as_the_run_calls_it(tmp_path):
    known = {tuple(tokens) for tokens in EXAMPLES}
    calls = []

    def looked_up(model, batch):
        mask = torch.ones_like(batch.input_ids) == 1 if batch.mask is None else batch.mask
        tokens = [tuple(row[real].tolist()) for row, real in zip(batch.input_ids, mask, strict=True)]
        assert known >= set(tokens), "an example that was made up"
        calls.append((len(tokens), batch.input_ids.shape[1]))
        return next_token_loss(model, batch)

    run(Apart(), tmp_path / "all", loss=looked_up)
    assert calls == [(1, 8), (1, 20), (2, 20), (3, 20)], "two alone, both together, and the run"
    calls.clear()
    run(Apart(), tmp_path / "each", loss=looked_up, batch_tokens=1)
    assert calls == [(1, 8), (1, 9), (1, 20), (1, 9), (1, 8)], "two alone, and the run"
    calls.clear()
    run(Apart(), tmp_path / "wide", loss=looked_up, reduce="none", seq_len=24, grad_scale=4.0)
    assert calls == [(1, 8), (1, 20), (2, 24), (3, 24)]


def test_few_tokens_are_tried_and_no_more_memory_than_a_batch_of_the_run():
    def pair(lengths, batch_tokens):
        examples = as_examples([[1] * n for n in lengths])
        enter = tlfast.capture
        model = Apart()

        def entered(rows, specs):
            return enter(model, specs, rows=rows)

        probe = Probe(model, entered, [tlfast.Spec("point", "mean")], Batching(batch_tokens), next_token_loss, examples)
        return probe.short.length, probe.other and probe.other.length, probe.pads

    assert pair([500, 3, 12, 30, 9, 9], 2048) == (9, 30, True)
    assert pair([500, 3, 12, 30, 9, 9], 24) == (9, 12, True)
    assert pair([500, 3, 12, 30, 9, 9], 16) == (9, 12, False)
    assert pair([500, 30], 400) == (30, 500, False)
    assert pair([500, 500], 400) == (500, 500, False)
    assert pair([2, 3], 400) == (2, 3, True)
    assert pair([4], 400) == (4, None, False)


@pytest.mark.parametrize("backend", ["python"])
def test_what_the_probe_finds_changes_no_byte(tmp_path, backend, monkeypatch):
    run(Apart(), tmp_path / "one", backend=backend)
    monkeypatch.setattr(Probe, "_check_rows", lambda *_: None)
    run(Apart(), tmp_path / "two", backend=backend)
    assert unit_bytes(tmp_path / "one") == unit_bytes(tmp_path / "two")
