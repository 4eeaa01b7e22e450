"""One point's rows across all units of a dataset, read when they are indexed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from math import prod
from typing import Any

import numpy as np
import torch

from ...errors import broken_rule
from ..format.encodings import Encoded, decode
from ..format.layout import Column, Field, as_integers
from ..places.store import Range
from .unit_files import UnitFiles

Piece = tuple[UnitFiles, Iterator[Range]]
"""Ranges, and the dataset's files that they are ranges of."""


class GradientColumn:
    """The rows of one point: index it like a tensor along its first dimension and get a copy, a torch tensor.

    ``column[i]``, ``column[a:b:c]``, ``column[[3, 1]]``, ``column[int tensor]``, ``column[bool tensor of all rows]``.

    Raises:
        IndexError: for a row outside the dataset, or a mask of another length.
        TypeError: for any other index; index the tensor that you got instead.
    """

    def __init__(self, name: str, field: Field, files: UnitFiles) -> None:
        self.name = name
        self.dtype = field.dtype
        self._row_shape = field.row_shape
        self._files = files
        self._axis = files.axis(field)

    @property
    def fields(self) -> tuple[GradientColumn, ...]:
        """The columns that are read to have these rows: this one."""
        return (self,)

    def decoded(self, *stored: torch.Tensor) -> torch.Tensor:
        """Return the rows, of what was read of each of `fields`."""
        return stored[0]

    def __len__(self) -> int:
        return len(self._axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, *shape of a row)``."""
        return (len(self), *self._row_shape)

    @property
    def unit_bounds(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The rows of each unit that is there: where they start, and where they stop; int64 [units] each."""
        return self._axis.starts, self._axis.stops

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * prod(self._row_shape)

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

    def numpy(self, k: int) -> np.ndarray[Any, Any]:
        """Return the rows of ``ds.units[k]`` as a read-only array, [rows of the unit, *row shape].

        Nothing is copied where the files are mapped (FAISS takes such an array of float32 as it is); the mapping lives
        as long as the array. TypeError for bfloat16, which numpy doesn't have.
        """
        n_units = len(self._axis.stops)
        if not -n_units <= k < n_units:
            text = broken_rule("GradientColumn", "unit", f"be in {-n_units}..{n_units - 1}", k, "See ds.units.")
            raise IndexError(text)
        if self.dtype == torch.bfloat16:
            rows_of_unit = f"{self._axis.starts[k]}:{self._axis.stops[k]}"
            remedy = f"Convert a copy: ds[{self.name!r}][{rows_of_unit}].float().numpy()."
            raise TypeError(broken_rule("GradientColumn", "dtype", "be one that numpy has", "bfloat16", remedy))
        rows = self._files.view(k % n_units, self.name)
        return rows.view(rows.dtype.str.replace("i", "f")) if self.dtype.is_floating_point else rows

    def ranges(self, start: int, stop: int, memory: torch.Tensor) -> Iterator[Range]:
        """Yield what to read to fill ``memory`` with the rows from ``start`` to ``stop``."""
        return self._files.ranges(self.name, start, stop, as_integers(memory))

    def pieces(self, start: int, stop: int, memory: torch.Tensor) -> list[Piece]:
        """Return what to read to fill ``memory`` with the rows from ``start`` to ``stop``: see read_stretches."""
        return [(self._files, self.ranges(start, stop, memory))]

    def read(self, ranges: Iterable[Range]) -> None:
        """Read ranges, of whatever columns of the dataset, many at once."""
        self._files.read(ranges)

    def _stretch(self, start: int, stop: int) -> torch.Tensor:
        out = torch.empty((stop - start, *self._row_shape), dtype=self.dtype)
        self.read(self.ranges(start, stop, out))
        return out


class DecodedColumn(GradientColumn):
    """The rows of one encoded point, decoded when they are read: index it as a GradientColumn, and get float32."""

    def __init__(self, name: str, column: Column, files: UnitFiles) -> None:
        super().__init__(name, Field(column.dtype, column.row_shape, column.per), files)
        self._encoding = column.encoding or ""
        self._fields = tuple(GradientColumn(field, kind, files) for field, kind in column.fields(name).items())

    @property
    def fields(self) -> tuple[GradientColumn, ...]:
        """The columns that are read to have these rows: codes and scales."""
        return self._fields

    def decoded(self, *stored: torch.Tensor) -> torch.Tensor:
        """Return the rows, of their codes and scales."""
        codes, scales = stored
        return decode(codes, scales, self._encoding, self._row_shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the indexed rows, [*index shape, *row shape], float32."""
        return self.decoded(*(field[index] for field in self._fields))

    def numpy(self, k: int) -> np.ndarray[Any, Any]:
        """Return the rows of ``ds.units[k]`` as a read-only array, decoded: float32 [rows of the unit, *row shape]."""
        parts = (torch.from_numpy(field.numpy(k).copy()) for field in self._fields)
        rows: np.ndarray[Any, Any] = self.decoded(*parts).numpy()
        rows.setflags(write=False)
        return rows

    def ranges(self, start: int, stop: int, memory: torch.Tensor) -> Iterator[Range]:
        """TypeError: what lies in the files are codes and scales; see `fields`."""
        remedy = f"Index it, or read ds.raw({self.name!r})."
        raise TypeError(broken_rule("GradientColumn", "point", "be stored as it is", "an encoded one", remedy))


class RawColumn:
    """Codes and scales of one encoded point as they are stored: index it as ``ds[point]``, and get an Encoded."""

    def __init__(self, codes: Any, scales: Any) -> None:
        self.codes, self.scales = codes, scales

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Encoded:
        """Return the codes and the scales (float32) of the indexed rows."""
        return Encoded(self.codes[index], self.scales[index])


def column_of(point: str, column: Column, files: UnitFiles) -> GradientColumn:
    """Return the rows of a point, one for each example or token."""
    if column.encoding is None:
        return GradientColumn(point, Field(column.dtype, column.row_shape, column.per), files)
    return DecodedColumn(point, column, files)


def read_stretches(
    columns: Sequence[Any], bounds: Sequence[tuple[int, int]], into: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the rows of several stretches ``(start, stop)`` behind each other, all columns' read at once.

    ``columns`` are GradientColumns, or those of a view, whose rows may be of several datasets.

    ``into`` is memory of an earlier call, which may have more rows: what is returned is the beginning of it.
    """
    n, stored, pieces = sum(stop - start for start, stop in bounds), {}, list[Piece]()
    for column in chain.from_iterable(column.fields for column in columns):
        memory = (into or {}).get(column.name)
        if memory is None or len(memory) < n:
            memory = torch.empty((n, *column.shape[1:]), dtype=column.dtype)
        stored[column.name] = memory[:n]
        ends = accumulate(stop - start for start, stop in bounds)
        for (start, stop), end in zip(bounds, ends, strict=True):
            pieces += column.pieces(start, stop, memory[end - (stop - start) : end])
    by_files: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_files.setdefault(id(piece[0]), []).append(piece)
    for of_one in by_files.values():
        of_one[0][0].read(chain.from_iterable(ranges for _, ranges in of_one))
    return {column.name: column.decoded(*(stored[field.name] for field in column.fields)) for column in columns}


def row_numbers(index: Any, n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Turn an int, a list, or an int or bool tensor or array into row numbers 0..n-1, of the index's shape."""
    if isinstance(index, bool) or index is None or index is Ellipsis or isinstance(index, (tuple, str)):
        remedy = "Index the tensor that you got for more dimensions."
        raise TypeError(f"GradientColumn: index must be rows (int, slice, list, tensor), got {index!r}. {remedy}")
    mask = np.asarray(index.detach().cpu() if isinstance(index, torch.Tensor) else index)
    if mask.dtype == np.bool_:
        if mask.shape != (n,):
            raise IndexError(f"GradientColumn: mask must have shape [{n}], got {list(mask.shape)}. Give one per row.")
        return np.flatnonzero(mask)
    rows = integers("GradientColumn", "index", mask)
    if rows.size == 0:
        return rows
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < -n or highest >= n:
        row = lowest if lowest < -n else highest
        raise IndexError(f"GradientColumn: row must be in {-n}..{n - 1}, got {row}. See len(ds).")
    return rows if lowest >= 0 else np.where(rows < 0, rows + n, rows)


def integers(who: str, argument: str, values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Turn an int, a list, or an int tensor or array into an int64 array of its shape; TypeError for another dtype."""
    array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if array.size and array.dtype.kind != "i":
        raise TypeError(broken_rule(who, argument, "hold ints", str(array.dtype), "Convert it first."))
    return array.astype(np.int64)
