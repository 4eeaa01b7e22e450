"""The rows of a dataset, part by part, as other programs take them: numpy arrays beside an Arrow table of examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from ..errors import dataset_error, extra
from ..format.layout import DTYPE_NAMES, WEIGHT, Column
from ..format.row_table import row_schema

PART_BYTES = 32 << 20  # of gradients in memory at a time: large enough for the disk, far below a unit
GRADIENTS = "grad:"  # a point's rows stand in the column "grad:<point>", beside "norm:<point>"


def _others(dataset: Any) -> str:
    names = [repr(name) for name in dataset.points if dataset.column(name).per == "example"]
    return f" These have one: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}." if names else ""


@dataclass(frozen=True)
class Part:
    """Some consecutive rows: their examples as an Arrow table, their gradients as arrays [rows, *row_shape]."""

    examples: Any
    arrays: dict[str, np.ndarray[Any, Any]]


class Rows:
    """The rows of ``points``, to be written in another format. bfloat16 becomes float32, which holds it exactly.

    Args:
        dataset: a dataset or a view.
        points: which points; DatasetError for what other formats can't hold, an empty row shape and rows per token.
        progress: called with the number of rows just written.
        who: who speaks in an error.
        verify: whether rows are compared with their checksums first.
        tokens: points of weights may have rows per token, if all of them do.

    Attributes:
        per_token: whether the points have rows per token; there are no `parts` of these.
    """

    def __init__(
        self,
        dataset: Any,
        points: Sequence[str],
        progress: Callable[[int], None] | None = None,
        *,
        who: str,
        verify: bool = True,
        tokens: bool = False,
    ) -> None:
        self.dataset = dataset
        self._who, self._verify = who, verify
        self.columns: dict[str, Column] = {}
        self.per_token = tokens and {dataset.column(point)[2:4] for point in points} == {(WEIGHT, "token")}
        for point in points:
            dtype, row_shape, _, per, _ = dataset.column(point)
            if per != "example" and not self.per_token:
                remedy = f"Leave it out, and read ds[{point!r}].{_others(dataset)}"
                raise dataset_error(who, f"point {point!r}", "have a row for each example", "one per token", remedy)
            if not prod(row_shape):
                rule = "have a value in each row"
                raise dataset_error(who, f"point {point!r}", rule, f"shape {list(row_shape)}", "Leave it out.")
            self.columns[point] = Column(torch.float32 if dtype == torch.bfloat16 else dtype, row_shape)
        self._progress = progress

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def row_bytes(self) -> int:
        """Bytes of the gradients of one row, as they are exported."""
        return sum(column.row_bytes for column in self.columns.values())

    def parts(self) -> Iterator[Part]:
        """Yield all rows in order; a part has at most PART_BYTES, or one row."""
        most = max(1, PART_BYTES // max(1, self.row_bytes))
        for first, end in zip(*(bounds.tolist() for bounds in self.dataset.unit_bounds), strict=True):
            if self._verify:  # a copy has no checksums, so what goes into it must be right
                self.dataset.verify_rows(first, end)
            for start in range(first, end, most):
                stop = min(start + most, end)
                arrays = {
                    point: self.dataset[point][start:stop].to(column.dtype).numpy()
                    for point, column in self.columns.items()
                }
                yield Part(self.dataset.examples.arrow(np.arange(start, stop)), arrays)
                self.written(stop - start)

    def written(self, n_rows: int) -> None:
        """Tell who wants to know that so many rows more were written."""
        if self._progress is not None:
            self._progress(n_rows)

    def provenance(self) -> dict[str, Any]:
        """What the file says of itself: how the data were made, and each point as it was stored."""
        info = self.dataset.info()
        return {
            "format": "tlfast export",
            "rows": len(self),
            "planned_rows": info["planned_rows"],
            "header": info["header"],
            "config_hash": info["config_hash"],
            "points": {point: info["points"][point] for point in self.columns},
            "holds": {point: info["holds"][point] for point in self.columns},
            "bfloat16": "exported as float32, exactly",
        }

    def schema(self, gradients: bool = True) -> Any:
        """Return the Arrow schema: the columns of the row table, then ``grad:<point>``, flat lists of fixed size."""
        pa = extra("pyarrow", self._who)
        standard, there = row_schema(self.dataset.points), self.dataset.examples.arrow(np.empty(0, np.int64)).schema
        schema = pa.schema([standard.field(f.name) if f.name in standard.names else f for f in there])
        for point, column in self.columns.items() if gradients else ():
            said = {"point": point, "shape": json.dumps(column.row_shape), "stored": self._stored(point)}
            said["holds"] = self.dataset.holds(point)
            schema = schema.append(
                pa.field(GRADIENTS + point, _list_type(column, self._who), nullable=False, metadata=said)
            )
        return schema.with_metadata({"tlfast": json.dumps(self.provenance())})

    def batches(self, schema: Any) -> Iterator[Any]:
        """Yield the parts as Arrow record batches of ``schema``."""
        pa = extra("pyarrow", self._who)
        for part in self.parts():
            columns = [column.combine_chunks() for column in part.examples.columns]
            columns += [_lists(part.arrays[point], column, self._who) for point, column in self.columns.items()]
            yield pa.record_batch(columns[: len(schema)], schema=schema)

    def _stored(self, point: str) -> str:
        column: Column = self.dataset.column(point)
        return DTYPE_NAMES[column.dtype] + column.notes


def _list_type(column: Column, who: str) -> Any:
    pa = extra("pyarrow", who)
    value = pa.from_numpy_dtype(torch.empty(0, dtype=column.dtype).numpy().dtype)
    if not column.row_shape:
        return value
    return pa.list_(pa.field("item", value, nullable=False), prod(column.row_shape))


def _lists(array: np.ndarray[Any, Any], column: Column, who: str) -> Any:
    pa = extra("pyarrow", who)
    values = pa.array(array.reshape(-1))
    return values if not column.row_shape else pa.FixedSizeListArray.from_arrays(values, type=_list_type(column, who))
