"""Rows of tokens in a capture: padding is squeezed out by the mask, and it is known whose each row is."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import tlfast
from tlfast import Spec
from tlfast.hooks.tokens import Tokens, token_rows, tokens_of

LENGTHS = (3, 1, 4)
WIDTH = 5


class Point(nn.Module):
    """Its gradient is 2 * output: known at every position, and not zero at padding."""

    def __init__(self):
        super().__init__()
        self.point = nn.Identity()

    def forward(self, x):
        return self.point(x * 1.0).square().sum()


def batch(side, lengths=LENGTHS, seed=0):
    """Values [B, P, 2], and the mask of those that are real."""
    values = torch.randn(len(lengths), WIDTH, 2, generator=torch.Generator().manual_seed(seed))
    firsts = [0 if side == "right" else WIDTH - length for length in lengths]
    mask = torch.zeros(len(lengths), WIDTH, dtype=torch.bool)
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        mask[row, first : first + length] = True
    return values.requires_grad_(), mask


def refuses(text, kind=ValueError):
    return pytest.raises(kind, match="^" + re.escape(text))


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_tokens_beside_those_of_examples(backend, attach, side):
    specs = [Spec("point", per="token"), Spec("point", "sum"), Spec("point", "sum", -1, name="width", per="token")]
    specs.append(Spec("point", "sum", -1, name="heads", per="token", heads=(2, 1)))
    with tlfast.capture(Point(), specs, rows=9, backend=backend, attach=attach) as cap:
        parts = [batch(side), batch(side, (5, 2), seed=1)]
        for values, mask in parts:
            with cap.batch(mask, ids=list("abcde")[: len(mask)]):
                cap._model(values).backward()
        whole = batch(side, (1,), seed=2)[0]
        cap._model(whole).backward()  # outside of a batch there is no mask: all positions count
    parts.append((whole, torch.ones(1, WIDTH, dtype=torch.bool)))
    truth = torch.cat([2 * values.detach()[mask] for values, mask in parts])
    torch.testing.assert_close(cap["point:none"], truth, rtol=0, atol=0)
    torch.testing.assert_close(cap["point:width"], truth.sum(-1))
    torch.testing.assert_close(cap["point:heads"], truth)
    owners, positions = cap.where("point:none")
    assert owners.tolist() == [0] * 3 + [1] + [2] * 4 + [3] * 5 + [4] * 2 + [5] * 5
    assert positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    assert (cap.rows, cap["point:sum"].shape) == (6, (6, 2))
    sums = torch.zeros(6, 2).index_add_(0, owners, cap["point:none"])
    torch.testing.assert_close(sums, cap["point:sum"])
    cap.clear()
    assert cap["point:none"].shape == (0, 2)


def test_two_backwards_in_a_batch_have_its_tokens_twice(backend):
    values, mask = batch("left")
    model = Point()
    with tlfast.capture(model, "point", per="token", rows=6, backend=backend) as cap, cap.batch(mask):
        for _ in range(2):
            model(values).backward()
    assert torch.equal(cap["point"], 2 * torch.cat([values.detach()[mask]] * 2))
    assert cap.where("point")[0].tolist() == [0] * 3 + [1] + [2] * 4 + [3] * 3 + [4] + [5] * 4


def test_a_token_has_one_position_to_reduce():
    """The default of `collect`, a mean over positions, leaves a token's row as it is."""
    for reduce in ("sum", "mean", "last"):
        assert tlfast.capture(Point(), "point", rows=1, reduce=reduce, per="token").wanted["point"][1].reduce == "none"


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"per": "word"}, "Spec: per must be one of example, token, got 'word'. Check the spelling."),
        (
            {"encoding": "int3"},
            (
                "Spec: encoding must be one of int8, int8:64, float8_e4m3fn, int4:64, "
                "int8:stochastic, int8:64:stochastic, float8_e4m3fn:stochastic, int4:64:stochastic, got 'int3'. Check "
                "the spelling."
            ),
        ),
        (
            {"per": "token", "reduce": "norm", "over": ("pos", -1)},
            (
                'Spec: over must be behind the positions with per="token": -1, or 2 and more, got [1, -1]. '
                'reduce="none" keeps all of a token\'s row.'
            ),
        ),
        ({"per": "token", "at": -1}, 'Spec: at must be left out with per="token", got -1. Keep chosen positions by '),
        ({"per": "token", "reduce": "sum", "over": -2}, "Spec: over must be behind the positions"),
        ({"per": "token", "reduce": "sum", "over": "batch"}, "Spec: over must be behind the positions"),
        (
            {"encoding": "int8", "dtype": "float64"},
            (
                "Spec: dtype must be float32, bfloat16 or float16 where rows are encoded, got torch.float64. "
                "Leave dtype= out, or encoding=."
            ),
        ),
    ],
)
def test_specs_that_have_no_such_rows(settings, text):
    with refuses(text):
        Spec("point", **settings)


def test_settings_of_a_capture_that_do_not_go_together():
    text = 'capture: calls must not be "stack" with per="token", got \'stack\'. A stack has the calls before the '
    with refuses(text):
        tlfast.capture(Point(), "point", rows=1, per="token", calls="stack")
    text = "capture: per must be left out where points are Specs, got 'token' beside them. Say it in each Spec."
    with refuses(text):
        tlfast.capture(Point(), Spec("point"), rows=1, per="token")


def test_masks_that_say_no_tokens(backend):
    values, mask = batch("right")
    gap = mask.clone()
    gap[2, 1] = False
    model = Point()
    with tlfast.capture(model, "point", per="token", rows=3, backend=backend) as cap:
        for bad, text in (
            (gap, 'batch: mask with per="token" must keep one run of tokens, got a gap in row 2. Take the rows of '),
            (mask[0], 'batch: mask with per="token" must be [B, P], got [5]. Give a mask of examples and positions.'),
        ):
            with refuses(text), cap.batch(bad):
                pytest.fail("the block must not begin")
        text = "batch: masks must leave columns per token to mask, got 'point'. Keep its rows per example, or in a "
        with refuses(text), cap.batch(masks={"point": mask}):
            pytest.fail("the block must not begin")
        with cap.batch(mask):
            model(values).backward()
    assert len(cap["point"]) == sum(LENGTHS)


def test_rows_that_can_not_be_read_so(backend):
    model, flat = Point(), torch.ones(3, requires_grad=True)
    with tlfast.capture(model, [Spec("point", per="token", name="t"), Spec("point", encoding="int8")], rows=3) as cap:
        model(flat).backward()
    text = 'capture at point:t: a gradient must have the positions as dimension 1 with per="token", got rows []. Use '
    with refuses(text):
        cap["point:t"]
    text = (
        "capture: rows of the column point:none must go into a dataset, which stores them as int8, got a look at "
        "them. Use cap.into, or leave encoding= out to read them here."
    )
    with refuses(text, RuntimeError):
        cap["point:none"]
    text = "capture: the column point:none must have a row for each token to be asked whose they are, got a row an "
    with refuses(text):
        cap.where("point:none")
    with tlfast.capture(model, "point", rows=3, per="token") as cap:
        text = "graph_step: cap must have rows of examples, got columns per token. Keep padded rows: leave per= out"
        if cap.backend == "native":
            with refuses(text, RuntimeError):
                tlfast.graph_step(cap, lambda x: model(x).backward(), flat)
        model(flat[:, None]).backward()


def test_which_rows_are_tokens():
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    tokens = tokens_of("test", mask)
    assert tokens == Tokens([2, 0, 3], [1, 0, 0])
    assert (tokens.total, tokens.width, Tokens([]).width) == (5, 3, 0)
    assert token_rows("test", torch.tensor([2, 0, 1]), tokens, 3).tolist() == [7, 8, 3, 4, 5]
    assert tokens_of("test", torch.zeros(2, 0, dtype=torch.bool)) == Tokens([0, 0], [0, 0])
