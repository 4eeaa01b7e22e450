"""Running sums against float64, the same for any split and any number of parts; what is not finite never poisons."""

from __future__ import annotations

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import tlfast
from tlfast import RunningSums, Spec
from tlfast.hooks.running import BLOCK_ROWS

STATS = ("mean", "moment2", "moment2_full", "max")
EPS32, EPS64 = 2.0**-24, 2.0**-53


def bounds(rows):
    """float64 truth of each statistic, and how far the documented bound lets it be off."""
    x, n = rows.double(), len(rows)
    factor = (BLOCK_ROWS + 1) * EPS32 + n * EPS64
    full, size = torch.einsum("nd,ne->de", x, x) / n, torch.einsum("nd,ne->de", x.abs(), x.abs()) / n
    return {
        "mean": (x.mean(0), factor * x.abs().mean(0)),
        "moment2": (x.square().mean(0), factor * x.square().mean(0) + 2.0**-149),
        "moment2_full": (full, factor * size + 2.0**-149),
        "max": (x.amax(0), torch.zeros(x.shape[1])),
    }


def check(found, rows):
    assert found.n == len(rows)
    for stat, (true, off) in bounds(rows).items():
        got = getattr(found, stat).flatten(0, -1 if stat != "moment2_full" else 0).double()
        assert got.dtype == torch.float64
        assert ((got - true).abs() <= off).all(), stat


def refuses(text, kind=ValueError):
    return pytest.raises(kind, match="^" + re.escape(text))


def drawn(n, width, dtype=torch.float32, seed=0):
    """Rows with a mean beside their spread, whose columns differ in size by far."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(n, width, generator=generator) + 0.3) * torch.logspace(-3, 3, width)
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_within_their_bound_of_float64_for_any_split(dtype):
    rows = drawn(9_001 if dtype == torch.float32 else 1_500, 9, dtype)
    found = []
    for size in (len(rows), 1_000, 7 if dtype != torch.float32 else 613):
        sums = RunningSums(STATS)
        for part in rows.split(size):
            sums.add({"h": part.view(-1, 3, 3)})
        check(sums["h"], rows)
        assert sums["h"].mean.shape == sums["h"].max.shape == sums["h"].sum.shape == (3, 3)
        found.append(sums["h"])
    full = found[0].moment2_full
    assert torch.equal(full, full.T)
    torch.testing.assert_close(full.diagonal(), found[1].moment2.flatten(), rtol=1e-5, atol=0)


@pytest.mark.long
def test_a_million_rows():
    """Each split is within the bound, and so are parts that are merged; a plain sum in float32 is not."""
    rows = drawn(1_000_000, 6) + 1.0
    for size in (4096, 777):
        sums = RunningSums(STATS)
        for part in rows.split(size):
            sums.add({"h": part})
        check(sums["h"], rows)
    merged = RunningSums(STATS)
    for part in (rows[:1], rows[1:333_333], rows[333_333:]):
        more = RunningSums(STATS)
        more.add({"h": part})
        merged.merge(more)
    check(merged["h"], rows)
    true, off = bounds(rows)["mean"]
    plain = np.add.accumulate(rows.numpy(), dtype=np.float32)[-1] / np.float64(len(rows))
    assert (np.abs(plain - true.numpy()) > off.numpy()).any()


def test_a_check_that_can_fail():
    sums = RunningSums(STATS)
    sums.add({"h": drawn(100, 4)})
    with pytest.raises(AssertionError):
        check(sums["h"], drawn(100, 4) * (1 + 1e-4))


def test_wide_rows_have_all_products(monkeypatch):
    rows = drawn(600, 601, seed=1)
    sums = RunningSums("moment2_full")
    sums.add({"h": rows})
    check_full = bounds(rows)["moment2_full"]
    assert ((sums["h"].moment2_full - check_full[0]).abs() <= check_full[1]).all()
    # Products of the user's model may be less exact; these aren't.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            less = RunningSums("moment2_full")
            less.add({"h": rows})
    finally:
        torch.set_float32_matmul_precision(before)
    assert ((less["h"].moment2_full - check_full[0]).abs() <= check_full[1]).all()


@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_squares_that_float32_does_not_hold(scale):
    rows = drawn(700, 3) * scale
    sums = RunningSums(STATS)
    sums.add({"h": rows})
    x = rows.double()
    torch.testing.assert_close(sums["h"].moment2, x.square().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums["h"].moment2_full, x.T @ x / 700, rtol=1e-9, atol=0)


def test_parts_that_are_saved_and_merged_are_one_run(tmp_path):
    rows = drawn(3_000, 6)
    parts = [RunningSums(STATS, identity="a model", non_finite="skip") for _ in range(3)]
    for part, own in zip(parts, rows.split(1_000), strict=True):
        part.add({"a h/\u00e9": own, "other": own[:0]})
        part.skipped = [("text", 3, "short")]
    parts[2].add({"late": torch.tensor([[1.0], [torch.nan]])})
    for k, part in enumerate(parts):
        part.save(tmp_path / f"{k}.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "1.npz", "2.npz"]
    loaded = [RunningSums.load(tmp_path / f"{k}.npz") for k in range(3)]
    for ours, theirs in zip(parts, loaded, strict=True):
        assert repr(ours) == repr(theirs)
        assert (ours.identity, ours.skipped) == (theirs.identity, theirs.skipped)
        for stat in STATS:
            assert torch.equal(getattr(ours["a h/\u00e9"], stat), getattr(theirs["a h/\u00e9"], stat))
    merged = loaded[0].merge(loaded[1]).merge(loaded[2])
    other = parts[2].merge(parts[1].merge(parts[0]))
    for sums in (merged, other):
        check(sums["a h/\u00e9"], rows)
        assert (sums["late"].n, sums["late"].n_skipped, len(sums.skipped)) == (1, 1, 3)
    assert "other" not in merged
    assert merged.names == ["a h/\u00e9", "late"]


def test_rows_that_are_not_finite():
    rows = drawn(1_030, 4)
    bad = rows.clone()
    bad[3, 1], bad[700, 0] = torch.nan, -torch.inf
    sums = RunningSums(STATS)
    text = 'RunningSums: rows at b must be finite, got NaN or infinity in 2 of 1030 rows. non_finite="skip" leaves '
    with refuses(text, FloatingPointError):
        sums.add({"a": rows, "b": bad})
    assert sums.names == []
    sums = RunningSums(STATS, non_finite="skip")
    sums.add({"a": rows, "b": bad, "none": torch.full((2, 3), torch.nan)})
    check(sums["a"], rows)
    check(sums["b"], torch.cat([rows[:3], rows[4:700], rows[701:]]))
    assert [(sums[name].n, sums[name].n_skipped) for name in sums.names] == [(1030, 0), (1028, 2), (0, 2)]
    assert sums["none"].mean.isnan().all()
    assert "'b': 1028 rows [4], 2 skipped" in repr(sums)


@pytest.mark.parametrize(
    "do, kind, text",
    [
        (lambda sums: RunningSums("median"), ValueError, "RunningSums: stats must be one of sum, mean, moment2, "),
        (lambda sums: RunningSums(()), ValueError, "RunningSums: stats must name some of sum, mean, moment2, moment2_"),
        (lambda sums: RunningSums(non_finite="keep"), ValueError, "RunningSums: non_finite must be one of stop, skip"),
        (lambda sums: sums["x"], KeyError, "\"RunningSums: a name must be one of h, got 'x'. See sums.names."),
        (
            lambda sums: sums["h"].max,
            AttributeError,
            "RunningSums: max of 'h' must be one of the stats that were asked for, got sum alone. Give RunningSums ",
        ),
        (
            lambda sums: sums.add({"h": torch.ones(2, 3)}),
            ValueError,
            "RunningSums: a row at h must have shape [2] as those before, got [3]. Reduce what changes, or say per=",
        ),
        (
            lambda sums: sums.add({"h": torch.ones(2, 2).int()}),
            ValueError,
            "RunningSums: a row at h must have floating values, got torch.int32 [2]. Leave it out.",
        ),
        (
            lambda sums: sums.merge(RunningSums("max")),
            ValueError,
            "RunningSums: stats must be ('sum',) in both parts, got ('max',). Sums of other things can't be added up.",
        ),
        (
            lambda sums: sums.merge(RunningSums("sum", identity="b")),
            ValueError,
            "RunningSums: identity must be '' in both parts, got 'b'.",
        ),
        (
            lambda sums: sums.merge(added(torch.ones(1, 3))),
            ValueError,
            "RunningSums: a row at h must have shape [2] in both parts, got [3]. They are not of one model.",
        ),
        (
            lambda sums: tlfast.capture(nn.Linear(2, 2), "", rows=1, encoding="int8").into(sums),
            ValueError,
            "into: encoding of  must be None where rows are added up, got 'int8'. Leave it out: nothing is stored.",
        ),
        (
            lambda sums: tlfast.capture(nn.Linear(2, 2), "", rows=1).into(sums, config="x"),
            ValueError,
            "into: plan, header, config, staging, disk_wait_s must be left out where out is RunningSums, got some. ",
        ),
        (
            lambda sums: tlfast.capture(nn.Linear(2, 2), "", rows=1).into(sums).left,
            RuntimeError,
            "into: left must be asked of a dataset, got running sums. Nobody knows how many rows there will be: loop ",
        ),
    ],
)
def test_what_can_not_be_done(do, kind, text):
    sums = added(torch.ones(4, 2))
    with refuses(text, kind):
        do(sums)
    assert sums["h"].n == 4


def added(rows):
    sums = RunningSums("sum")
    sums.add({"h": rows})
    return sums


def test_files_that_nobody_saved(tmp_path):
    (tmp_path / "text").write_text("nothing")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    for name in ("text", "other.npz"):
        with refuses(f"RunningSums: path must be a file that RunningSums.save wrote, got '{tmp_path / name}': "):
            RunningSums.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        RunningSums.load(tmp_path / "nowhere.npz")


# In a capture.


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.point = nn.Identity()

    def forward(self, x):
        return self.point(x * 1.0).square().sum()


def test_batches_of_any_length_are_added_up(backend, attach):
    model, sums = Point(), RunningSums(STATS)
    specs = [Spec("point", per="token", name="token"), Spec("point", "sum", name="example")]
    generator = torch.Generator().manual_seed(0)
    tokens, examples = [], []
    with tlfast.capture(model, specs, rows=4, backend=backend, attach=attach) as cap, cap.into(sums):
        for n, width in ((4, 5), (2, 9), (3, 2)):
            x = torch.randn(n, width, 3, generator=generator).requires_grad_()
            mask = torch.arange(width)[None] >= torch.randint(0, width, (n, 1), generator=generator)
            with cap.batch(mask):
                model(x).backward()
            tokens.append(2 * x.detach()[mask])
            examples.append((2 * x.detach() * mask[..., None]).double().sum(1))
    check(sums["point:token"], torch.cat(tokens))
    assert sums["point:example"].n == 9
    # Rows are sums over at most 9 positions in float32, in whichever order.
    rounding = 9 * torch.finfo(torch.float32).eps * float(torch.cat(tokens).abs().max()) * 9
    truth = torch.cat(examples).double().mean(0)
    torch.testing.assert_close(sums["point:example"].mean, truth, rtol=0, atol=rounding)


PADDED = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    "spec, given, kept",
    [
        (Spec("point"), {}, True),
        (Spec("point", "sum", -1), {}, True),
        (Spec("point", at="chosen"), {"at": {"chosen": PADDED}}, True),
        (Spec("point", "mean", -2), {}, False),
        (Spec("point", at=[0, 1]), {}, False),
        (Spec("point"), {"mask": torch.ones(2, 3, dtype=torch.bool)}, False),
    ],
    ids=["all", "widths", "chosen", "reduced", "at", "unpadded"],
)
@pytest.mark.parametrize("calls", ["raise", "stack"])
def test_zeros_at_padding_are_never_added_up(spec, given, kept, calls):
    """A mean of rows that keep positions would be watered down, and a maximum be at least zero."""
    model, x, sums = Point(), torch.ones(2, 3, 4, requires_grad=True), RunningSums("mean")
    with tlfast.capture(model, spec, rows=2, calls=calls) as cap, cap.into(sums):
        text = "into: rows at point must have real positions alone, got zeros at padding. Reduce positions by"
        with refuses(text) if kept else nullcontext(), cap.batch(**{"mask": PADDED, **given}):
            model(x).backward()
    assert sums.names == ([] if kept else ["point"])


def run_and_fail(model, x):
    model(x).backward()
    raise KeyError


def test_batches_that_fail_and_rows_without_a_batch(backend):
    model, sums, x = Point(), RunningSums("sum"), torch.ones(2, 3, requires_grad=True)
    with tlfast.capture(model, "point", rows=2, backend=backend) as cap:
        text = "into: rows in the capture must be those of batches alone, got 2 others. Run each backward inside cap."
        with refuses(text, RuntimeError), cap.into(sums):
            with pytest.raises(KeyError), cap.batch():
                run_and_fail(model, x)
            with pytest.raises(FloatingPointError), cap.batch():
                (model(x) * torch.nan).backward()
            with cap.batch():
                model(x).backward()
            model(x).backward()
        with refuses("into: rows in the capture must be those of batches alone, got 2 others. Read them", RuntimeError):
            cap.into(sums).__enter__()
        cap.clear()
        first = cap.into(sums)
        with first, refuses("into: a capture must go into one place, got ", RuntimeError):
            cap.into(sums).__enter__()
    assert sums["point"].n == 2
    assert sums["point"].sum.tolist() == [4.0] * 3


def test_points_that_did_not_fire_have_no_row(backend):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x, both):
            return self.a(x).sum() + (self.b(x).sum() if both else 0)

    model, sums, x = Two(), RunningSums("sum"), torch.ones(2, 3, requires_grad=True)
    specs = [Spec("a"), Spec("b", per="token")]
    with tlfast.capture(model, specs, rows=2, backend=backend, missing="nan") as cap, cap.into(sums):
        for both in (False, True, False):
            with cap.batch():
                model(x, both).backward()
    assert (sums["a"].n, sums["b"].n) == (6, 6)
    assert sums["b"].sum.tolist() == 6.0


def test_rows_of_a_whole_run(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50))
    texts = [torch.randint(0, 50, (2 + k % 7,)).tolist() for k in range(40)]
    found = {}
    for per in ("token", "example"):
        tlfast.collect(model, texts, tmp_path / per, points="0", per=per, progress=False)
        rows = tlfast.open_dataset(tmp_path / per)["0"]
        rows = rows.flat[:] if per == "token" else rows[:]
        for settings in ({}, {"batch_tokens": 16, "padding_side": "right"}):
            sums = found[per] = tlfast.running(model, [*texts, [1]], "0", per=per, stats=STATS, **settings)
            torch.testing.assert_close(sums["0"].mean, rows.double().mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(sums["0"].max, rows.double().amax(0), rtol=1e-5, atol=1e-7)
            assert sums["0"].n == len(rows)
            assert [reason for _, _, reason in sums.skipped]
            assert len(sums.skipped) == 1
    half = [tlfast.running(model, part, "0", per="token", stats=STATS) for part in (texts[:11], texts[11:])]
    merged = half[0].merge(half[1])
    assert merged["0"].n == found["token"]["0"].n
    torch.testing.assert_close(merged["0"].moment2_full, found["token"]["0"].moment2_full, rtol=1e-5, atol=1e-9)
    with refuses("RunningSums: identity must be "):
        merged.merge(found["example"])
    with refuses("running: rows at 0 must have real positions alone, got zeros at padding. Reduce"):
        tlfast.running(model, texts, "0", reduce="none")
    with refuses("running: settings must be among reduce, of, ", TypeError):
        tlfast.running(model, texts, "0", rows_per_unit=3)
