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
    values = rows.to(torch.float64).numpy()
    with np.errstate(all="ignore"):
        if n_values % LANES:
            squares = np.zeros((n_rows, -(-n_values // LANES) * LANES))  # zeros change no sum
            np.multiply(values, values, out=squares[:, :n_values])
        else:
            squares = values * values
        # Not along the axis that is contiguous in memory, where numpy would add in pairs: one after the other.
        lanes = np.add.reduce(squares.reshape(n_rows, -1, LANES), axis=1)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        sums = lanes[:, 0]
        odd = ~np.isfinite(sums)
        odd[odd] = ~np.isfinite(values[odd]).all(axis=1)  # the square of a float64 can still overflow
        norms = np.sqrt(sums).astype(np.float32)
    norms[np.isnan(norms)] = np.nan  # one NaN, whatever the CPU made of it
    return norms, odd
