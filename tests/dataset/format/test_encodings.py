"""Encoded rows: the codes and scales that docs/format.md says, and how far from the rows they read back."""

import numpy as np
import pytest
import torch
from encoding_cases import check_codes, hard_rows, wrong
from hypothesis import given, settings
from hypothesis import strategies as st

from tlfast.dataset.format import encodings
from tlfast.dataset.format.encodings import (
    BLOCKS,
    NEAREST,
    SMALLEST_SCALE,
    STOCHASTIC,
    Encoded,
    decode,
    encode,
    wrong_codes,
)
from tlfast.dataset.format.rounding import Rounding, rounding_of
from tlfast.dataset.write import native as native_writer
from tlfast.projections.philox import philox

FLOAT_MAX = torch.finfo(torch.float32).max
SLACK = 2.0**-16  # of a scale: the quotient and the product are rounded to float32, each at most 128 scales large
LARGEST = {"int8": 127, "int8:64": 127, "float8_e4m3fn": 448, "int4:64": 7}
FLOAT8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()  # of each code; two are NaN


def block_of(encoding, n_values):
    """How many values share a scale."""
    return BLOCKS[encoding] or n_values


def plain(codes, encoding, n_values):
    """What codes stand for, in scales: [n, values]."""
    if encoding == "float8_e4m3fn":
        return FLOAT8[codes.view(torch.uint8).numpy()]
    if encoding == "int4:64":
        both = np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(len(codes), -1).astype(np.int64)
        assert not both[:, n_values:].any()
        return np.where(both > 7, both - 16, both)[:, :n_values]
    return codes.numpy()


def nearest(quotients, encoding):
    """The nearest code, half to even, by looking at all of them."""
    if encoding != "float8_e4m3fn":
        return np.rint(quotients)
    codes = np.flatnonzero(~np.isnan(FLOAT8))
    codes = np.concatenate([codes[codes % 2 == 0], codes[codes % 2 == 1]])  # of two as near, the first that is found
    off = np.abs(FLOAT8[codes] - quotients.astype(np.float64)[..., None])
    return FLOAT8[codes[off.argmin(-1)]]


def by_numpy(rows, encoding):
    """Codes and scales of finite rows [n, values], worked out block by block."""
    block, codes, scales = block_of(encoding, rows.shape[1]), [], []
    for start in range(0, rows.shape[1], block):
        part = rows[:, start : start + block].astype(np.float32)
        scale = np.maximum(np.abs(part).max(1) * np.float32((1 - 2.0**-22) / LARGEST[encoding]), np.float32(2.0**-126))
        scales.append(scale)
        codes.append(nearest(part / scale[:, None], encoding))
    return np.concatenate(codes, 1), np.stack(scales, 1)


def misses(rows, stored, decoded, encoding):
    """How far each value is from its row, in what it may be."""
    block = block_of(encoding, rows.shape[1])
    scales = stored.scales.reshape(len(rows), -1).repeat_interleave(block, 1)[:, : rows.shape[1]].double()
    off = (rows.double() - decoded.double()).abs()
    if encoding == "float8_e4m3fn":
        return off / torch.maximum(rows.double().abs() / 16, scales / 1024) / (1 + SLACK)
    return off / scales / (0.5 + SLACK)


def check_bound(rows, stored, encoding):
    decoded = decode(*stored, encoding, tuple(rows.shape[1:]))
    assert misses(rows, stored, decoded, encoding).max() <= 1


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.sampled_from(list(NEAREST)), st.sampled_from([1, 2, 63, 64, 65, 130]), st.data())
@settings(max_examples=150)
def test_codes_scales_and_bound_for_any_rows(encoding, n_values, data):
    few = data.draw(st.lists(FLOATS, min_size=1, max_size=8))
    rows = torch.tensor([few[k % len(few)] for k in range(2 * n_values)]).view(2, n_values)
    stored = encode(rows, encoding)
    codes, scales = by_numpy(rows.numpy(), encoding)
    np.testing.assert_array_equal(plain(stored.codes, encoding, n_values), codes)
    np.testing.assert_array_equal(stored.scales.reshape(2, -1).numpy(), scales)
    check_bound(rows, stored, encoding)


@pytest.mark.parametrize("encoding", NEAREST)
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e-42, 1e30])
def test_the_bound_holds_for_normal_and_subnormal_rows(encoding, scale):
    rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * scale
    check_bound(rows, encode(rows, encoding), encoding)


@pytest.mark.parametrize("encoding", NEAREST)
def test_the_check_of_the_bound_finds_a_wrong_scale(encoding):
    rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(rows, encoding)
    with pytest.raises(AssertionError):
        check_bound(rows, Encoded(codes, scales * 1.01), encoding)


@pytest.mark.parametrize("encoding", NEAREST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_encoded_as_their_float32(encoding, dtype):
    rows = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours, theirs in zip(encode(rows, encoding), encode(rows.float(), encoding), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("encoding", NEAREST)
def test_zeros(encoding):
    codes, scales = encode(torch.tensor([[0.0, -0.0] * 40]), encoding)
    assert not plain(codes, encoding, 80).any()
    assert (scales == SMALLEST_SCALE).all()
    decoded = decode(codes, scales, encoding, (80,))
    assert not decoded.any()
    assert bool(decoded.signbit().any()) == (encoding == "float8_e4m3fn")


@pytest.mark.parametrize("encoding", ["int8", "int8:64", "int4:64"])
def test_subnormal_values_keep_half_of_the_smallest_scale(encoding):
    rows = torch.full((1, 3), 2.0**-126)
    rows[0, 1], rows[0, 2] = 2.0**-149, -(2.0**-127 + 2.0**-140)
    codes, scales = encode(rows, encoding)
    assert plain(codes, encoding, 3).tolist() == [[1, 0, -1]]
    assert scales.unique().tolist() == [SMALLEST_SCALE]


@pytest.mark.parametrize("encoding", NEAREST)
def test_the_largest_values_stay_finite(encoding):
    rows = torch.tensor([[FLOAT_MAX, -FLOAT_MAX, FLOAT_MAX / 2]])
    stored = encode(rows, encoding)
    decoded = decode(*stored, encoding, (3,))
    assert plain(stored.codes, encoding, 3)[0, :2].tolist() == [LARGEST[encoding], -LARGEST[encoding]]
    assert decoded.isfinite().all()
    check_bound(rows, stored, encoding)


def test_no_decoded_value_exceeds_the_largest_of_its_block():
    rows = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    decoded = decode(*encode(rows, "int8"), "int8", (1,))
    assert (decoded <= rows).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_makes_its_block_nan(bad):
    rows = torch.ones(3, 130)
    rows[1, 65] = bad
    for encoding in NEAREST:
        touched = slice(64, 128) if BLOCKS[encoding] else slice(None)
        codes, scales = encode(rows, encoding)
        assert not plain(codes, encoding, 130)[1, touched].any()
        assert int(scales.isnan().sum()) == 1
        assert scales.view(torch.int32)[scales.isnan()].tolist() == [0x7FC00000]
        expected = torch.zeros(3, 130, dtype=torch.bool)
        expected[1, touched] = True
        assert torch.equal(decode(codes, scales, encoding, (130,)).isnan(), expected)


@pytest.mark.parametrize("encoding", NEAREST)
@pytest.mark.parametrize("shape", [(), (1,), (3, 50)])
def test_rows_of_any_shape_and_none_at_all(encoding, shape):
    for n in (0, 1, 4):
        rows = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        codes, scales = encode(rows, encoding)
        decoded = decode(codes, scales, encoding, shape)
        assert decoded.shape == rows.shape
        assert codes.shape == (
            rows.shape if encoding != "int4:64" else (n, -(-rows[:1].numel() // 2) if n else codes.shape[1])
        )
        flat = encode(rows.reshape(n, -1), encoding) if n else (codes, scales)
        assert torch.equal(flat[0].view(codes.shape).view(torch.uint8), codes.view(torch.uint8))
        for i in range(n):
            assert torch.equal(decode(codes[i], scales[i], encoding, shape), decoded[i])


@pytest.mark.parametrize("encoding", NEAREST)
def test_given_memory_is_filled(encoding):
    rows = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = encode(rows, encoding)
    into = Encoded(*(torch.full_like(part, 6) for part in expected))
    assert encode(rows.transpose(0, 1).contiguous().transpose(0, 1), encoding, into) is into
    assert torch.equal(into.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(into.scales, expected.scales)


# Native code.


@pytest.mark.sanitize
@pytest.mark.parametrize("encoding", NEAREST)
def test_native_codes_and_norms_have_the_same_bits(native, encoding):
    check_codes(native_writer.loaded(), [encoding])


def test_the_check_of_native_codes_finds_a_wrong_bit(native):
    with pytest.raises(AssertionError):
        check_codes(wrong(native_writer.loaded()), ["int8"], widths=[64])


@pytest.mark.parametrize("encoding", NEAREST)
def test_native_codes_of_rows_in_any_memory(native, encoding):
    rows = hard_rows(torch.float32, 65)
    n = len(rows) // 6 * 6
    expected = encode(rows[:n], encoding)
    shaped = rows[:n].clone().view(n // 6, 6, 65).transpose(0, 1).contiguous().transpose(0, 1).reshape(n, 13, 5)
    other = (-rows[:n].T.contiguous()).T._neg_view().requires_grad_()
    for values in (shaped, other):
        into = Encoded(*(torch.full_like(part, 6) for part in encode(values.detach(), encoding)))
        assert encode(values.detach(), encoding, into, native_writer.loaded()) is into
        for ours, theirs in zip(into, expected, strict=True):
            assert torch.equal(ours.flatten(1 if ours.dim() > 1 else 0).view(torch.uint8), theirs.view(torch.uint8))


def test_what_native_code_can_not_reach_is_left_to_torch(monkeypatch):
    rows, calls, left = torch.ones(2, 3, dtype=torch.float64), [], []
    native = type("Native", (), {"encode_rows": lambda *given: calls.append(given)})
    monkeypatch.setattr(encodings, "_encode", lambda *given: left.append(given))
    gaps = Encoded(torch.zeros(2, 6, dtype=torch.int8)[:, ::2], torch.zeros(2))
    for values, into in ((rows, None), (rows.float(), gaps), (rows[:0].float(), None), (rows.to("meta"), None)):
        encode(values, "int8", into, native)
    assert (len(left), len(calls)) == (4, 0)
    encode(rows.float(), "int8", None, native)
    assert (len(left), len(calls)) == (4, 1)


@pytest.mark.parametrize(
    "encoding, size, code, got",
    [
        ("int8", 3, -128, "-128"),
        ("int4:64", 3, 8, "-8"),
        ("int4:64", 4, 8 << 4, "-8"),
        ("int4:64", 3, 1 << 4, "another than 0 behind"),
        ("float8_e4m3fn", 3, 127, "nan"),
        ("float8_e4m3fn", 3, 255, "nan"),
    ],
)
def test_codes_that_no_rows_have(encoding, size, code, got):
    stored = encode(torch.tensor([1.0, -1.0, 1.0, -1.0])[:size].repeat(2, 1), encoding)
    assert wrong_codes(stored, encoding, (size,)) is None
    stored.codes.view(torch.uint8)[1, -1] = code % 256
    rule, found = wrong_codes(stored, encoding, (size,))
    assert rule == f"have codes from -{LARGEST[encoding]} to {LARGEST[encoding]}"
    assert found.startswith(got)


# Stochastic rounding.


def drawn(n_rows, column="h", first=0):
    """Whose rows are those of so many examples, from a number on."""
    return rounding_of(column, first, [1] * n_rows)


def test_random_numbers_are_philox_of_the_column_the_example_and_the_place():
    names = Rounding("a point", torch.tensor([0, 5, 2**31, 2**40 + 3]), torch.tensor([0, 7, 1, 0]))
    numbers = names.examples.numpy()
    counter = (np.arange(18)[None], names.positions.numpy()[:, None], numbers[:, None] % 2**32, numbers[:, None] >> 32)
    words = philox(names.key, counter).reshape(4, 72)[:, :70]
    assert (names.uniforms(70).double().numpy() == (words >> 8) * 2.0**-24).all()
    assert names.key != names._replace(column="another").key
    assert rounding_of("h", 3, [2, 0, 1])[1:][0].tolist() == [3, 3, 5]
    assert rounding_of("h", 3, [2, 0, 1])[1:][1].tolist() == [0, 1, 0]


def apart_by(quotients, encoding):
    """How far the codes around each quotient are from each other."""
    if encoding != "float8_e4m3fn":
        return np.ones_like(quotients)
    return np.exp2(np.maximum(np.frexp(quotients)[1] - 1, -6) - 3).astype(np.float32)


def test_float8_codes_around_a_value_are_so_far_apart():
    finite = np.sort(FLOAT8[~np.isnan(FLOAT8)])
    between = (finite[1:] + finite[:-1]) / 2
    assert np.array_equal(apart_by(between, "float8_e4m3fn")[between != 0], np.diff(finite)[between != 0])


@pytest.mark.parametrize("encoding", STOCHASTIC)
def test_drawn_codes_are_one_of_the_two_around_a_value(encoding):
    rows, nearest = hard_rows(torch.float32, 130), STOCHASTIC[encoding]
    rows = rows[rows.isfinite().all(1)]
    rounding = drawn(len(rows))
    stored = encode(rows, encoding, rounding=rounding)
    assert torch.equal(stored.scales, encode(rows, nearest).scales)
    block, largest = block_of(encoding, 130), LARGEST[nearest]
    scales = stored.scales.reshape(len(rows), -1).repeat_interleave(block, 1)[:, :130].numpy()
    apart = apart_by(rows.numpy() / scales, nearest)
    steps = rows.numpy() / scales / apart
    below = np.floor(steps)
    codes = np.clip((below + (steps - below > rounding.uniforms(130).numpy())) * apart, -largest, largest)
    np.testing.assert_array_equal(plain(stored.codes, nearest, 130), codes)
    off = (rows.double() - decode(*stored, encoding, (130,)).double()).abs()
    bound = torch.from_numpy(scales).double()
    if nearest == "float8_e4m3fn":
        bound = torch.maximum(rows.double().abs() / 8, bound / 512)
    assert (off <= bound * (1 + SLACK)).all()
    assert wrong_codes(stored, encoding, (130,)) is None


def worst_mean(encoding, n=20_000):
    """How far the mean over many examples is from the row that all have, in what it may be; and in scales."""
    row = torch.randn(1, 70, generator=torch.Generator().manual_seed(0))
    rounding = drawn(n) if encoding in STOCHASTIC else None
    stored = encode(row.expand(n, 70), encoding, rounding=rounding)
    mean = decode(*stored, encoding, (70,)).double().mean(0)
    scales = stored.scales[0].reshape(-1).repeat_interleave(block_of(encoding, 70))[:70].double()
    quotients, nearest = row[0].double() / scales, STOCHASTIC.get(encoding, encoding)
    apart = torch.from_numpy(apart_by(quotients.float().numpy(), nearest)).double()
    share = quotients / apart % 1
    deviation = (share * (1 - share) / n).sqrt() * apart
    off = (mean - row[0].double()).abs() / scales
    return (off / (6 * deviation + (2.0**-12 if nearest == "float8_e4m3fn" else 2.0**-14))).max(), off.max()


def test_the_mean_over_examples_is_the_row():
    """Within six standard deviations of what a draw between two codes has; that of nearest codes is not."""
    for encoding in STOCHASTIC:
        assert worst_mean(encoding)[0] <= 1
    assert worst_mean("int8")[0] > 10
    assert worst_mean("float8_e4m3fn")[0] > 10


@pytest.mark.parametrize("encoding", STOCHASTIC)
def test_a_row_is_rounded_the_same_among_any_others(encoding):
    rows = torch.randn(40, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounding, order = drawn(40, first=1000), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    stored = encode(rows, encoding, rounding=rounding)
    mixed = encode(rows[order], encoding, rounding=rounding.part(order))
    for ours, theirs in zip(mixed, stored, strict=True):
        assert torch.equal(ours, theirs[order])
    others = [encode(rows, encoding, rounding=other) for other in (drawn(40), drawn(40, "another", 1000))]
    assert all(not torch.equal(other.codes, stored.codes) for other in others)
    halves = [encode(rows[half], encoding, rounding=rounding.part(half)) for half in (slice(0, 17), slice(17, 40))]
    assert torch.equal(torch.cat([half.codes for half in halves]), stored.codes)


@pytest.mark.sanitize
@pytest.mark.parametrize("encoding", STOCHASTIC)
def test_native_drawn_codes_have_the_same_bits(native, encoding):
    check_codes(native_writer.loaded(), [encoding])


def test_whose_rows_are_rounded_must_be_known():
    with pytest.raises(ValueError, match=r"^encode: rounding for int8:stochastic must be given where an encoding is"):
        encode(torch.ones(2, 3), "int8:stochastic")
    with pytest.raises(
        ValueError, match=r"^encode: rounding for int8 must be given where an encoding is stochastic, and"
    ):
        encode(torch.ones(2, 3), "int8", rounding=drawn(2))
    with pytest.raises(
        ValueError, match=r"^encode: rounding must have a number for each of 2 rows, got \[\[3\], \[3\]\]"
    ):
        encode(torch.ones(2, 3), "int8:stochastic", rounding=drawn(3))
