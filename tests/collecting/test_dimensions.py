"""Points whose batch or positions are elsewhere are refused by what their sizes show, with the dimensions named."""

from __future__ import annotations

import re

import pytest
import torch
from backends import ATTACHMENTS
from tiny_models import collect
from torch import nn

import tlfast

SHORT, LONG = [3] * 8, [4] * 20
UNEQUAL, EQUAL = [SHORT, LONG, [5] * 9], [SHORT, [4] * 8, [5] * 8]


class Model(nn.Module):
    """Tokens to [B, P, 6], through what a subclass makes of it, at `point`."""

    def __init__(self, **made):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.point = nn.Embedding(9, 6), nn.Identity()
        for name, module in made.items():
            setattr(self, name, module)

    def forward(self, ids):
        return self.through(self.embed(ids), ids)


class BatchSecond(Model):
    """An LSTM with the batch in dimension 1: [P, B, 6]."""

    def __init__(self):
        super().__init__(point=nn.LSTM(6, 6))

    def through(self, x, ids):
        return self.point(x.transpose(0, 1))[0].transpose(0, 1)


class LastState(Model):
    """The state h_n of an LSTM, layers first: [2, B, 6]."""

    def __init__(self):
        super().__init__(lstm=nn.LSTM(6, 6, num_layers=2, batch_first=True))

    def through(self, x, ids):
        return self.point(self.lstm(x)[1][0])[-1]


class Router(Model):
    """A router over B*P tokens in one dimension."""

    def __init__(self):
        super().__init__(point=nn.Linear(6, 4))

    def through(self, x, ids):
        return x * self.point(x.flatten(0, 1)).softmax(-1)[:, :1].view(*ids.shape, 1)


class Head(Model):
    """A head on the mean of the (real) positions: [B, 5]."""

    def __init__(self):
        super().__init__(point=nn.Linear(6, 5))

    def through(self, x, ids):
        real = (ids != 0)[..., None]
        return self.point((x * real).sum(1) / real.sum(1))


class Pattern(Model):
    """Attention probabilities of 2 heads: [B, 2, P, P]."""

    def through(self, x, ids):
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        scores = heads @ heads.mT + torch.where(ids != 0, 0.0, -torch.inf)[:, None, None]
        return ((self.point(scores.softmax(-1)) @ heads) * (ids != 0)[:, None, :, None]).sum(2)


class Prompt(Model):
    """Three virtual tokens before the text: [B, 3 + P, 6]."""

    def through(self, x, ids):
        return self.point(torch.cat([x[:, :1].expand(-1, 3, -1), x], 1))[:, 3:] * (ids != 0)[..., None]


class Channels(Model):
    """Channels before positions, as a convolution has them: [B, 6, P]."""

    def through(self, x, ids):
        return self.point(x.mT) * (ids != 0)[:, None]


def loss(model, batch):
    out = model(batch.input_ids)
    if out.dim() == 3 and out.shape[1] == batch.input_ids.shape[1] and batch.mask is not None:
        out = out * batch.mask[..., None]
    return out.square().sum()


def run(model, out, examples, **settings):
    return collect(model, out, examples, **{"points": "point", "loss": loss, "reduce": "mean"} | settings)


BATCH = "a gradient must have the batch as dimension 0, got "
NAMED = 'over="pos" must mean a dimension 1 that is the positions, got '
PADDED = (
    "a gradient must have the positions, as many as the batch has, as dimension 1 alone where examples are padded, got "
)
LEAVE = "Leave this point out, or choose one whose module has the batch first."
SECOND = f"Dimension 1 is the batch. {LEAVE}"
NUMBERS = 'reduce="none" (--reduce none) keeps all dimensions, over= (--over) takes their numbers.'
ALONE = "Give examples of one length, or one a batch: batch_tokens=1 (--batch-tokens 1)."


def sizes(one, two, three=None):
    """The sizes of the gradients of UNEQUAL, alone and together; of EQUAL with two of them."""
    if three is None:
        return f"{one} for 1 example of 8 positions, {two} for 2 examples of 8 positions. "
    longer = f"{two} for 1 example of 20 positions, {three} for 2 examples of 20 positions. "
    return f"{one} for 1 example of 8 positions, {longer}"


@pytest.mark.parametrize("model, examples, settings, text", [
    (BatchSecond, UNEQUAL, {}, BATCH + sizes([8, 1, 6], [20, 1, 6], [20, 2, 6]) + SECOND),
    (BatchSecond, EQUAL, {}, BATCH + sizes([8, 1, 6], [8, 2, 6]) + SECOND),
    (LastState, UNEQUAL, {"reduce": "none"}, BATCH + sizes([2, 1, 6], [2, 1, 6], [2, 2, 6]) + SECOND),
    (LastState, EQUAL, {"over": 2}, BATCH + sizes([2, 1, 6], [2, 2, 6]) + SECOND),
    (Router, UNEQUAL, {}, BATCH + sizes([8, 4], [20, 4], [40, 4]) + LEAVE),
    (Router, EQUAL, {"reduce": "none"}, BATCH + sizes([8, 4], [16, 4]) + LEAVE),
    (Head, UNEQUAL, {}, NAMED + sizes([1, 5], [1, 5], [2, 5]) + NUMBERS),
    (Head, EQUAL, {"over": ("pos",)}, NAMED + sizes([1, 5], [2, 5]) + NUMBERS),
    (Pattern, UNEQUAL, {}, NAMED + sizes([1, 2, 8, 8], [1, 2, 20, 20], [2, 2, 20, 20])
     + "The positions are dimension 2: over=2 (--over 2) with examples of one length, or leave this point out."),
    (Pattern, EQUAL, {}, NAMED + sizes([1, 2, 8, 8], [2, 2, 8, 8])
     + "The positions are dimension 2: over=2 (--over 2), or leave this point out."),
    (Pattern, UNEQUAL, {"over": (2, 3), "seq_len": 20}, PADDED
     + sizes([1, 2, 8, 8], [1, 2, 20, 20], [2, 2, 20, 20]) + "Give examples of 20 tokens each."),
    (Pattern, UNEQUAL, {"over": 1}, "rows must have one shape for all lengths, got "
     + sizes([1, 2, 8, 8], [1, 2, 20, 20], [2, 2, 20, 20])
     + "Name dimension 2 in over= too, or give examples of one length."),
    (Prompt, UNEQUAL, {}, PADDED + sizes([1, 11, 6], [1, 23, 6], [2, 23, 6]) + ALONE),
    (Prompt, EQUAL, {}, NAMED + sizes([1, 11, 6], [2, 11, 6]) + NUMBERS),
    (Channels, UNEQUAL, {}, NAMED + sizes([1, 6, 8], [1, 6, 20], [2, 6, 20])
     + "The positions are dimension 2: over=2 (--over 2) with examples of one length, or leave this point out."),
])  # fmt: skip
def test_trap_50_dimensions_that_are_elsewhere_are_named(tmp_path, backend, model, examples, settings, text):
    with pytest.raises(ValueError, match=re.escape(text)) as refused:
        run(model(), tmp_path / "out", examples, backend=backend, **settings)
    assert str(refused.value) == f"collect at point: {text}"
    assert not (tmp_path / "out").exists()


def alone(model, tokens):
    """The gradient at the point, of one example by itself."""
    kept = []
    handle = model.point.register_forward_hook(
        lambda module, args, output: kept.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    total = model(torch.tensor([tokens])).square().sum()
    handle.remove()
    return torch.autograd.grad(total, kept)[0][0]


def assert_rows(out, model, examples, reduced):
    dataset = tlfast.open_dataset(out)
    for i, tokens in enumerate(examples):
        true = reduced(alone(model, tokens))
        # A sum of squares over some hundred values, in float32.
        torch.testing.assert_close(
            dataset["point"][i], true, rtol=1000 * torch.finfo().eps, atol=1e-5 * true.abs().max()
        )


@pytest.mark.parametrize("attach", ATTACHMENTS)
@pytest.mark.parametrize("model, examples, settings, reduced", [
    (Head, UNEQUAL, {"reduce": "none"}, lambda g: g),  # a mask of [B, P] isn't laid over [B, 5]
    (Head, UNEQUAL, {"reduce": "norm", "over": 1}, lambda g: g.norm()),
    (Head, UNEQUAL, {"reduce": "sum", "over": -1, "calls": "stack"}, lambda g: g.sum().reshape(1)),
    (Head, UNEQUAL, {"reduce": "sum", "over": -1, "calls": "sum"}, lambda g: g.sum()),
    (Head, EQUAL, {"reduce": "none"}, lambda g: g),
    (Pattern, EQUAL, {"over": 2}, lambda g: g.mean(1)),
    (Pattern, UNEQUAL, {"over": (2, 3), "seq_len": None, "batch_tokens": 1}, None),
    (Prompt, UNEQUAL, {"batch_tokens": 1}, lambda g: g.mean(0)),
    (Prompt, EQUAL, {"over": 1}, lambda g: g.mean(0)),
    (Channels, EQUAL, {"over": 2}, lambda g: g.mean(1)),
])  # fmt: skip
def test_what_the_user_says_by_number_is_done(tmp_path, backend, attach, model, examples, settings, reduced):
    made = model()
    if reduced is None:  # a row keeps dimension 1, so all batches are padded to one width
        with pytest.raises(ValueError, match=re.escape(PADDED)):
            run(made, tmp_path / "out", examples, backend=backend, attach=attach, **settings)
        return
    run(made, tmp_path / "out", examples, backend=backend, attach=attach, **settings)
    assert_rows(tmp_path / "out", made, examples, reduced)


class Both(Head):
    """A point with positions and one without, in one capture."""

    def through(self, x, ids):
        return super().through(self.inner(x), ids)

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)


def test_a_mask_covers_the_points_that_have_positions(tmp_path, backend):
    specs = [tlfast.Spec("inner", "mean"), tlfast.Spec("point", "none")]
    model = Both()
    collect(model, tmp_path, UNEQUAL, points=specs, loss=loss, backend=backend)
    dataset = tlfast.open_dataset(tmp_path)
    for i, tokens in enumerate(UNEQUAL):
        # Each position has the same share of the mean's gradient; at padding it is zero, and isn't counted.
        through = alone(model, tokens) @ model.point.weight / len(tokens)
        torch.testing.assert_close(dataset["inner"][i], through)
