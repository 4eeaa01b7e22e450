"""The nearest examples on the page of a report: what a search found, or the file of it, checked against the dataset."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..dataset import GradientDataset
from ..dataset.errors import dataset_error, extra
from ..dataset.read.found import FOUND, SearchResult
from .texts import Decode, cut

_WHO = "write_report"
_SHOWN_QUERIES, _SHOWN_ROWS = 20, 10
_PLACE = ("source", "start", "length")  # of an example: what tells that it is the dataset's own
_NEEDED = ("query", "score", "id", *_PLACE)


def nearest_examples(dataset: GradientDataset, found: Any, decode: Decode, number: Any) -> dict[str, Any]:
    """Return what the page says of what was found.

    Args:
        dataset: on which the page is.
        found: a `SearchResult`, or the Parquet file of one.
        decode: shows the tokens of an example.
        number: shows a score.

    Raises:
        DatasetError: for what was found elsewhere, or is no such file.
    """
    if isinstance(found, SearchResult):
        about, hits = _of_result(found)
    elif isinstance(found, (str, os.PathLike)):
        about, hits = _of_file(os.fspath(found))
    else:
        got, remedy = type(found).__name__, "Give what tlfast.score returned, or the file of found.to_parquet."
        raise dataset_error(_WHO, "found", "be the result of a search", got, remedy)
    texts = about["queries"] or []
    queries = []
    for query in range(min(about["n_queries"], _SHOWN_QUERIES)):
        of_query = [hit for hit in hits if hit["query"] == query]
        rows = [_shown(dataset, hit, decode, number) for hit in of_query[:_SHOWN_ROWS]]
        queries.append({"number": query, "text": cut(texts[query]) if query < len(texts) else "", "rows": rows})
    return {"queries": queries, "note": _note(about, hits)}


def _of_result(found: SearchResult) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    about = {
        "method": found.metric, "points": found.points, "n_queries": len(found), "queries": found.query_texts(),
        "n_skipped": getattr(found, "n_skipped", 0),
    }  # fmt: skip
    best = found.best(_SHOWN_ROWS)
    hits = [{"query": query, **hit} for query in range(min(len(found), _SHOWN_QUERIES)) for hit in best[query]]
    return about, hits


def _of_file(path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pyarrow, parquet = extra("pyarrow", _WHO), extra("pyarrow.parquet", _WHO)
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid:
        table = None
    if table is None or not set(_NEEDED) <= set(table.column_names):
        got, remedy = f"{path!r}, another", "tlfast score --out FILE.parquet writes one."
        raise dataset_error(_WHO, "found", "be the Parquet file of a search", got, remedy)
    hits = table.select([name for name in table.column_names if name != "text"]).to_pylist()
    n_queries = max((hit["query"] for hit in hits), default=-1) + 1
    about: dict[str, Any] = {
        "method": "scores", "points": [], "n_skipped": 0, "n_queries": n_queries, "queries": None,
    }  # fmt: skip
    return about | _said(table.schema.metadata or {}), hits


def _said(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """What the file says of itself, as far as it makes sense."""
    try:
        known = json.loads(metadata.get(FOUND.encode(), b"{}"))
    except ValueError:
        known = {}
    known = known if isinstance(known, dict) else {}
    kinds: dict[str, type] = {"method": str, "points": list, "n_skipped": int, "n_queries": int, "queries": list}
    found = {key: known[key] for key, kind in kinds.items() if isinstance(known.get(key), kind)}
    for key in ("points", "queries"):
        if not all(isinstance(one, str) for one in found.get(key, [])):
            del found[key]
    return found


def _shown(dataset: GradientDataset, hit: Mapping[str, Any], decode: Decode, number: Any) -> dict[str, Any]:
    """A row that was found; an error where the dataset has another example in its place."""
    try:
        example = dataset.examples[int(dataset.rows_of(hit["id"]))]
    except KeyError:
        example = None
    if example is None or any(example[name] != hit[name] for name in _PLACE):
        got = f"example {hit['id']} of {hit['source']}, which isn't in {dataset.path}"
        raise dataset_error(_WHO, "found", "be of this dataset", got, "Give what was found there.")
    score = hit["score"]
    return {
        "score": "\u2013" if score is None or math.isnan(score) else number(score), "id": hit["id"],
        "source": hit["source"], "start": hit["start"], "length": hit["length"], "position": hit.get("position"),
        "text": decode(example["input_ids"]),
    }  # fmt: skip


def _note(about: Mapping[str, Any], hits: Iterable[Any]) -> str:
    points, n = about["points"], about["n_queries"]
    over = f" over {', '.join(points[:3])}{', ...' * (len(points) > 3)}" if points else ""
    left = f" The first {_SHOWN_QUERIES} of {n} queries." if n > _SHOWN_QUERIES else ""
    skipped = f" {about['n_skipped']} rows were left out, which aren't finite." if about["n_skipped"] else ""
    return f"By {about['method']}{over}, at most {_SHOWN_ROWS} a query.{left}{skipped}"
