"""Scores of examples that go through a model: their weight gradients against queries, and no row is stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..collecting.stream import row_options
from ..dataset.read.search import Best, Block, Taker
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..spec import Points, Project, Query, Spec, one_of
from .every_score import InFile, InMemory, check_out, check_room
from .given_examples import GivenExamples
from .gradient_queries import count, gradients_of, query_norms
from .methods import given_factors
from .passes import SETTINGS, Passes
from .queries import WHO
from .result import Scores

_METHODS = ("dot", "cosine", "ekfac")
_DAMPING = 0.1


class Wanted(NamedTuple):
    """What is asked of the weight gradients, beside the queries."""

    points: Points | None
    project: Project | None
    bias: bool
    mean: bool


def score_examples(
    model: nn.Module,
    examples: Iterable[Any],
    queries: Mapping[str, Query] | Iterable[Any],
    method: str = "dot",
    *,
    points: Points | None = None,
    k: int | None = 10,
    project: Project | None = None,
    bias: bool = False,
    mean: bool = False,
    non_finite: Literal["skip", "stop"] = "skip",
    out: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Scores:
    """Score examples by their exact weight gradients against queries while a model runs over them; store no row.

    The score of example n and query q is the sum over modules of <G_n, Q_q>; "cosine" divides it by both norms, each
    taken over all these modules. Each module's scores are made in its backward, by the form with the fewest
    multiplications (see `tlfast.Spec`, ``queries``); norms are ghost norms of the same backward. The model runs in eval
    mode and frozen, and is as before afterwards. ``tlfast.score(model, queries, method, examples=...)`` is the same.

    Args:
        model: any module, as `collect` takes it.
        examples: those that are scored, as `collect` takes them.
        queries: the queries of each module, {point: tensor [Q, O, I], or a pair}, as `tlfast.Spec` takes them; or
            examples, the queries being their weight gradients at ``points``, which are computed first. One that
            `collect` would skip is an error.
        method: "dot", "cosine", or "ekfac": the dot product with the query times the inverse of the curvature.
        points: the modules, as in `collect`; those of a mapping by default.
        k: how many examples for each query; None: the scores of all, in order.
        project: score projected gradients, as of `tlfast.Spec`; queries are of the projected shape then.
        bias: with the gradients of biases.
        mean: one query, the mean of the gradients of the query examples.
        non_finite: an example whose scores aren't finite: "skip" leaves it out and counts it, "stop" raises.
        out: a new file of numpy (.npy), which gets all scores: [queries, examples].
        settings: of ekfac ``moments``, `tlfast.Factors` with eigenvectors or their file, and ``damping``, what is added
            to each eigenvalue, as a part of their mean: gradients can't be projected then. And loss, batch_tokens,
            seq_len and the others of `collect` that say how the model is run; ``tokenizer``, for the texts of the
            result; ``progress``, called with the number of examples that are done.

    Returns:
        Scores; ``found.indices`` count the examples that are taken, and ``found.ids`` those that were given.

    Raises:
        ValueError, TypeError: for bad arguments, and all that `collect` refuses, before the first batch is scored.
        FloatingPointError: for ``non_finite="stop"``.

    Example:
        >>> import torch, tlfast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> found = tlfast.attribution.score_examples(
        ...     model, [[1, 2, 3], [4, 5], [7, 8, 6]], [[4, 5]], "cosine", points="1", k=1)
        >>> found.indices
        tensor([[1]])
    """
    one_of(WHO, "method", method, _METHODS)
    one_of(WHO, "non_finite", non_finite, ("skip", "stop"))
    if k is not None and (type(k) is not int or k < 1):
        raise ValueError(broken_rule(WHO, "k", "be an int of at least 1, or None", repr(k), "None gives all scores."))
    factors, damping = settings.pop("moments", None), settings.pop("damping", _DAMPING)
    _check_curvature(method, factors, damping, project)
    path = None if out is None else check_out(out)
    tokenizer, progress = settings.pop("tokenizer", None), settings.pop("progress", None)
    wanted = Wanted(points, project, bias, mean)
    given, ids = _given(model, queries, wanted, settings)
    if method == "ekfac":
        whole = {name: query[0] @ query[1] if isinstance(query, tuple) else query for name, query in given.items()}
        given = dict(given_factors(factors).precondition(whole, damping_factor=damping))
    norms = query_norms(given) if method == "cosine" else None
    passes = Passes(model, examples, row_options(WHO, SETTINGS, _specs(given, wanted, norms is not None), settings))
    n_queries, n = count(given), len(passes.examples)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
    if k is None and path is None:
        check_room(n_queries, n, dtype)
    best = None if k is None else Best(n_queries, min(k, n), torch.empty(0, dtype=dtype))
    every: InFile | InMemory | None = None
    with ExitStack() as files:
        if path is not None:
            every = files.enter_context(InFile(path, n_queries, n, dtype))
        elif k is None:
            every = InMemory(n_queries, n, dtype)
        takers: list[Taker] = [taker for taker in (best, every) if taker is not None]
        adding = _Adding(passes, n_queries, norms, takers, dtype, non_finite == "stop", progress)
        passes.run(adding.take, adding.part_done)
    source = GivenExamples(passes.examples, tokenizer)
    more: dict[str, Any] = {"n_skipped": adding.n_skipped, "queries": ids}
    if best is not None:
        return Scores(source, best.rows, best.scores, method, list(given), **more)
    assert every is not None
    return Scores(source, torch.arange(n).expand(n_queries, n), every.scores, method, list(given), is_all=True, **more)


def _check_curvature(method: str, factors: Any, damping: float, project: Project | None) -> None:
    """An error for what ekfac lacks, or another method doesn't read."""
    if method == "ekfac":
        given_factors(factors)
        if project is not None:
            rule = "be left out with ekfac"
            raise ValueError(broken_rule(WHO, "project", rule, repr(project), "The curvature is of whole gradients."))
    elif factors is not None or damping != _DAMPING:
        rule, got = "be left out but with ekfac", f"it with {method}"
        argument = "damping" if factors is None else "moments"
        raise ValueError(broken_rule(WHO, argument, rule, got, "Leave it out, or choose that method."))


def _given(
    model: nn.Module, queries: Any, wanted: Wanted, settings: Mapping[str, Any]
) -> tuple[dict[str, Query], list[int] | None]:
    """The queries by point; and the numbers of the query examples, None where tensors were given."""
    if isinstance(queries, Mapping):
        if wanted.mean or not queries:
            rule, got = "be examples for mean=True", "tensors"
            if not queries:
                rule, got = "name a point at least", "an empty dict"
            raise ValueError(broken_rule(WHO, "queries", rule, got, "Give {point: tensor}, and take its mean."))
        return dict(queries), None
    if isinstance(queries, (str, os.PathLike, torch.Tensor, nn.Module)):
        rule, remedy = "be examples, or a mapping from points to tensors", "Of a dataset give {point: ds[column][:]}."
        raise TypeError(broken_rule(WHO, "queries", rule, type(queries).__name__, remedy))
    if wanted.points is None:
        remedy = "Name the modules whose gradients are compared."
        raise ValueError(broken_rule(WHO, "points", "be given where queries are examples", "None", remedy))
    spec = Spec(wanted.points, of="weight", project=wanted.project, bias=wanted.bias)
    options = row_options(WHO, SETTINGS, spec, {**settings, "bad_examples": "stop"})
    return gradients_of(model, queries, options, wanted.mean)


def _specs(given: Mapping[str, Query], wanted: Wanted, with_norms: bool) -> list[Spec]:
    """What is made of each example's gradient."""
    points: Any = list(given) if wanted.points is None else wanted.points
    more: dict[str, Any] = {"project": wanted.project, "bias": wanted.bias}
    scores = Spec(points, of="weight", queries=given, **more)
    return [scores, Spec(points, "norm", of="weight", **more)] if with_norms else [scores]


class _Adding:
    """Adds up the scores of all modules, and gives them on in the order of the examples."""

    def __init__(
        self, passes: Passes, n_queries: int, norms: torch.Tensor | None, takers: Sequence[Taker],
        dtype: torch.dtype, stops: bool, progress: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        self._passes, self._norms, self._takers, self._dtype = passes, norms, takers, dtype
        self._stops, self._progress, self._n_queries = stops, progress, n_queries
        self._open: dict[int, torch.Tensor] = {}  # by example, its scores
        self.n_skipped = 0

    def take(self, numbers: Sequence[int], cap: Capture) -> None:
        """Add up the scores of a batch."""
        by_kind = {"none": _Sum(), "norm": _Sum()}
        for column, (_, spec) in cap.wanted.items():
            rows = cap[column].double()
            by_kind[spec.reduce].add(rows if spec.reduce == "none" else rows.square())
        scores = by_kind["none"].total()
        if self._norms is not None:
            both = by_kind["norm"].total().sqrt()[:, None] * self._norms
            scores = torch.where(both == 0, 0.0, scores / both)
        scores = scores.to(self._dtype)
        bad = ~scores.isfinite().all(1)
        if bool(bad.any()):
            if self._stops:
                row = self._passes.examples[numbers[int(bad.nonzero()[0])]].id
                got, remedy = f"NaN or infinity for example {row}", 'non_finite="skip" leaves such examples out.'
                raise FloatingPointError(broken_rule(WHO, "scores", "be finite", got, remedy))
            self.n_skipped += int(bad.sum())
            scores[bad] = torch.nan
        self._open |= zip(numbers, scores, strict=True)

    def part_done(self, start: int, stop: int) -> None:
        """Give the scores of some examples on."""
        scores = torch.stack([self._open.pop(number) for number in range(start, stop)]).T.contiguous()
        block = Block({}, torch.arange(start, stop), None, stop - start)
        for taker in self._takers:
            taker.add(slice(0, self._n_queries), scores, block)
        if self._progress is not None:
            self._progress(stop - start)


class _Sum:
    """A sum over columns, on each of their devices before these meet on the host."""

    def __init__(self) -> None:
        self._parts: dict[torch.device, torch.Tensor] = {}

    def add(self, rows: torch.Tensor) -> None:
        there = self._parts.get(rows.device)
        self._parts[rows.device] = rows if there is None else there + rows

    def total(self) -> torch.Tensor:
        made = [part.cpu() for part in self._parts.values()]
        return torch.stack(made).sum(0) if len(made) > 1 else made[0]
