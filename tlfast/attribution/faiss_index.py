"""A FAISS index of several columns of a dataset, and the vectors that are looked up in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from ..dataset.read.search import directions
from ..dataset.read.views import Readable
from ..errors import SpeakingAs
from ..hooks.points import match_names
from .queries import check_columns, chosen_queries, opened

_WHO = "faiss_index"


def faiss_index(
    dataset: str | os.PathLike[str] | Readable,
    points: str | Iterable[str] | None = None,
    *,
    index: Any = None,
    metric: Literal["dot", "cosine"] = "dot",
) -> Any:
    """Add all rows of a dataset to a FAISS index, their columns laid behind each other, as float32; return it.

    Number i in the index is row i. It answers as `tlfast.score` does with the method "dot" or "cosine", and sooner the
    second time; an index that holds less than the rows answers approximately. Needs the extra ``faiss``.

    Args:
        dataset: a folder, or an open dataset or view.
        points: which columns, names or globs; all by default.
        index: an empty, trained one; by default an IndexFlatIP, which holds all rows in memory.
        metric: "cosine" divides a row by its norm over all these columns.

    Raises:
        ValueError, TypeError: as ``ds.to_faiss``; and for columns of several kinds, unless they are named.
        ImportError: without FAISS, naming the extra.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.attribution import faiss_index, query_vectors
        >>> from tlfast.dataset import DatasetWriter, Example, Plan
        >>> out, plan = tempfile.mkdtemp(), Plan(2, 2)
        >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> rows = {"h": torch.tensor([[3.0, 4.0], [1.0, 0.0]])}
        >>> writer.write_unit(plan.unit(0), rows, [Example(i, [i], "a", i, 1) for i in range(2)])
        True
        >>> index = faiss_index(out, metric="cosine")
        >>> index.search(query_vectors(out, {"h": torch.tensor([[1.0, 0.0]])}, metric="cosine"), 1)
        (array([[1.]], dtype=float32), array([[1]]))
    """
    ds = opened("dataset", dataset)
    wanted = ds.points if points is None else [points] if isinstance(points, str) else list(points)
    names = match_names(_WHO, ds.points, wanted)
    with SpeakingAs(_WHO, "score"):
        check_columns(ds, names, by_name=points is not None)
    return ds.to_faiss(index, point=names, metric=metric)


def query_vectors(
    dataset: str | os.PathLike[str] | Readable,
    queries: str | os.PathLike[str] | Readable | Mapping[str, torch.Tensor],
    points: str | Iterable[str] | None = None,
    *,
    metric: Literal["dot", "cosine"] = "dot",
) -> np.ndarray[Any, Any]:
    """Return what an index of `faiss_index` is asked for queries as of `tlfast.score`: float32 [Q, values].

    Its columns lie in the order of the dataset, so the queries must have all columns that the index has.
    """
    ds = opened("dataset", dataset)
    with SpeakingAs("query_vectors", "score"):
        chosen = chosen_queries(ds, queries, ds.points if points is None else points)
    joined = torch.cat(list(chosen.rows.values()), 1).cpu()
    found: np.ndarray[Any, Any] = (directions(joined) if metric == "cosine" else joined).float().numpy()
    return found
