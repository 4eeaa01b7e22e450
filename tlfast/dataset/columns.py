"""One point's rows across all units of a dataset, memory-mapped when they are indexed."""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .commits import Commit, data_path
from .durable import open_regular
from .errors import dataset_error
from .layout import Column, UnitLayout, as_integers, unit_layout

_WHO = "GradientDataset"


def check_header(fd: int, path: Path, layout: UnitLayout) -> None:
    """Check that an open unit file begins with the header that its plan gives it.

    The plan fixes every byte of the header, so nothing in it has to be parsed, and no length, offset, dtype or shape
    that a file claims is ever believed.
    """
    found = os.pread(fd, len(layout.header), 0)
    if found != layout.header:
        at = next((k for k, (a, b) in enumerate(zip(found, layout.header, strict=False)) if a != b), len(found))
        rule = "begin with the header of its plan"
        remedy = "Remove its commit and resume to make the unit again."
        raise dataset_error(_WHO, str(path), rule, f"another byte at {at}", remedy)


class UnitMaps:
    """The mapped unit files of a dataset; the last ``KEPT`` used stay mapped."""

    KEPT = 64  # each holds a file descriptor; a process has 1024 by default

    def __init__(self, folder: Path, commits: Sequence[Commit], columns: dict[str, Column]) -> None:
        self._folder = folder
        self._commits = commits
        self._columns = columns
        self._maps: OrderedDict[int, tuple[mmap.mmap, UnitLayout]] = OrderedDict()
        self._lock = threading.Lock()
        self.stops = np.cumsum([len(commit.unit) for commit in commits], dtype=np.int64)

    def rows(self, k: int, name: str) -> np.ndarray[Any, Any]:
        """Return the rows of column ``name`` in committed unit ``k``: a read-only view of the file, as integers."""
        with self._lock:
            if k not in self._maps:
                self._maps[k] = self._open(k)
                while len(self._maps) > self.KEPT:
                    self._maps.popitem(last=False)  # unmapped when the last view of it is gone
            self._maps.move_to_end(k)
            mapped, layout = self._maps[k]
        block = layout.blocks[name]
        shape = (len(self._commits[k].unit), *block.column.row_shape)
        size = block.column.dtype.itemsize
        count = (block.stop - block.start) // size
        return np.frombuffer(mapped, np.dtype(f"<i{size}"), count, block.start if count else 0).reshape(shape)

    def _open(self, k: int) -> tuple[mmap.mmap, UnitLayout]:
        commit = self._commits[k]
        path = self._folder / data_path(commit.unit)
        layout = unit_layout(self._columns, commit.unit)
        fd, size = open_regular(path, _WHO)
        try:
            if size != layout.n_bytes:  # a shorter file would end the process by SIGBUS
                remedy = "Remove its commit and resume to make the unit again."
                raise dataset_error(_WHO, str(path), f"have {layout.n_bytes} bytes", size, remedy)
            check_header(fd, path, layout)
            return mmap.mmap(fd, size, access=mmap.ACCESS_READ), layout
        finally:
            os.close(fd)


class GradientColumn:
    """The rows of one point: index it like a tensor along its first dimension and get a copy, a torch tensor.

    ``column[i]``, ``column[a:b:c]``, ``column[[3, 1]]``, ``column[int tensor]``, ``column[bool tensor of all rows]``.

    Raises:
        IndexError: for a row outside the dataset, or a mask of another length.
        TypeError: for any other index; index the tensor that you got instead.
    """

    def __init__(self, name: str, column: Column, maps: UnitMaps) -> None:
        self.name = name
        self.dtype = column.dtype
        self._row_shape = column.row_shape
        self._maps = maps

    def __len__(self) -> int:
        return int(self._maps.stops[-1]) if len(self._maps.stops) else 0

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
            return self._slice(range(start, max(start, stop), step))
        rows = row_numbers(index, len(self))
        out = torch.empty((rows.size, *self._row_shape), dtype=self.dtype)
        target = as_integers(out)
        flat = rows.reshape(-1)
        unit_of = np.searchsorted(self._maps.stops, flat, side="right")
        order = np.argsort(unit_of, kind="stable")
        units, firsts = np.unique(unit_of[order], return_index=True)
        for k, where in zip(units.tolist(), np.split(order, firsts[1:]), strict=False):
            target[where] = self._maps.rows(k, self.name)[flat[where] - self._start(k)]
        return out.reshape((*rows.shape, *self._row_shape))

    def _start(self, k: int) -> int:
        return int(self._maps.stops[k - 1]) if k else 0

    def _slice(self, rows: range) -> torch.Tensor:
        out = torch.empty((len(rows), *self._row_shape), dtype=self.dtype)
        target = as_integers(out)
        done = 0
        while done < len(rows):
            k = int(np.searchsorted(self._maps.stops, rows[done], side="right"))
            start = self._start(k)
            part = self._maps.rows(k, self.name)[rows[done] - start :: rows.step][: len(rows) - done]
            target[done : done + len(part)] = part
            done += len(part)
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
    outside = (rows < -n) | (rows >= n)
    if outside.any():
        row = rows[outside].flat[0]
        raise IndexError(f"GradientColumn: row must be in {-n}..{n - 1}, got {row}. See len(ds).")
    return np.where(rows < 0, rows + n, rows)
