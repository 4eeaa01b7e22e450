"""The rows of a dataset, part by part, as other programs take them: numpy arrays beside an Arrow table of examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch

from ..errors import dataset_error, extra
from ..format.layout import DTYPE_NAMES, WEIGHT, Column
from ..format.row_table import NORM, row_schema

PART_BYTES = 32 << 20  # of gradients in memory at a time: large enough for the disk, far below a unit
PART_ROWS = 1 << 16  # in memory at a time: of norms 32 MiB would be millions, and what is said beside each is larger
GRADIENTS = "grad:"  # a point's rows stand in the column "grad:<point>", beside "norm:<point>"
POSITION = "position"  # beside "id", which of an example's real tokens a row is, counted from 0

Array = np.ndarray[Any, Any]
Tokens = Literal["weights", "all"]


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + ", ..." * (len(names) > 5)


@dataclass(frozen=True)
class Part:
    """Some consecutive rows: of which examples, how many each has, and their gradients, [rows, *row_shape]."""

    examples: Array
    lengths: Array
    arrays: dict[str, Array]


class Rows:
    """The rows of ``points``, to be written in another format. bfloat16 becomes float32, which holds it exactly.

    Args:
        dataset: a dataset or a view.
        points: which points; DatasetError for what other formats can't hold, an empty row shape, rows per token where
            ``tokens`` doesn't take them, and rows per token beside those of examples.
        progress: called with the number of examples just written.
        who: who speaks in an error.
        verify: whether rows are compared with their checksums first.
        tokens: which points may have rows per token: those of weights, or all.

    Attributes:
        per_token: whether the points have rows per token.
    """

    def __init__(
        self,
        dataset: Any,
        points: Sequence[str],
        progress: Callable[[int], None] | None = None,
        *,
        who: str,
        verify: bool = True,
        tokens: Tokens = "all",
    ) -> None:
        self.dataset = dataset
        self._who, self._verify = who, verify
        self.columns: dict[str, Column] = {}
        self.per_token = self._are_tokens(points, tokens)
        for point in points:
            dtype, row_shape, *_ = dataset.column(point)
            if not prod(row_shape):
                rule = "have a value in each row"
                raise dataset_error(who, f"point {point!r}", rule, f"shape {list(row_shape)}", "Leave it out.")
            self.columns[point] = Column(torch.float32 if dtype == torch.bfloat16 else dtype, row_shape)
        self._progress = progress

    def _are_tokens(self, points: Sequence[str], tokens: Tokens) -> bool:
        """Whether the points have rows per token; DatasetError where they can't be written."""
        said = {point: self.dataset.column(point) for point in points}
        ragged = [point for point, column in said.items() if column.per == "token"]
        whole = [point for point in points if point not in ragged]
        refused = [point for point in ragged if tokens == "weights" and said[point].of != WEIGHT]
        if refused:
            have_one = [name for name in self.dataset.points if self.dataset.column(name).per == "example"]
            others = f" These have one: {_names(have_one)}." if have_one else ""
            rule, remedy = "have a row for each example", f"Leave it out, and read ds[{refused[0]!r}].{others}"
            raise dataset_error(self._who, f"point {refused[0]!r}", rule, "one per token", remedy)
        if ragged and whole:
            rule, got = "have rows of one kind", f"{_names(ragged)} per token and {_names(whole)} per example"
            raise dataset_error(self._who, "points", rule, got, "Name those of one kind, and then the others.")
        return bool(ragged)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def n_rows(self) -> int:
        """How many rows a point has: examples, or real tokens."""
        return int(self.dataset[next(iter(self.columns))].lengths().sum()) if self.per_token else len(self)

    def column(self, point: str) -> Any:
        """The rows of a point behind each other, to be indexed: one for each example, or for each real token."""
        found = self.dataset[point]
        return found.flat if self.per_token else found

    @property
    def row_bytes(self) -> int:
        """Bytes of the gradients of one row, as they are exported."""
        return sum(column.row_bytes for column in self.columns.values())

    def parts(self) -> Iterator[Part]:
        """Yield all rows in order; a part has at most PART_BYTES and PART_ROWS, or the rows of one example."""
        for examples, lengths in self.stretches(self.row_bytes):
            arrays = {point: self.values(point, examples) for point in self.columns}
            yield Part(examples, lengths, arrays)
            self.written(len(examples))

    def stretches(self, row_bytes: int) -> Iterator[tuple[Array, Array]]:
        """Yield some examples at a time, all in order, and how many rows each has: int64 [examples] each.

        They are compared with their checksums before. Their rows are PART_ROWS at most, and, of ``row_bytes`` each, fit
        into PART_BYTES.
        """
        most = max(1, min(PART_ROWS, PART_BYTES // max(1, row_bytes)))
        for first, end in zip(*(bounds.tolist() for bounds in self.dataset.unit_bounds), strict=True):
            if self._verify:  # a copy has no checksums, so what goes into it must be right
                self.dataset.verify_rows(first, end)
            start, lengths = first, self._lengths(first, end)
            ends = np.cumsum(lengths)
            while start < end:
                before = ends[start - first] - lengths[start - first]
                stop = max(start + 1, first + int(np.searchsorted(ends, before + most, side="right")))
                yield np.arange(start, stop), lengths[start - first : stop - first]
                start = stop

    def _lengths(self, first: int, end: int) -> Array:
        if not self.per_token:
            return np.ones(end - first, np.int64)
        table = self.dataset.examples.arrow(np.arange(first, end))
        lengths: Array = table.column("length").to_numpy().astype(np.int64)
        return lengths

    def values(self, point: str, examples: Array) -> Array:
        """The rows of some examples at a point, behind each other: [rows, *row_shape]."""
        found = self.dataset[point]
        rows = found.joined(examples)[0] if self.per_token else found[int(examples[0]) : int(examples[-1]) + 1]
        array: Array = rows.to(self.columns[point].dtype).numpy()
        return array

    def beside(self, part: Part) -> Iterator[tuple[slice, Any]]:
        """Yield some rows of a part at a time, and what is known of each one's example, as an Arrow table.

        Rows per token have their positions beside them, and a copy of what their example says: so few are yielded at a
        time that these copies have PART_BYTES at most, or are one.
        """
        table = self.dataset.examples.arrow(part.examples)
        if not self.per_token:
            yield slice(0, len(part.examples)), table
            return
        pa = extra("pyarrow", self._who)
        table = table.select(self._of_tokens(table.schema))
        owners = np.repeat(np.arange(len(part.examples)), part.lengths)
        positions = np.arange(len(owners)) - np.repeat(np.cumsum(part.lengths) - part.lengths, part.lengths)
        before = np.cumsum(self._bytes_beside(table)[owners])
        start = 0
        while start < len(owners) or start == 0:
            done = before[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(before, done + PART_BYTES, side="right")))
            rows = slice(start, min(stop, len(owners)))
            here = pa.array(positions[rows].astype(np.int32))
            yield rows, table.take(owners[rows]).add_column(1, POSITION, here)
            start = stop

    def _bytes_beside(self, table: Any) -> Array:
        """How many bytes each row of a table of numbers and texts has: int64 [rows]."""
        pa, compute = extra("pyarrow", self._who), extra("pyarrow.compute", self._who)
        found: Array = np.full(len(table), 4, np.int64)  # of the position
        for column in table.columns:
            if pa.types.is_string(column.type):
                sizes = compute.fill_null(compute.binary_length(column), 0)
                found += 4 + sizes.to_numpy().astype(np.int64)
            else:
                found += 8
        return found

    def _of_tokens(self, schema: Any) -> list[str]:
        """Columns of a row table that go beside each token: not lists, which belong to the example, nor its norms."""
        types = extra("pyarrow", self._who).types
        return [f.name for f in schema if not types.is_list(f.type) and not f.name.startswith(NORM)]

    def written(self, n_examples: int) -> None:
        """Tell who wants to know that the rows of so many examples more were written."""
        if self._progress is not None:
            self._progress(n_examples)

    def provenance(self) -> dict[str, Any]:
        """What the file says of itself: how the data were made, and each point as it was stored."""
        info = self.dataset.info()
        return {
            "format": "tlfast export",
            "rows": self.n_rows if self.columns else len(self),
            "planned_rows": info["planned_rows"],
            "header": info["header"],
            "config_hash": info["config_hash"],
            "points": {point: info["points"][point] for point in self.columns},
            "holds": {point: info["holds"][point] for point in self.columns},
            "bfloat16": "exported as float32, exactly",
        }

    def schema(self, gradients: bool = True) -> Any:
        """Return the Arrow schema: what is said beside each row, then ``grad:<point>``, flat lists of fixed size."""
        pa = extra("pyarrow", self._who)
        standard, there = row_schema(self.dataset.points), self.dataset.examples.arrow(np.empty(0, np.int64)).schema
        schema = pa.schema([standard.field(f.name) if f.name in standard.names else f for f in there])
        if self.per_token:
            kept = [schema.field(name) for name in self._of_tokens(schema)]
            if POSITION in schema.names:
                rule, remedy = "have another name beside points per token", "Export to npy, which has no fields."
                raise dataset_error(self._who, "a field of the examples", rule, repr(POSITION), remedy)
            schema = pa.schema([kept[0], pa.field(POSITION, pa.int32(), nullable=False), *kept[1:]])
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
            for rows, table in self.beside(part):
                columns = [column.combine_chunks() for column in table.columns]
                columns += [
                    _lists(part.arrays[point][rows], column, self._who) for point, column in self.columns.items()
                ]
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
