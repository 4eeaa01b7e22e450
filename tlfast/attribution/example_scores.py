"""Scores of examples that go through a model: their weight gradients against queries, and no row is stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..collecting.passes import SETTINGS, Passes
from ..collecting.stream import row_options
from ..dataset.format.plan import Example
from ..dataset.read.search import Best, Block, Taker
from ..dataset.read.views import Readable
from ..errors import SpeakingAs, broken_rule
from ..hooks.captured import Capture
from ..hooks.factors import Factors
from ..hooks.layers import check_weight_spec, find_layer, row_shape, weighted_modules
from ..hooks.points import find_points
from ..spec import Per, Points, Project, Query, Spec, one_of
from .every_score import InFile, InMemory, check_out, check_room
from .given_examples import GivenExamples
from .gradient_queries import QueryExamples, as_tensors, count, divided, gradients_of, query_norms
from .methods import DAMPING, check_arguments, check_factors, given_factors
from .queries import WHO
from .result import Scores
from .scores_of_batches import InBackward, Way, Whitened, check_moments_of_model


class Wanted(NamedTuple):
    """What is asked of the weight gradients, beside the queries."""

    points: Points | None
    project: Project | None
    bias: bool
    mean: bool
    per: Per


@SpeakingAs(WHO, "collect")
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
    multiplications (see `tlfast.Spec`, ``queries``); norms are ghost norms of the same backward. "trackstar" takes the
    rows of a batch themselves, at most 8,192 numbers a module: say ``project=16``. The model runs in eval mode and
    frozen, and is as before afterwards. ``tlfast.score(model, queries, method, examples=...)`` is the same.

    Args:
        model: any module, as `collect` takes it.
        examples: those that are scored, as `collect` takes them.
        queries: the queries of each module, {point: tensor [Q, O, I], or a pair}, as `tlfast.Spec` takes them; or
            examples, the queries being their weight gradients at ``points``, which are computed first. One that
            `collect` would skip is an error.
        method: "dot", "cosine", "trackstar", or "ekfac", as of `tlfast.score`.
        points: the modules, as in `collect`; those of a mapping by default.
        k: how many examples for each query; None: the scores of all, in order.
        project: score projected gradients, as of `tlfast.Spec`; queries are of the projected shape then.
        bias: with the gradients of biases.
        mean: one query, the mean of the gradients of the query examples.
        non_finite: an example whose scores aren't finite, or whose norm is beyond what float32 can square: "skip"
            leaves it out and counts it (with ``per="token"`` such tokens alone), "stop" raises.
        out: a new file of numpy (.npy), which gets all scores: [queries, examples].
        settings: ``per="token"``: the best tokens of all examples; ``found.positions`` are theirs. ``moments``,
            ``damping`` and ``mix``, as of `tlfast.score`: of trackstar the second moments of the rows of
            ``Spec(points, of="weight", project=...)``, without which the examples go through the model twice; of ekfac
            `tlfast.Factors`, and gradients can't be projected then. And loss, batch_tokens, seq_len and the others of
            `collect` that say how the model is run; ``tokenizer``, for the texts of the result; ``progress``, called
            with the number of examples that are done.

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
    wanted = Wanted(points, project, bias, mean, settings.pop("per", "example"))
    way = Way(method, settings.pop("moments", None), settings.pop("damping", DAMPING), settings.pop("mix", 0.0))
    one_of(WHO, "non_finite", non_finite, ("skip", "stop"))
    check_arguments(method, k, {"moments": way.moments, "damping": way.damping, "mix": way.mix})
    _check_wanted(wanted, method, k, out)
    path = None if out is None else check_out(out)
    tokenizer, progress = settings.pop("tokenizer", None), settings.pop("progress", None)
    _check_points(model, queries, wanted, given_factors(way.moments) if method == "ekfac" else None)
    given, asked = _given(model, queries, wanted, settings)
    scoring = _whitened(given, wanted) if method == "trackstar" else _scored_in_backward(given, wanted, way)
    passes = Passes(WHO, model, examples, row_options(WHO, SETTINGS, scoring.specs, settings))
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
    scoring.prepare(passes, way, dtype)
    n_queries, n = count(given), len(passes.examples)
    n_rows = sum(passes.examples.lengths()) if wanted.per == "token" else n
    if k is None and path is None:
        check_room(n_queries, n, dtype)
    best = None if k is None else Best(n_queries, min(k, n_rows), torch.empty(0, dtype=dtype))
    every: InFile | InMemory | None = None
    with ExitStack() as files:
        if path is not None:
            every = files.enter_context(InFile(path, n_queries, n, dtype))
        elif k is None:
            every = InMemory(n_queries, n, dtype)
        takers: list[Taker] = [taker for taker in (best, every) if taker is not None]
        adding = _Adding(passes.examples, scoring, takers, dtype, non_finite == "stop", progress)
        passes.run(adding.take, adding.part_done)
    source = GivenExamples(passes.examples, tokenizer)
    more: dict[str, Any] = {"n_skipped": adding.n_skipped, "queries": None if asked is None else asked.ids}
    more["asked"] = None if asked is None or mean else GivenExamples(asked.examples, tokenizer)
    if best is not None:
        positions = best.positions if wanted.per == "token" else None
        return Scores(source, best.rows, best.scores, method, list(given), positions=positions, **more)
    assert every is not None
    return Scores(source, torch.arange(n).expand(n_queries, n), every.scores, method, list(given), is_all=True, **more)


def _check_wanted(wanted: Wanted, method: str, k: int | None, out: Any) -> None:
    """ValueError for what doesn't go together."""
    if method == "ekfac" and wanted.project is not None:
        rule = "be left out with ekfac"
        raise ValueError(
            broken_rule(WHO, "project", rule, repr(wanted.project), "The curvature is of whole gradients.")
        )
    one_of(WHO, "per", wanted.per, ("example", "token"))
    if wanted.per == "example":
        return
    if method == "trackstar":
        rule, remedy = 'be "example" with trackstar', "Its second moments are of whole examples: choose another method."
        raise ValueError(broken_rule(WHO, "per", rule, repr(wanted.per), remedy))
    odd = ("k", "None") if k is None else ("out", repr(os.fspath(out))) if out is not None else None
    if odd is not None:
        rule = f'be {"a number" if k is None else "left out"} with per="token"'
        remedy = 'tlfast.collect keeps the scores of all tokens: Spec(points, of="weight", queries=..., per="token").'
        raise ValueError(broken_rule(WHO, odd[0], rule, odd[1], remedy))


def _check_points(model: nn.Module, queries: Any, wanted: Wanted, factors: Factors | None) -> None:
    """ValueError for modules without such rows, or for factors of other weights than theirs."""
    if factors is not None:
        check_moments_of_model(factors.about, model)
    points: Any = list(queries) if wanted.points is None and isinstance(queries, Mapping) else wanted.points
    if not points:
        return  # which is refused by what makes the queries
    spec = Spec(points, of="weight", project=wanted.project, bias=wanted.bias, per=wanted.per)
    modules = weighted_modules(WHO, model, spec, find_points(WHO, model, points))
    for name, module in modules.items():
        check_weight_spec(WHO, name, module, spec)
    if factors is not None:
        check_factors(factors, {name: row_shape(find_layer(WHO, name, one), spec) for name, one in modules.items()})


def _given(
    model: nn.Module, queries: Any, wanted: Wanted, settings: Mapping[str, Any]
) -> tuple[dict[str, Query], QueryExamples | None]:
    """The queries by point; and the query examples, None where tensors were given."""
    if isinstance(queries, Mapping):
        if wanted.mean or not queries:
            rule, got = "be examples for mean=True", "tensors"
            if not queries:
                rule, got = "name a point at least", "an empty dict"
            raise ValueError(broken_rule(WHO, "queries", rule, got, "Give {point: tensor}, and take its mean."))
        return dict(queries), None
    if isinstance(queries, (str, os.PathLike, torch.Tensor, nn.Module, Readable)):
        rule, remedy = "be examples, or a mapping from points to tensors", "Of a dataset give {point: ds[column][:]}."
        raise TypeError(broken_rule(WHO, "queries", rule, type(queries).__name__, remedy))
    if wanted.points is None:
        remedy = "Name the modules whose gradients are compared."
        raise ValueError(broken_rule(WHO, "points", "be given where queries are examples", "None", remedy))
    spec = Spec(wanted.points, of="weight", project=wanted.project, bias=wanted.bias)
    options = row_options(WHO, SETTINGS, spec, {**settings, "bad_examples": "stop"})
    return gradients_of(model, queries, options, wanted.mean)


def _scored_in_backward(given: dict[str, Query], wanted: Wanted, way: Way) -> InBackward:
    """What makes scores where gradients are made; of ekfac the queries are multiplied with the inverse curvature."""
    if way.method == "ekfac":
        given = dict(given_factors(way.moments).precondition(as_tensors(given), damping_factor=way.damping))
    elif way.method == "cosine":
        given = divided(given, query_norms(given))
    points: Any = list(given) if wanted.points is None else wanted.points
    of_rows: dict[str, Any] = {"project": wanted.project, "bias": wanted.bias, "per": wanted.per}
    return InBackward(points, given, is_cosine=way.method == "cosine", **of_rows)


def _whitened(given: dict[str, Query], wanted: Wanted) -> Whitened:
    query_norms(given)  # none of zeros
    points: Any = list(given) if wanted.points is None else wanted.points
    return Whitened(points, as_tensors(given), project=wanted.project, bias=wanted.bias)


class _Adding:
    """Takes the scores of each batch, and gives them on in the order of the examples."""

    def __init__(
        self, examples: Sequence[Example], scoring: InBackward | Whitened, takers: Sequence[Taker],
        dtype: torch.dtype, stops: bool, progress: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        self._examples, self._scoring, self._takers, self._dtype = examples, scoring, takers, dtype
        self._stops, self._progress = stops, progress
        self._open: dict[int, torch.Tensor] = {}  # by example, its scores: [1 or tokens, Q]
        self.n_skipped = 0

    def take(self, numbers: Sequence[int], cap: Capture) -> None:
        """Take the scores of a batch."""
        scores, lengths = self._scoring.scores(cap)
        parts = scores.to(self._dtype).split([1] * len(numbers) if lengths is None else lengths)
        for number, part in zip(numbers, parts, strict=True):
            bad = ~part.isfinite().all(1)
            if bool(bad.any()):
                self._skip(number)
            self._open[number] = part.masked_fill(bad[:, None], torch.nan)

    def _skip(self, number: int) -> None:
        """Count an example with scores that aren't finite."""
        if self._stops:
            got, remedy = f"NaN or infinity for example {self._examples[number].id}", 'non_finite="skip" leaves it out.'
            raise FloatingPointError(broken_rule(WHO, "scores", "be finite", got, remedy))
        self.n_skipped += 1

    def part_done(self, start: int, stop: int) -> None:
        """Give the scores of some examples on."""
        parts = [self._open.pop(number) for number in range(start, stop)]
        scores = torch.cat(parts).T.contiguous()
        lengths = torch.tensor([len(part) for part in parts])
        rows = torch.arange(start, stop).repeat_interleave(lengths)
        positions = torch.cat([torch.arange(len(part)) for part in parts]) if self._scoring.per == "token" else None
        block = Block({}, rows, positions, stop - start)
        for taker in self._takers:
            taker.add(slice(0, len(scores)), scores, block)
        if self._progress is not None:
            self._progress(stop - start)
