"""Products into memory that is there: the einsum, in every dtype, into views, in blocks; and what is refused."""

from __future__ import annotations

import re

import pytest
import torch

from tlfast.recipes import gather_into, outer_into, products

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_outer_adds_the_dots_of_all_pairs(dtype, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 64)  # of converted numbers, so that there are several
    draw = torch.Generator().manual_seed(0)
    writers, readers = (torch.randn(n, 4, 5, 6, generator=draw).to(dtype) for n in (7, 3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    everything = torch.full((9, 8), float("nan"), dtype=wide)
    out = everything[1:8, 2:5].fill_(1.0)
    assert outer_into(out, writers, readers) is out
    truth = 1.0 + torch.einsum("u...,v...->uv", writers.double(), readers.double())
    scale = 1.0 + torch.einsum("u...,v...->uv", writers.double().abs(), readers.double().abs())
    assert ((out.double() - truth).abs() <= 4 * 5 * 6 * torch.finfo(wide).eps * scale).all()
    assert everything.isnan().sum() == 9 * 8 - 7 * 3


@pytest.mark.simt
@pytest.mark.parametrize("few", [0, 99], ids=["matrices", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_takes_each_direction_at_its_position(dtype, few, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 16)
    monkeypatch.setattr(products, "FEW", few)
    draw = torch.Generator().manual_seed(0)
    grad, directions = torch.randn(3, 5, 8, generator=draw).to(dtype), torch.randn(20, 8, generator=draw).to(dtype)
    positions = torch.randint(-5, 5, (20,), generator=draw)
    out = torch.full((20, 6), float("nan"))
    gather_into(out[:, ::2], grad, positions, directions)
    terms = grad.double()[:, positions] * directions.double()  # [B, K, D]
    assert ((out[:, ::2].double() - terms.sum(-1).T).abs() <= 8 * EPS * terms.abs().sum(-1).T).all()
    assert out[:, 1::2].isnan().all()
    assert gather_into(torch.empty(0, 3), grad, positions[:0], directions[:0]).shape == (0, 3)
    for layout in (
        grad.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        grad.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        again = gather_into(torch.empty(20, 3), layout, positions.int(), directions.double())
        torch.testing.assert_close(again, out[:, ::2], rtol=1e-5, atol=1e-5)
    narrow = gather_into(torch.empty(20, 1), grad[:1, :, :1], positions, directions[:, :1])  # nothing is left to reduce
    torch.testing.assert_close(narrow, terms[:1, :, :1].sum(-1).T.float(), rtol=1e-5, atol=1e-5)


def outer(out=(2, 2), writers=(2, 4), readers=(2, 4), dtype=torch.float32):
    return outer_into(torch.ones(out), torch.ones(writers, dtype=dtype), torch.ones(readers))


def gather(out=(2, 1), grad=(1, 3, 2), positions=(0, 1), directions=(2, 2)):
    return gather_into(torch.ones(out), torch.ones(grad), torch.tensor(positions), torch.ones(directions))


WRONG = {
    "edges' memory": (outer, dict(out=(2, 3)), "out must be torch.float32 [2, 2] on cpu, got torch.float32 [2, 3]"),
    "edges' widths": (outer, dict(readers=(2, 5)), "writers must have the sizes of readers behind the first ([2, 5]"),
    "integers": (outer, dict(dtype=torch.int32), "writers must be floating point with two dimensions or more"),
    "far away": (gather, dict(positions=(0, 3)), "positions must lie within 3 positions, got 0 to 3"),
    "no indices": (gather, dict(positions=(0.0, 1.0)), "positions must be integers, one for each of the 2 directions"),
    "widths": (gather, dict(directions=(2, 4)), "grad and directions must be [B, P, D] and [K, D]"),
    "memory": (gather, dict(out=(1, 2)), "out must be torch.float32 [2, 1] on cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_an_error(case):
    call, given, text = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        call(**given)
