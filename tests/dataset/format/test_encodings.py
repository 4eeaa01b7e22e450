"""int8 rows: the codes and scales that docs/format.md says, and how far from the rows they read back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlfast.dataset.format.encodings import BLOCKS, SMALLEST_SCALE, Encoded, decode, encode

FLOAT_MAX = torch.finfo(torch.float32).max
SLACK = 2.0**-16  # of a scale: the quotient and the product are rounded to float32, each at most 128 scales large


def block_of(encoding, n_values):
    """How many values share a scale."""
    return BLOCKS[encoding] or n_values


def by_numpy(rows, encoding):
    """Codes and scales of finite rows [n, values], worked out block by block."""
    block, codes, scales = block_of(encoding, rows.shape[1]), [], []
    for start in range(0, rows.shape[1], block):
        part = rows[:, start : start + block].astype(np.float32)
        scale = np.maximum(np.abs(part).max(1) * np.float32((1 - 2.0**-22) / 127), np.float32(2.0**-126))
        scales.append(scale)
        codes.append(np.rint(part / scale[:, None]).astype(np.int8))
    return np.concatenate(codes, 1), np.stack(scales, 1)


def misses(rows, stored, decoded, encoding):
    """How far each value is from its row, in scales."""
    block = block_of(encoding, rows.shape[1])
    scales = stored.scales.reshape(len(rows), -1).repeat_interleave(block, 1)[:, : rows.shape[1]].double()
    return (rows.double() - decoded.double()).abs() / scales


def check_bound(rows, stored, encoding):
    decoded = decode(*stored, encoding, tuple(rows.shape[1:]))
    assert misses(rows, stored, decoded, encoding).max() <= 0.5 + SLACK


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.sampled_from(list(BLOCKS)), st.sampled_from([1, 2, 63, 64, 65, 130]), st.data())
@settings(max_examples=150)
def test_codes_scales_and_bound_for_any_rows(encoding, n_values, data):
    few = data.draw(st.lists(FLOATS, min_size=1, max_size=8))
    rows = torch.tensor([few[k % len(few)] for k in range(2 * n_values)]).view(2, n_values)
    stored = encode(rows, encoding)
    codes, scales = by_numpy(rows.numpy(), encoding)
    np.testing.assert_array_equal(stored.codes.numpy(), codes)
    np.testing.assert_array_equal(stored.scales.reshape(2, -1).numpy(), scales)
    check_bound(rows, stored, encoding)


@pytest.mark.parametrize("encoding", BLOCKS)
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e-42, 1e30])
def test_the_bound_holds_for_normal_and_subnormal_rows(encoding, scale):
    rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * scale
    check_bound(rows, encode(rows, encoding), encoding)


@pytest.mark.parametrize("encoding", BLOCKS)
def test_the_check_of_the_bound_finds_a_wrong_scale(encoding):
    rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(rows, encoding)
    with pytest.raises(AssertionError):
        check_bound(rows, Encoded(codes, scales * 1.01), encoding)


@pytest.mark.parametrize("encoding", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_encoded_as_their_float32(encoding, dtype):
    rows = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ours, theirs in zip(encode(rows, encoding), encode(rows.float(), encoding), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("encoding", BLOCKS)
def test_zeros(encoding):
    codes, scales = encode(torch.tensor([[0.0, -0.0] * 40]), encoding)
    assert not codes.any()
    assert (scales == SMALLEST_SCALE).all()
    decoded = decode(codes, scales, encoding, (80,))
    assert not decoded.any()
    assert not decoded.signbit().any()


@pytest.mark.parametrize("encoding", BLOCKS)
def test_subnormal_values_keep_half_of_the_smallest_scale(encoding):
    rows = torch.full((1, 3), 2.0**-126)
    rows[0, 1], rows[0, 2] = 2.0**-149, -(2.0**-127 + 2.0**-140)
    codes, scales = encode(rows, encoding)
    assert codes.tolist() == [[1, 0, -1]]
    assert scales.unique().tolist() == [SMALLEST_SCALE]


@pytest.mark.parametrize("encoding", BLOCKS)
def test_the_largest_values_stay_finite(encoding):
    rows = torch.tensor([[FLOAT_MAX, -FLOAT_MAX, FLOAT_MAX / 2]])
    stored = encode(rows, encoding)
    decoded = decode(*stored, encoding, (3,))
    assert stored.codes[0, :2].tolist() == [127, -127]
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
    for encoding, touched in (("int8", slice(None)), ("int8:64", slice(64, 128))):
        codes, scales = encode(rows, encoding)
        assert codes[1, touched].unique().tolist() == [0]
        assert int(scales.isnan().sum()) == 1
        assert scales.view(torch.int32)[scales.isnan()].tolist() == [0x7FC00000]
        expected = torch.zeros(3, 130, dtype=torch.bool)
        expected[1, touched] = True
        assert torch.equal(decode(codes, scales, encoding, (130,)).isnan(), expected)


@pytest.mark.parametrize("encoding", BLOCKS)
@pytest.mark.parametrize("shape", [(), (1,), (3, 50)])
def test_rows_of_any_shape_and_none_at_all(encoding, shape):
    for n in (0, 1, 4):
        rows = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        codes, scales = encode(rows, encoding)
        decoded = decode(codes, scales, encoding, shape)
        assert codes.shape == decoded.shape == rows.shape
        flat = encode(rows.reshape(n, -1), encoding) if n else (codes, scales)
        assert torch.equal(flat[0].view(codes.shape), codes)
        for i in range(n):
            assert torch.equal(decode(codes[i], scales[i], encoding, shape), decoded[i])


@pytest.mark.parametrize("encoding", BLOCKS)
def test_given_memory_is_filled(encoding):
    rows = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = encode(rows, encoding)
    into = Encoded(*(torch.full_like(part, 99) for part in expected))
    assert encode(rows.transpose(0, 1).contiguous().transpose(0, 1), encoding, into) is into
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(into, expected, strict=True))
