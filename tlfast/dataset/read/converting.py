"""A dataset or a view for other libraries: arrays, a data frame, a Hugging Face dataset, a FAISS index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...errors import broken_rule
from ..errors import dataset_error, extra
from .arrow_rows import GRADIENTS, PART_BYTES, POSITION, Part, Rows
from .found import SearchResult
from .search import METRICS, check_vectors, directions

Array = np.ndarray[Any, Any]


def named_points(ds: Any, points: Iterable[str] | None) -> list[str]:
    """Return the points that were named, all by default; KeyError for one that there isn't."""
    wanted = ds.points if points is None else [points] if isinstance(points, str) else list(points)
    for point in wanted:
        ds.column(point)
    return list(dict.fromkeys(wanted))


def to_numpy(ds: Any, points: Iterable[str] | None) -> dict[str, Array]:
    """Return the rows of points as arrays; see Readable.to_numpy."""
    who = "to_numpy"
    rows = Rows(ds, named_points(ds, points), who=who, verify=False)
    found: dict[str, Array] = {}
    if rows.per_token:
        taken = [point for point in rows.columns if point in ("id", POSITION)]
        if taken:
            rule, remedy = "not include the name of another array", "Leave it out, and read ds[point].flat[:]."
            raise dataset_error(who, "points", rule, repr(taken[0]), remedy)
        owners, positions = ds[next(iter(rows.columns))].where()
        found = {"id": ds.ids_of(owners).numpy(), POSITION: positions.numpy()}
    return found | {point: _all_values(rows, point) for point in rows.columns}


def _all_values(rows: Rows, point: str) -> Array:
    """All rows of a point as an array, read in parts."""
    column, values = rows.columns[point], rows.column(point)
    array = np.empty((len(values), *column.row_shape), torch.empty(0, dtype=column.dtype).numpy().dtype)
    step = max(1, PART_BYTES // max(1, column.row_bytes))
    for start in range(0, len(values), step):
        array[start : start + step] = values[start : start + step].to(column.dtype).numpy()
    return array


def to_pandas(ds: Any, points: Iterable[str]) -> Any:
    """Return the row tables as a data frame; see Readable.to_pandas."""
    who = "to_pandas"
    extra("pandas", who, "hub")
    named = named_points(ds, points)
    rows = Rows(ds, named, who=who, verify=False)
    frame = (_of_tokens(rows, who) if rows.per_token else ds.examples.arrow(np.arange(len(ds)))).to_pandas()
    for point in named:
        frame[GRADIENTS + point] = list(_all_values(rows, point))
    frame.attrs["tlfast"] = {point: ds.holds(point) for point in named}
    return frame


def _of_tokens(rows: Rows, who: str) -> Any:
    """What an export says beside each token, as an Arrow table."""
    pa, schema = extra("pyarrow", who), rows.schema(gradients=False)
    tables = [
        pa.Table.from_arrays([column.combine_chunks() for column in table.columns], schema=schema)
        for examples, lengths in rows.stretches(rows.row_bytes)
        for _, table in rows.beside(Part(examples, lengths, {}))
    ]
    return pa.concat_tables([schema.empty_table(), *tables]).replace_schema_metadata()


def to_hf(ds: Any, points: Iterable[str] | None) -> Any:
    """Return a Hugging Face dataset; see Readable.to_hf."""
    datasets, pa = extra("datasets", "to_hf", "hub"), extra("pyarrow", "to_hf")
    rows = Rows(ds, named_points(ds, points), who="to_hf", verify=False)
    schema = rows.schema()
    features = datasets.Features.from_arrow_schema(schema)
    table = pa.Table.from_batches(list(rows.batches(schema)), schema=schema).cast(features.arrow_schema)
    said = json.dumps(rows.provenance())  # as an export to "hf" says it
    return datasets.Dataset(table, info=datasets.DatasetInfo(description=said, features=features))


def to_faiss(ds: Any, index: Any, point: str | Iterable[str] | None, metric: str) -> Any:
    """Add all rows of a point, or of several behind each other, to a FAISS index; see Readable.to_faiss."""
    who = "to_faiss"
    faiss = extra("faiss", who, "faiss")
    if metric not in METRICS:
        raise ValueError(broken_rule(who, "metric", f"be one of {', '.join(METRICS)}", repr(metric), "Choose one."))
    rows = _indexed(who, ds, point)
    columns = {name: rows.column(name) for name in rows.columns}
    widths = {name: int(np.prod(column.row_shape, dtype=np.int64)) for name, column in rows.columns.items()}
    width = sum(widths.values())
    made = faiss.IndexFlatIP(width) if index is None else index
    _check_index(who, made, width)
    step = max(1, PART_BYTES // (4 * width))
    for start in range(0, rows.n_rows, step):
        parts = [columns[name][start : start + step].reshape(-1, n).to(torch.float32) for name, n in widths.items()]
        for name, part in zip(widths, parts, strict=True):
            bad = (~part.isfinite()).any(1)
            if bool(bad.any()):
                which = _called(rows, name, start + int(bad.nonzero()[0]))
                got = f"NaN or infinity in {which}, after {start} rows were added"
                remedy = 'Make a new index of ds.filter("not non_finite").'
                raise ValueError(broken_rule(who, f"point {name!r}", "hold finite float32 values", got, remedy))
        block = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        made.add((directions(block) if metric == "cosine" else block).contiguous().numpy())
    return made


def _indexed(who: str, ds: Any, point: str | Iterable[str] | None) -> Rows:
    """The rows that an index has of the points that were named."""
    if point is None and len(ds.points) != 1:
        known = ", ".join(map(repr, ds.points[:5])) + ", ..." * (len(ds.points) > 5)
        raise ValueError(broken_rule(who, "point", f"be one of {known}", "none", "Say whose rows the index gets."))
    rows = Rows(ds, named_points(ds, ds.points if point is None else point), who=who, verify=False)
    if not rows.columns:
        raise ValueError(broken_rule(who, "point", "name one at least", "none", "Leave it out where there is one."))
    check_vectors(who, ds, rows.columns)
    return rows


def _called(rows: Rows, point: str, number: int) -> str:
    """What people call row ``number`` of a point."""
    if not rows.per_token:
        return f"row {number}"
    example, position = rows.dataset[point].where(number)
    return f"token {int(position)} of row {int(example)}"


def from_faiss(ds: Any, scores: Any, numbers: Any, point: str | Iterable[str] | None) -> SearchResult:
    """Return whose rows an index of `to_faiss` has found; see Readable.from_faiss."""
    who = "from_faiss"
    rows = _indexed(who, ds, point)
    found, values = (torch.as_tensor(np.asarray(given)) for given in (numbers, scores))
    if found.dtype != torch.int64 or not values.is_floating_point() or found.dim() != 2 or values.shape != found.shape:
        rule = "be floats [queries, k] beside numbers, int64 [queries, k]"
        got = f"{values.dtype} {list(values.shape)} beside {found.dtype} {list(found.shape)}"
        raise ValueError(broken_rule(who, "scores", rule, got, "Give both as index.search has returned them."))
    there, n_rows = found >= 0, rows.n_rows
    if found.numel() and not -1 <= int(found.min()) <= int(found.max()) < n_rows:
        wrong = found[(found < -1) | (found >= n_rows)][0]
        rule, remedy = f"be -1, for none, or of the {n_rows} rows", "Ask an index that ds.to_faiss has made."
        raise IndexError(broken_rule(who, "numbers", rule, int(wrong), remedy))
    examples, positions = found.clone(), torch.full_like(found, -1)
    if rows.per_token:
        examples[there], positions[there] = ds[next(iter(rows.columns))].where(found[there])
    values = torch.where(there, values, torch.nan)
    return SearchResult(ds, examples, values, positions if rows.per_token else None, "faiss", list(rows.columns))


def _check_index(who: str, index: Any, width: int) -> None:
    if not hasattr(index, "add") or not hasattr(index, "is_trained"):
        raise TypeError(
            broken_rule(who, "index", "be a FAISS index", type(index).__name__, "Leave it out, or make one.")
        )
    if index.d != width:
        raise ValueError(broken_rule(who, "index", f"be of {width} values a row", index.d, "Make one of that size."))
    if index.ntotal:
        rule, remedy = "be empty: number i in it is row i", "Give a new one."
        raise ValueError(broken_rule(who, "index", rule, f"one with {index.ntotal} rows", remedy))
    if not index.is_trained:
        remedy = "Train it on some rows: index.train(ds[point][rows].float().numpy())."
        raise ValueError(broken_rule(who, "index", "be trained", "one that isn't", remedy))
