"""The fields of examples as arrays to compare and as entries of batches: length, source, norms, what was kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..errors import extra
from ..format.row_table import NORM

Array = np.ndarray[Any, Any]
NORMS = "norms"  # in a list of names: those of all the points that are read


def columns_of(fields: Iterable[str], points: Sequence[str]) -> list[str]:
    """Return which columns of the row tables these fields are; "norms" are those of ``points``."""
    found = [[NORM + point for point in points] if name == NORMS else [name] for name in fields]
    return list(dict.fromkeys(chain.from_iterable(found)))


def as_array(column: Any) -> Array:
    """Return a column of a row table as an array: numbers as they are, whatever else as objects."""
    types = extra("pyarrow", "GradientDataset").types
    plain = types.is_primitive(column.type) and not column.null_count
    if plain and not types.is_temporal(column.type):
        found: Array = column.to_numpy()
        return found
    objects = np.empty(len(column), object)
    for k, value in enumerate(column.to_pylist()):
        objects[k] = value
    return objects


def as_entry(column: Any) -> Any:
    """Return a column of a row table as an entry of a batch: a tensor of numbers, or a list.

    Lists of numbers (``input_ids``) become a list of tensors, which differ in length.
    """
    array = as_array(column)
    if array.dtype != object:
        return torch.from_numpy(array.copy())  # Arrow's memory can't be written
    return [torch.tensor(value) if _is_numbers(value) else value for value in array.tolist()]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, (bool, int, float)) for part in value)


def entries(examples: Any, rows: Array, names: Sequence[str]) -> dict[str, Any]:
    """Return columns of the row tables of these rows as entries of a batch."""
    if not names:
        return {}
    table = examples.arrow(rows, names)
    return {name: as_entry(table.column(name)) for name in names}


def blocks(examples: Any, names: Sequence[str] | None, size: int) -> Iterator[tuple[int, Any]]:
    """Yield the row tables, or some columns of them, in blocks of ``size`` rows: the first row, and the table."""
    n = len(examples)
    for start in range(0, n, size):
        yield start, examples.arrow(np.arange(start, min(n, start + size)), names)


def arrays(table: Any) -> Mapping[str, Array]:
    """Return the columns of a table as arrays."""
    return {name: as_array(table.column(name)) for name in table.column_names}
