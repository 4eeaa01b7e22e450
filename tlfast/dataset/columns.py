"""One point's rows across all units of a dataset, read when they are indexed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .layout import Column, as_integers
from .unit_files import UnitFiles


class GradientColumn:
    """The rows of one point: index it like a tensor along its first dimension and get a copy, a torch tensor.

    ``column[i]``, ``column[a:b:c]``, ``column[[3, 1]]``, ``column[int tensor]``, ``column[bool tensor of all rows]``.

    Raises:
        IndexError: for a row outside the dataset, or a mask of another length.
        TypeError: for any other index; index the tensor that you got instead.
    """

    def __init__(self, name: str, column: Column, files: UnitFiles) -> None:
        self.name = name
        self.dtype = column.dtype
        self._row_shape = column.row_shape
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, *shape of a row)``."""
        return (len(self), *self._row_shape)

    def __repr__(self) -> str:
        return f"GradientColumn({self.name!r}, {str(self.dtype).removeprefix('torch.')}, {list(self.shape)})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the indexed rows, [*index shape, *row shape], in the stored dtype."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step < 0:
                raise ValueError("GradientColumn: slice step must be positive, got a negative one. Flip the tensor.")
            if step == 1:
                return self._stretch(start, max(start, stop))
            index = np.arange(start, stop, step)
        rows = row_numbers(index, len(self))
        if rows.ndim == 0:
            return self._stretch(int(rows), int(rows) + 1)[0]
        out = torch.from_numpy(self._files.gather(self.name, rows.reshape(-1)))
        return out.view(self.dtype).reshape((*rows.shape, *self._row_shape))

    def _stretch(self, start: int, stop: int) -> torch.Tensor:
        out = torch.empty((stop - start, *self._row_shape), dtype=self.dtype)
        self._files.read(self._files.ranges(self.name, start, stop, as_integers(out)))
        return out


def row_numbers(index: Any, n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Turn an int, a list, or an int or bool tensor or array into row numbers 0..n-1, of the index's shape."""
    if isinstance(index, bool) or index is None or index is Ellipsis or isinstance(index, (tuple, str)):
        remedy = "Index the tensor that you got for more dimensions."
        raise TypeError(f"GradientColumn: index must be rows (int, slice, list, tensor), got {index!r}. {remedy}")
    rows = np.asarray(index.detach().cpu() if isinstance(index, torch.Tensor) else index)
    if rows.dtype == np.bool_:
        if rows.shape != (n,):
            raise IndexError(f"GradientColumn: mask must have shape [{n}], got {list(rows.shape)}. Give one per row.")
        return np.flatnonzero(rows)
    if rows.size == 0:
        return np.zeros(rows.shape, dtype=np.int64)
    if rows.dtype.kind != "i":
        raise TypeError(f"GradientColumn: index must hold ints or bools, got {rows.dtype}. Convert it first.")
    rows = rows.astype(np.int64)
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < -n or highest >= n:
        row = lowest if lowest < -n else highest
        raise IndexError(f"GradientColumn: row must be in {-n}..{n - 1}, got {row}. See len(ds).")
    return rows if lowest >= 0 else np.where(rows < 0, rows + n, rows)
