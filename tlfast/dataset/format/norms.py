"""The L2 norms of rows, in one order of addition that the native code shares to the bit (csrc/row_norms.h)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .encodings import Encoded, decode, native_codes
from .layout import Column

_DECODED_BYTES = 256 << 10  # decoded at a time, and so never more than a cache holds

LANES = 32  # value i of a row is added to lane i % LANES: part of the format, see docs/format.md


def row_norms(rows: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the norms of rows [rows, values], float32 [rows], and which rows hold a NaN or an infinity, bool [rows].

    In float64, where the squares of float32 can neither overflow nor vanish.
    """
    n_rows, n_values = rows.shape
    n_whole, rest = divmod(n_values, LANES)
    # Values that are added to the same lane lie one above the other: numpy then adds whole vectors, in this order.
    squares = torch.empty(n_whole + (rest > 0), n_rows, LANES, dtype=torch.float64)
    squares[:n_whole].copy_(rows[:, : n_values - rest].reshape(n_rows, n_whole, LANES).transpose(0, 1))
    if rest:
        squares[n_whole] = 0.0  # changes no sum
        squares[n_whole, :, :rest].copy_(rows[:, n_values - rest :])
    with np.errstate(all="ignore"):
        squares.mul_(squares)
        lanes = np.add.reduce(squares.numpy(), axis=0)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        sums = lanes[:, 0]
        odd = ~np.isfinite(sums)
        if odd.any():  # the square of a float64 can still overflow
            odd[odd] = (~rows[torch.from_numpy(odd)].isfinite()).any(1).numpy()
        norms = np.sqrt(sums).astype(np.float32)
    norms[np.isnan(norms)] = np.nan  # one NaN, whatever the CPU made of it
    return norms, odd


def decoded_norms(
    stored: Encoded, column: Column, lengths: Sequence[int] | None, native: ModuleType | None = None
) -> np.ndarray[Any, Any]:
    """Return the norm of each example at an encoded column, float32: that of its decoded row, or of its tokens' rows.

    Args:
        stored: codes and scales of all rows, on the CPU.
        column: what they are of.
        lengths: of a column per token, how many rows each example has; None: one.
        native: tlfast._disk, which finds the same bits; None: Python does.
    """
    encoding, shape = column.encoding or "", column.row_shape
    n = len(stored.codes) if lengths is None else len(lengths)
    norms = np.zeros(n, np.float32)
    if native is not None:
        stored = Encoded(*(part.contiguous() for part in stored))
        of_each = [1] * n if lengths is None else list(lengths)
        native.decoded_norms(native_codes(stored, encoding, shape), of_each, norms.ctypes.data)
    elif lengths is None:
        step = max(1, _DECODED_BYTES // (4 * prod(shape)))
        for part in (slice(start, start + step) for start in range(0, n, step)):
            rows = decode(stored.codes[part], stored.scales[part], encoding, shape)
            norms[part] = row_norms(rows.reshape(len(rows), -1))[0]
    else:
        parts = (tensor.split(list(lengths)) for tensor in stored)
        for i, (codes, scales) in enumerate(zip(*parts, strict=True)):
            if len(codes):
                norms[i] = row_norms(decode(codes, scales, encoding, shape).reshape(1, -1))[0][0]
    return norms
