"""Rows that are hard to encode, and the check that native code makes of them what torch does, to the bit."""

import numpy as np
import torch

from tlfast.dataset import Column
from tlfast.dataset.format.encodings import ENCODED_DTYPES, NEAREST, STOCHASTIC, encode
from tlfast.dataset.format.norms import decoded_norms
from tlfast.dataset.format.rounding import Rounding

WIDTHS = [1, 2, 31, 63, 64, 65, 127, 200]
SMALL = 2.0**-126


def codes_and_ties():
    """What is a code of some encoding in scales of 2**-126, or lies between two, exactly or almost; none is larger."""
    of_float8 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    of_int = torch.arange(128, dtype=torch.float64)
    parts = []
    for codes in (of_float8, of_int, of_int[:8]):
        between = (codes[1:] + codes[:-1]) / 2
        near = torch.cat([between, between - 2.0**-20, between + 2.0**-20, codes])
        parts += [near, -near]
    return [part * SMALL for part in parts]


def hard_rows(dtype, width):
    """Rows [n, width] of a dtype: random, tiny and huge ones, ties, zeros, and blocks that are not finite."""
    generator = torch.Generator().manual_seed(width)
    limits = torch.finfo(dtype)
    scales = torch.tensor([1.0, limits.smallest_normal, limits.smallest_normal / 100, limits.max / 4])
    drawn = torch.randn(24, width, generator=generator, dtype=torch.float64) * scales.repeat(6)[:, None]
    ties = [
        values.repeat(width)[: len(values) // width * width or width].view(-1, width) for values in codes_and_ties()
    ]
    fills = torch.tensor([0.0, -0.0, limits.smallest_normal / 4, limits.max, -limits.max], dtype=torch.float64)
    rows = torch.cat([drawn, *ties, fills[:, None].expand(-1, width)]).to(dtype)
    bad = torch.randn(8, width, generator=generator).to(dtype)
    for row, value in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf)):
        bad[row, width // 2] = value
        bad[row + 4, [0, -1]] = torch.tensor([value, 0.0], dtype=dtype)
    return torch.cat([rows, bad])


def every_row(dtype):
    """All values that 16 bits can have, in rows of as many as share a scale: small ones are not beside large ones."""
    return torch.arange(2**16).to(torch.int16).view(dtype).view(-1, 64)


def same_codes(rows, encoding, native):
    """Whether native code makes the same codes, scales and norms of rows; ``rows`` are [n, width]."""
    rounding = None
    if encoding in STOCHASTIC:
        numbers = torch.arange(len(rows)) * 123_456_789_123
        rounding = Rounding("h", numbers, torch.arange(len(rows)) % 5)
    ours = encode(rows, encoding, native=native, rounding=rounding)
    theirs = encode(rows, encoding, rounding=rounding)
    column, third = Column(torch.float32, (rows.shape[1],), encoding=encoding), len(rows) // 3
    lengths = [third, 0, 1, len(rows) - third - 1]
    return (
        torch.equal(ours.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
        and torch.equal(ours.scales.view(torch.int32), theirs.scales.view(torch.int32))
        and all(
            decoded_norms(ours, column, of, native).tobytes() == decoded_norms(ours, column, of).tobytes()
            for of in (None, lengths)
        )
    )


def check_codes(native, encodings=NEAREST, dtypes=ENCODED_DTYPES, widths=tuple(WIDTHS)):
    """Fail unless native code and torch agree on all hard rows."""
    for encoding in encodings:
        for dtype in dtypes:
            for width in widths:
                assert same_codes(hard_rows(dtype, width), encoding, native), (encoding, dtype, width)
            assert dtype == torch.float32 or same_codes(every_row(dtype), encoding, native), (encoding, dtype)


def wrong(native):
    """A native module whose scales are one bit off."""

    class Wrong:
        decoded_norms = native.decoded_norms

        @staticmethod
        def encode_rows(rows, row_dtype, per_code, coded, random):
            native.encode_rows(rows, row_dtype, float(np.nextafter(np.float32(per_code), np.float32(1))), coded, random)

    return Wrong
