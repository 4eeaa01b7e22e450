"""The L2 norms of rows, in one order of addition that the native code shares to the bit (csrc/row_norms.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

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
