"""The row table of a unit: one Parquet row per example, beside the gradients."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .errors import dataset_error, extra
from .plan import Example, Unit
from .store import Store

NORM = "norm:"  # a point's float32 L2 norms stand in the column "norm:<point>"
_READER = "GradientDataset"


def row_schema(points: Iterable[str]) -> Any:
    """Return the pyarrow schema of a row table."""
    pa = extra("pyarrow", "tlfast.dataset")
    fields = [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("flags", pa.int32(), nullable=False),
    ]
    return pa.schema(fields + [pa.field(NORM + point, pa.float32(), nullable=False) for point in points])


def encode_rows(examples: Sequence[Example], flags: Sequence[int], norms: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Return the Parquet file of a unit's examples; DatasetError where a value does not fit its type."""
    pa, parquet = extra("pyarrow", "DatasetWriter"), extra("pyarrow.parquet", "DatasetWriter")
    schema = row_schema(norms)
    try:
        values = [
            pa.array([example.id for example in examples], pa.int64()),
            pa.array([example.input_ids for example in examples], schema.field("input_ids").type),
            pa.array([example.source for example in examples], pa.string()),
            pa.array([example.start for example in examples], pa.int64()),
            pa.array([example.length for example in examples], pa.int32()),
            pa.array(list(flags), pa.int32()),
            *(pa.array(norm, pa.float32()) for norm in norms.values()),
        ]
        table = pa.table(values, schema=schema)
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        rule = "hold ints below 2**31 as input_ids, length and flags, text as source"
        raise dataset_error("DatasetWriter", "examples", rule, str(error)[:200], "Check the examples.") from error
    return bytes(sink.getvalue())


def decode_rows(store: Store, unit: Unit, points: Sequence[str]) -> Any:
    """Read a unit's row table (a pyarrow Table); DatasetError unless it holds exactly the unit's examples."""
    pa, parquet = extra("pyarrow", _READER), extra("pyarrow.parquet", _READER)
    path = f"rows/{unit.name}.parquet"
    file = store.open(path, _READER)
    schema = row_schema(points)
    try:
        data = file.read(0, file.size)
        stored = parquet.ParquetFile(pa.BufferReader(data))
        found = stored.schema_arrow
        if stored.metadata.num_rows != len(unit) or found.names != schema.names or found.types != schema.types:
            raise ValueError(f"{stored.metadata.num_rows} rows of {found.to_string()[:300]}")
        table = stored.read(use_threads=False)
        table.validate(full=True)
        if table.column("id").to_pylist() != list(range(unit.start, unit.stop)) or any(
            column.null_count for column in table.columns
        ):
            raise ValueError("other examples, or nulls")
    except Exception as error:  # whatever a damaged Parquet file makes of pyarrow
        rule = f"hold examples {unit.start}..{unit.stop - 1} and the norms of {len(points)} points"
        raise dataset_error(_READER, store.where(path), rule, str(error)[:300], "Run `tlfast verify`.") from error
    return table


class ExampleTable(Sequence[dict[str, Any]]):
    """The examples of a dataset, read unit by unit when asked: ``ds.examples[i]`` is a dict."""

    KEPT = 4  # row tables held in memory

    def __init__(self, store: Store, units: Sequence[Unit], points: Sequence[str]) -> None:
        self._store = store
        self._units = units
        self._points = list(points)
        self._stops = np.cumsum([len(unit) for unit in units], dtype=np.int64)
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: Any) -> Any:
        """Return an example as a dict (id, input_ids, source, start, length, flags, norms); for a slice a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index.__index__())
        row = i + len(self) if i < 0 else i
        if not 0 <= row < len(self):
            raise IndexError(f"GradientDataset: example must be in 0..{len(self) - 1}, got {i}. See len(ds).")
        k = int(np.searchsorted(self._stops, row, side="right"))
        local = row - (int(self._stops[k - 1]) if k else 0)
        flat: dict[str, Any] = self.table(k).slice(local, 1).to_pylist()[0]
        norms = {point: flat.pop(NORM + point) for point in self._points}
        return flat | {"norms": norms}

    def norms(self, point: str) -> torch.Tensor:
        """Return the float32 L2 norm of every row of ``point``: shape [rows]."""
        parts = [self.table(k).column(NORM + point).to_numpy() for k in range(len(self._units))]
        return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts]))

    def table(self, k: int) -> Any:
        """Return the row table of committed unit number ``k`` as a pyarrow Table."""
        with self._lock:
            if k not in self._tables:
                unit = self._units[k]
                self._tables[k] = decode_rows(self._store, unit, self._points)
                while len(self._tables) > self.KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(k)
            return self._tables[k]
