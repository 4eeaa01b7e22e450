"""The row table of a unit: one Parquet row per example, beside the gradients."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ...markup import shortened
from ...markup import table as html_table
from ..errors import dataset_error, extra
from ..places.store import Store
from .commits import Commit
from .kept_fields import arrow_type
from .plan import Example, Unit
from .row_limits import check_unpacked, unpack

NORM = "norm:"  # a point's float32 L2 norms stand in the column "norm:<point>"
_READER = "GradientDataset"
_SHOWN_TEXT, _SHOWN_NORMS = 120, 12  # characters of a value, and norms, that a notebook shows


def row_schema(points: Iterable[str], kept: Mapping[str, str] | None = None) -> Any:
    """Return the pyarrow schema of a row table; ``kept`` are the types of the fields that it keeps, by name."""
    pa = extra("pyarrow", "tlfast.dataset")
    fields = [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("flags", pa.int32(), nullable=False),
    ]
    fields += [pa.field(NORM + point, pa.float32(), nullable=False) for point in points]
    kinds = (kept or {}).items()
    return pa.schema(fields + [pa.field(name, arrow_type(kind), nullable=False) for name, kind in kinds])


def encode_rows(
    examples: Sequence[Example],
    flags: Sequence[int],
    norms: Mapping[str, np.ndarray[Any, Any]],
    kept: Mapping[str, str] | None = None,
) -> bytes:
    """Return the Parquet file of a unit's examples; DatasetError where a value does not fit its type."""
    pa, parquet = extra("pyarrow", "DatasetWriter"), extra("pyarrow.parquet", "DatasetWriter")
    schema = row_schema(norms, kept)
    kept_values = _kept_values(examples, kept or {}, schema)
    try:
        values = [
            pa.array([example.id for example in examples], pa.int64()),
            pa.array([example.input_ids for example in examples], schema.field("input_ids").type),
            pa.array([example.source for example in examples], pa.string()),
            pa.array([example.start for example in examples], pa.int64()),
            pa.array([example.length for example in examples], pa.int32()),
            pa.array(list(flags), pa.int32()),
            *(pa.array(norm, pa.float32()) for norm in norms.values()),
            *kept_values,
        ]
        table = pa.table(values, schema=schema)
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
        check_unpacked(2 * table.nbytes, sink.tell())  # what couldn't be read again is not written
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        rule = "hold ints below 2**31 as input_ids, length and flags, text as source"
        raise dataset_error("DatasetWriter", "examples", rule, str(error)[:200], "Check the examples.") from error
    return bytes(sink.getvalue())


def _kept_values(examples: Sequence[Example], kept: Mapping[str, str], schema: Any) -> list[Any]:
    """The column of each kept field; DatasetError where an example lacks it, or has a value of another type."""
    pa = extra("pyarrow", "DatasetWriter")

    def column(name: str, kind: str) -> Any:
        values = [getattr(example, "kept", {}).get(name) for example in examples]
        try:
            if any(value is None for value in values):
                raise ValueError("none in an example")
            return pa.array(values, schema.field(name).type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            rule, remedy = f"be {kind} in each example", "Give FieldExamples."
            raise dataset_error("DatasetWriter", f"field {name!r}", rule, str(error)[:200], remedy) from error

    return [column(name, kind) for name, kind in kept.items()]


def decode_rows(
    store: Store,
    unit: Unit,
    points: Sequence[str],
    path: str | None = None,
    n_tokens: int | None = None,
    kept: Mapping[str, str] | None = None,
) -> Any:
    """Read a unit's row table (a pyarrow Table); DatasetError unless it holds exactly the unit's examples.

    ``path`` is the name that its commit gives it, where that isn't the plain one; ``n_tokens`` is how many tokens the
    commit counts, where it does; ``kept`` are the types of the fields that it keeps.
    """
    path = path or f"rows/{unit.name}.parquet"
    file = store.open(path, _READER)
    schema = row_schema(points, kept)
    try:
        data = file.read(0, file.size)
        table = unpack(data, schema, len(unit))
        table.validate(full=True)
        if table.column("id").to_pylist() != list(range(unit.start, unit.stop)) or any(
            column.null_count for column in table.columns
        ):
            raise ValueError("other examples, or nulls")
        lengths = table.column("length").to_numpy()
        if n_tokens is not None and (lengths.min() < 0 or int(lengths.sum(dtype=np.int64)) != n_tokens):
            raise ValueError(f"lengths of other than {n_tokens} tokens together, as the commit says")
    except Exception as error:  # whatever a damaged Parquet file makes of pyarrow
        more = f" and {len(kept)} fields" if kept else ""
        rule = f"hold examples {unit.start}..{unit.stop - 1} and the norms of {len(points)} points{more}"
        raise dataset_error(_READER, store.where(path), rule, str(error)[:300], "Run `tlfast verify`.") from error
    return table


class ExampleRow(dict[str, Any]):
    """What is known of one example: a dict, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        norms = self.get("norms", {})
        lines = [(str(key), shortened(str(value), _SHOWN_TEXT)) for key, value in self.items() if key != "norms"]
        lines += [(f"|{point}|", f"{norm:.4g}") for point, norm in list(norms.items())[:_SHOWN_NORMS]]
        more = len(norms) - _SHOWN_NORMS
        return html_table([], lines, f"{more} more points: see row['norms']" if more > 0 else "")


def as_examples(table: Any, points: Sequence[str]) -> list[ExampleRow]:
    """Return the rows of a table as ``ds.examples`` has them: a dict each, with the norms in one of their own."""
    rows: list[dict[str, Any]] = table.to_pylist()
    return [ExampleRow(row | {"norms": {point: row.pop(NORM + point) for point in points}}) for row in rows]


class ExampleTable(Sequence[dict[str, Any]]):
    """The examples of a dataset, read unit by unit when asked: ``ds.examples[i]`` is a dict."""

    KEPT_BYTES = 256 << 20  # of row tables held in memory, besides the last used

    def __init__(
        self, store: Store, commits: Sequence[Commit], points: Sequence[str], kept: Mapping[str, str] | None = None
    ) -> None:
        self._store = store
        self._commits = commits
        self._points, self._kept = list(points), dict(kept or {})
        self._stops = np.cumsum([len(commit.unit) for commit in commits], dtype=np.int64)
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._held = 0  # bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: Any) -> Any:
        """Return an example as a dict (id, input_ids, ..., norms, and what is kept); for a slice a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index.__index__())
        row = i + len(self) if i < 0 else i
        if not 0 <= row < len(self):
            raise IndexError(f"GradientDataset: example must be in 0..{len(self) - 1}, got {i}. See len(ds).")
        return as_examples(self.arrow(np.array([row])), self._points)[0]

    @property
    def names(self) -> list[str]:
        """What is known of an example beside its norms: id, input_ids, ..., and what was kept with it."""
        norms = {NORM + point for point in self._points}
        schema = self.table(0).schema if self._commits else row_schema(self._points, self._kept)
        return [name for name in schema.names if name not in norms]

    def arrow(self, rows: np.ndarray[Any, Any], names: Sequence[str] | None = None) -> Any:
        """Return columns of the row tables, all by default, for these rows (int64 [n], 0..n-1): a pyarrow Table."""
        pa = extra("pyarrow", _READER)
        units = np.searchsorted(self._stops, rows, side="right")
        order = None if (np.diff(units) >= 0).all() else np.argsort(units, kind="stable")
        if order is not None:  # each table is read once
            rows, units = rows[order], units[order]
        firsts = [*np.flatnonzero(np.diff(units, prepend=-1)).tolist(), len(rows)]
        parts = []
        for first, last in pairwise(firsts):
            k = int(units[first])
            local = rows[first:last] - (self._stops[k - 1] if k else 0)
            table = self.table(k) if names is None else self.table(k).select(names)
            behind = (np.diff(local) == 1).all()
            parts.append(table.slice(int(local[0]), len(local)) if behind else table.take(pa.array(local)))
        if not parts:
            empty = self.table(0).slice(0, 0) if self._commits else row_schema(self._points, self._kept).empty_table()
            return empty if names is None else empty.select(names)
        found = pa.concat_tables(parts)
        if order is None:
            return found
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return found.take(pa.array(back))

    def norms(self, point: str) -> torch.Tensor:
        """Return the float32 L2 norm of every row of ``point``: shape [rows]."""
        parts = [self.table(k).column(NORM + point).to_numpy() for k in range(len(self._commits))]
        return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts]))

    def tokens(self, start: int, stop: int) -> list[torch.Tensor]:
        """Return the input_ids of the rows ``start`` to ``stop``: int64, each of its own length."""
        found: list[torch.Tensor] = []
        while start < stop:
            k = int(np.searchsorted(self._stops, start, side="right"))
            first, end = (int(self._stops[k - 1]) if k else 0), min(stop, int(self._stops[k]))
            lists = self.table(k).column("input_ids").combine_chunks()
            offsets = lists.offsets.to_numpy()[start - first : end - first + 1]
            values = torch.from_numpy(lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.int64))
            found += values.split(np.diff(offsets).tolist())
            start = end
        return found

    def table(self, k: int) -> Any:
        """Return the row table of committed unit number ``k`` as a pyarrow Table."""
        with self._lock:
            if k not in self._tables:
                commit = self._commits[k]
                path, tokens = commit.files[1].path, commit.tokens
                self._tables[k] = decode_rows(self._store, commit.unit, self._points, path, tokens, self._kept)
                self._held += self._tables[k].nbytes
                while len(self._tables) > 1 and self._held > self.KEPT_BYTES:
                    self._held -= self._tables.popitem(last=False)[1].nbytes
            self._tables.move_to_end(k)
            return self._tables[k]
