"""A dataset or a view for other libraries: arrays, a data frame, a Hugging Face dataset, a FAISS index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...errors import broken_rule
from ..errors import extra
from .arrow_rows import GRADIENTS, PART_BYTES, Rows
from .search import METRICS, directions

Array = np.ndarray[Any, Any]


def named_points(ds: Any, points: Iterable[str] | None) -> list[str]:
    """Return the points that were named, all by default; KeyError for one that there isn't."""
    wanted = ds.points if points is None else [points] if isinstance(points, str) else list(points)
    for point in wanted:
        ds.column(point)
    return list(dict.fromkeys(wanted))


def to_numpy(ds: Any, points: Iterable[str] | None, who: str = "to_numpy") -> dict[str, Array]:
    """Return the rows of points as arrays; see Readable.to_numpy."""
    rows = Rows(ds, named_points(ds, points), who=who, verify=False)
    found = {}
    for point, column in rows.columns.items():
        array = np.empty((len(ds), *column.row_shape), torch.empty(0, dtype=column.dtype).numpy().dtype)
        step = max(1, PART_BYTES // max(1, column.row_bytes))
        for start in range(0, len(ds), step):
            array[start : start + step] = ds[point][start : start + step].to(column.dtype).numpy()
        found[point] = array
    return found


def to_pandas(ds: Any, points: Iterable[str]) -> Any:
    """Return the row tables as a data frame; see Readable.to_pandas."""
    extra("pandas", "to_pandas", "hub")
    named = named_points(ds, points)
    frame = ds.examples.arrow(np.arange(len(ds))).to_pandas()
    for point, array in (to_numpy(ds, named, "to_pandas") if named else {}).items():
        frame[GRADIENTS + point] = list(array)
    frame.attrs["tlfast"] = {point: ds.holds(point) for point in named}
    return frame


def to_hf(ds: Any, points: Iterable[str] | None) -> Any:
    """Return a Hugging Face dataset; see Readable.to_hf."""
    datasets, pa = extra("datasets", "to_hf", "hub"), extra("pyarrow", "to_hf")
    rows = Rows(ds, named_points(ds, points), who="to_hf", verify=False, tokens="all")
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
    if point is None and len(ds.points) != 1:
        known = ", ".join(map(repr, ds.points[:5])) + ", ..." * (len(ds.points) > 5)
        raise ValueError(broken_rule(who, "point", f"be one of {known}", "none", "Say whose rows the index gets."))
    columns = Rows(ds, named_points(ds, ds.points if point is None else point), who=who, verify=False).columns
    if not columns:
        raise ValueError(broken_rule(who, "point", "name one at least", "none", "Leave it out where there is one."))
    widths = {name: int(np.prod(column.row_shape, dtype=np.int64)) for name, column in columns.items()}
    width = sum(widths.values())
    made = faiss.IndexFlatIP(width) if index is None else index
    _check_index(who, made, width)
    step = max(1, PART_BYTES // (4 * width))
    for start in range(0, len(ds), step):
        parts = [ds[name][start : start + step].reshape(-1, n).to(torch.float32) for name, n in widths.items()]
        for name, part in zip(widths, parts, strict=True):
            bad = (~part.isfinite()).any(1)
            if bool(bad.any()):
                got = f"NaN or infinity in row {start + int(bad.nonzero()[0])}, after {start} rows were added"
                remedy = 'Make a new index of ds.filter("not non_finite").'
                raise ValueError(broken_rule(who, f"point {name!r}", "hold finite float32 values", got, remedy))
        block = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        made.add((directions(block) if metric == "cosine" else block).contiguous().numpy())
    return made


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
