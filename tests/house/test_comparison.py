"""The comparison helpers fail on wrong answers: a NaN, a row off by one, a factor 2, a stray write, a wrong inf."""

import math

import pytest
import torch
from comparison import (
    assert_captured,
    assert_close_to_truth,
    assert_rows,
    assert_same_bits,
    assert_untouched,
    rounded_once,
    spread_mask,
    tolerance,
    truth,
)

REDUCTIONS = ("none", "sum", "mean", "last", "norm", "absmax")


def right_answer(grad, reduce, dims, mask=None, dtype=torch.float32):
    """By plain loops over the kept positions, in Python floats."""
    if reduce == "none":
        return torch.where(spread_mask(mask, grad.shape), grad, 0.0).to(dtype)
    kept = [d for d in range(grad.dim()) if d not in dims]
    out = torch.empty([grad.shape[d] for d in kept], dtype=torch.float64)
    real = spread_mask(mask, grad.shape)
    for place in torch.cartesian_prod(*[torch.arange(grad.shape[d]) for d in kept]).reshape(-1, len(kept)):
        index = [slice(None)] * grad.dim()
        for d, i in zip(kept, place.tolist(), strict=True):
            index[d] = i
        values = [
            v for v, r in zip(grad[tuple(index)].flatten().tolist(), real[tuple(index)].flatten(), strict=True) if r
        ]
        out[tuple(place.tolist())] = {
            "sum": lambda v: math.fsum(v),
            "mean": lambda v: math.fsum(v) / len(v) if v else math.nan,
            "last": lambda v: v[-1] if v else math.nan,
            "norm": lambda v: math.sqrt(math.fsum(x * x for x in v)),
            "absmax": lambda v: max(map(abs, v), default=0.0),
        }[reduce](values)
    return out.to(dtype)


CASES = [(r, dims, masked) for r in REDUCTIONS for dims in ((1,), (0, 1), (0, 2)) for masked in (False, True)]


def given(reduce, dims, masked):
    grad = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool) if masked else None
    return grad, mask, right_answer(grad, reduce, dims, mask)


@pytest.mark.parametrize("reduce, dims, masked", CASES)
def test_truth_agrees_with_plain_loops(reduce, dims, masked):
    grad, mask, right = given(reduce, dims, masked)
    assert_captured(right, grad, reduce, dims, mask)
    value, moved = truth(grad, reduce, dims, mask)
    torch.testing.assert_close(value, right.double(), rtol=1e-6, atol=1e-6)
    assert (moved <= 1e-4).all()


@pytest.mark.parametrize("reduce, dims, masked", CASES)
@pytest.mark.parametrize("wrong", ["nan", "factor 2", "off by one", "inf", "last bits of bfloat16", "sign"])
def test_assert_captured_refuses(reduce, dims, masked, wrong):
    grad, mask, right = given(reduce, dims, masked)
    bad = right.clone()
    spot = (0,) * bad.dim()
    if wrong == "nan":
        bad[spot] = math.nan
    elif wrong == "factor 2":
        bad *= 2
    elif wrong == "off by one":
        bad = bad.roll(1, -1)
    elif wrong == "inf":
        bad[spot] = math.inf
    elif wrong == "sign":
        bad[spot] = -bad[spot] if bad[spot] else 1.0
    elif wrong == "last bits of bfloat16":
        bad = bad.bfloat16()
        bad.view(torch.int16)[spot] += 3
    with pytest.raises(AssertionError):
        assert_captured(bad, grad, reduce, dims, mask)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_assert_captured_refuses_an_answer_that_ignores_the_mask(reduce):
    grad, mask = torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    grad[~mask] = 100
    assert_captured(right_answer(grad, reduce, (1,), mask), grad, reduce, (1,), mask)
    with pytest.raises(AssertionError):
        assert_captured(right_answer(grad, reduce, (1,)), grad, reduce, (1,), mask)


PRODUCT_CASES = [(r, dims, masked) for r, dims, masked in CASES if r not in ("norm", "absmax")]


@pytest.mark.parametrize("reduce, dims, masked", PRODUCT_CASES)
def test_assert_captured_of_a_product_refuses(reduce, dims, masked):
    grad, mask, _ = given(reduce, dims, masked)
    ref = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
    right = right_answer(grad * ref.float(), reduce, dims, mask)
    assert_captured(right, grad, reduce, dims, mask, ref=ref)
    _, moved = truth(grad, reduce, dims, mask, ref=ref)
    assert (moved <= 1e-4).all()
    assert (moved >= 0).all()
    others = (ref.roll(1, 0), ref * 1.01, ref.abs(), torch.ones_like(ref))
    for wrong in (right * 2, right.roll(1, -1), right_answer(grad, reduce, dims, mask),
                  *(right_answer(grad * other.float(), reduce, dims, mask) for other in others)):  # fmt: skip
        with pytest.raises(AssertionError):
            assert_captured(wrong, grad, reduce, dims, mask, ref=ref)


@pytest.mark.parametrize("value, wrong", [(7e4, 65504.0), (-7e4, math.inf), (math.inf, 65504.0), (60000.0, math.inf)])
def test_overflow_must_go_the_way_of_the_truth(value, wrong):
    exact, none = torch.tensor([value], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert_close_to_truth(exact.half(), exact, none)
    with pytest.raises(AssertionError):
        assert_close_to_truth(torch.tensor([wrong]).half(), exact, none)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_once_is_the_cast_from_float32_and_more_than_it_from_float64(dtype):
    values = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert_same_bits(rounded_once(values.double(), dtype), values.to(dtype))
    eps = torch.finfo(dtype).eps
    above, below = 1 + eps / 2 + 2.0**-40, 1 + 3 * eps / 2 - 2.0**-40
    got = rounded_once(torch.tensor([above, -above, below], dtype=torch.float64), dtype)
    assert got.tolist() == [1 + eps, -1 - eps, 1 + eps]
    assert torch.tensor(above, dtype=torch.float64).to(dtype).item() == 1.0, "torch rounds twice"


def test_nan_in_the_truth_asks_for_nan():
    value, none = torch.tensor([math.nan, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert_close_to_truth(torch.tensor([math.nan, 1.0]), value, none)
    for wrong in ([0.0, 1.0], [math.nan, math.nan], [math.inf, 1.0], [1.0, math.nan]):
        with pytest.raises(AssertionError):
            assert_close_to_truth(torch.tensor(wrong), value, none)


def test_tolerance_knows_subnormals_and_stays_small():
    value, none = torch.tensor([1e-8, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert_close_to_truth(value.half(), value, none)  # 1e-8 is 0 in float16: less than half of 2**-24
    assert tolerance(value, none, torch.float16)[0] < 2**-23
    assert tolerance(value, none, torch.float32)[1] < 2e-7
    with pytest.raises(AssertionError):
        assert_close_to_truth(torch.tensor([1.3e-7, 1.0]).half(), value, none)


@pytest.mark.parametrize("wrong", [[1.0, 2.0, -0.0], [1.0, math.nan, 0.0], [1.0, 2.0], [1.0, 2.0000002, 0.0]])
def test_assert_same_bits_refuses(wrong):
    right = torch.tensor([1.0, 2.0, 0.0])
    assert_same_bits(right.clone(), right)
    with pytest.raises(AssertionError):
        assert_same_bits(torch.tensor(wrong), right)
    with pytest.raises(AssertionError):
        assert_same_bits(right.double(), right)


def test_assert_untouched_refuses_strays_holes_and_empty_proofs():
    ring = torch.full((4, 2), math.nan)
    ring[:2] = 1
    assert_untouched(ring, 2)
    stray = ring.clone()
    stray[3, 1] = 0
    for bad, written in ((stray, 2), (ring, 1), (ring, 3), (ring[:2], 2), (torch.empty(4, 0), 2)):
        with pytest.raises(AssertionError):
            assert_untouched(bad, written)


def test_assert_rows_refuses_a_shifted_column():
    class Column:
        rows = torch.full((4, 2), math.nan)

    class Cap:
        _columns = {"a": Column}  # noqa: RUF012

        def __getitem__(self, name):
            return self._columns[name].rows[:2]

    Column.rows[:2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    right = Column.rows[:2].clone()
    assert_rows(Cap(), "a", right)
    for bad in (right.roll(1, 0), right * 2, right[:1]):
        with pytest.raises(AssertionError):
            assert_rows(Cap(), "a", bad)
    Column.rows[2] = 0
    with pytest.raises(AssertionError):
        assert_rows(Cap(), "a", right)
