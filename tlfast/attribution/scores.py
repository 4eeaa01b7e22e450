"""Scores of stored rows: every row of a dataset against some queries, each row read once, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from ..dataset.read.search import Best, Taker, take_scores
from ..dataset.read.views import Readable
from ..errors import broken_rule
from ..hooks.factors import Factors
from ..hooks.running import RunningSums
from ..spec import Query, one_of
from .every_score import InFile, InMemory, check_out, check_room
from .example_scores import score_examples
from .methods import DAMPING, METHODS, Asked, Method, check_arguments
from .queries import WHO, chosen_queries, opened
from .result import Scores
from .sums import Sums, dtype_of


def score(
    dataset: str | os.PathLike[str] | Readable | nn.Module,
    queries: str | os.PathLike[str] | Readable | Mapping[str, Query] | Iterable[Any],
    method: str = "dot",
    *,
    points: str | Iterable[str] | None = None,
    k: int | None = 10,
    where: Any = None,
    moments: RunningSums | Factors | str | os.PathLike[str] | None = None,
    damping: float = DAMPING,
    mix: float = 0.0,
    non_finite: Literal["skip", "stop"] = "skip",
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
    **of_model: Any,
) -> Scores:
    """Score every row of a dataset against some queries, over all columns that both have; keep the best rows.

    A score is of the whole row, its columns laid behind each other: "dot" is the sum of the columns' dot products,
    "cosine" that sum divided by the norms of row and query over all these columns, and "trackstar" the cosine once each
    column of both was multiplied with the inverse root of its second moments, ``(M + damping m I)^-1/2``, m the mean of
    M's eigenvalues; "ekfac" is the dot product with the query times the inverse of the curvature
    (`tlfast.Factors.precondition`): the influence of a row on the query. Rows are read in order, 8 MiB at a time, while
    what was read is multiplied: memory holds some such blocks, the queries and the results, whatever the number of
    rows. The arithmetic is float32 (float64 where a column is), on the device of the queries.

    Args:
        dataset: a folder or URL, or an open dataset or view; merged ones too. Or a model, through which ``examples=``
            go: `tlfast.attribution.score_examples`; no row is stored then.
        queries: another dataset, whose rows are the queries; or a tensor [Q, *shape of a row] for each of some columns.
        method: "dot", "cosine", "trackstar" or "ekfac".
        points: which columns, names or globs; all that both have by default.
        k: how many rows for each query; None: the scores of all rows, in order.
        where: take the rows alone for which it holds, as ``ds.filter``: ``"length > 10"``. The rows found are then
            those of ``found.dataset``, the view; ``found.ids`` are the examples'.
        moments: of trackstar: RunningSums of ``moment2_full``, or their file. None: those of the rows that are
            scored, which are read once more. Of ekfac: `tlfast.Factors` with eigenvectors, or their file; rows and
            queries are weight gradients that aren't projected then.
        damping: of trackstar and ekfac, above 0: what is added to each eigenvalue, as a part of their mean.
        mix: of trackstar: from 0 to 1, the part of the queries' own second moments in M.
        non_finite: a row with a NaN or an infinity in these columns: "skip" leaves it out and counts it, "stop" raises.
        out: a new file of numpy (.npy), which gets the scores of all rows: [queries, rows].
        progress: called with the number of rows just read.
        of_model: ``examples`` and the other arguments of `tlfast.attribution.score_examples`.

    Returns:
        Scores: ``indices`` and ``scores`` [Q, min(k, rows)], highest first; of equal ones the row that comes first.

    Raises:
        ValueError, TypeError, KeyError: for bad arguments, before a row is read.
        FloatingPointError: for ``non_finite="stop"``.

    Example:
        >>> import tempfile, torch, tlfast
        >>> from tlfast.dataset import DatasetWriter, Example, Plan
        >>> out, plan = tempfile.mkdtemp(), Plan(2, 2)
        >>> columns = {"a": (torch.float32, (2,)), "b": (torch.float32, ())}
        >>> writer = DatasetWriter(out, header={}, columns=columns, plan=plan)
        >>> rows = {"a": torch.tensor([[3.0, 4.0], [1.0, 0.0]]), "b": torch.tensor([0.0, 1.0])}
        >>> writer.write_unit(plan.unit(0), rows, [Example(i, [i], "a", i, 1) for i in range(2)])
        True
        >>> found = tlfast.score(out, {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([1.0])}, k=1)
        >>> found.indices, found.scores
        (tensor([[0]]), tensor([[3.]]))
    """
    if isinstance(dataset, nn.Module):
        left = {"where": where}
        shared: dict[str, Any] = {"points": points, "k": k, "non_finite": non_finite, "out": out, "progress": progress}
        shared |= {"moments": moments, "damping": damping, "mix": mix}
        return _of_model(dataset, queries, method, left, shared | of_model)
    if of_model:
        rule, got = "be left out where a dataset is scored", ", ".join(of_model)
        raise TypeError(broken_rule(WHO, "settings of a model", rule, got, "Give the model in place of the dataset."))
    one_of(WHO, "non_finite", non_finite, ("skip", "stop"))
    check_arguments(method, k, {"moments": moments, "damping": damping, "mix": mix})
    path = None if out is None else check_out(out)
    ds = opened("dataset", dataset)
    ds = ds if where is None else ds.filter(where)
    chosen = chosen_queries(ds, queries, points)
    METHODS[method].check(ds, chosen)
    dtype = dtype_of(ds, chosen.points)
    if k is None and path is None:
        check_room(len(chosen), len(ds), dtype)
    asked = Asked(ds, chosen, moments, damping, mix, progress)
    every: InFile | InMemory | None = None
    with ExitStack() as files:
        if path is not None:
            every = files.enter_context(InFile(path, len(chosen), len(ds), dtype))
        elif k is None:
            every = InMemory(len(chosen), len(ds), dtype)
        best, n_skipped = _scored(asked, METHODS[method], dtype, non_finite == "stop", k, every)
    more: dict[str, Any] = {"n_skipped": n_skipped, "queries": chosen.source}
    if best is not None:
        return Scores(ds, best.rows.cpu(), best.scores.cpu(), method, chosen.points, **more)
    assert every is not None
    rows = torch.arange(len(ds)).expand(len(chosen), len(ds))
    return Scores(ds, rows, every.scores, method, chosen.points, is_all=True, **more)


def _of_model(model: nn.Module, queries: Any, method: str, left: Mapping[str, Any], asked: dict[str, Any]) -> Scores:
    """Score examples that go through a model; ``left`` are arguments that have no meaning there."""
    odd = next((name for name, value in left.items() if value is not None), None)
    if odd is not None:
        raise ValueError(broken_rule(WHO, odd, "be left out where a model is scored", "it", "Leave it out."))
    if "examples" not in asked:
        rule, remedy = "be given where a model is scored", "Say examples=, as collect takes them."
        raise TypeError(broken_rule(WHO, "examples", rule, "none", remedy))
    return score_examples(model, asked.pop("examples"), queries, method, **asked)


def _scored(
    asked: Asked, method: Method, dtype: torch.dtype, stops: bool, k: int | None, every: Taker | None
) -> tuple[Best | None, int]:
    """Give all scores to ``every``; return the best rows, where they are asked for, and how many rows were skipped."""
    ds, points = asked.ds, asked.queries.points
    device = asked.queries.rows[points[0]].device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        sums = Sums(ds, method.prepare(asked), dtype, stops)
        like = torch.empty(0, dtype=dtype, device=device)
        best = None if k is None else Best(len(asked.queries), min(k, len(ds)), like)
        takers = [taker for taker in (best, every) if taker is not None]
        take_scores(sums.blocks(), sums.most_rows, sums, takers, asked.progress)
    return best, sums.n_skipped
