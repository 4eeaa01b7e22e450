"""How rows are scored, by name: what becomes of queries and of rows before they are multiplied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import broken_rule
from ..hooks.factors import Factors
from ..spec import one_of
from .moments import check_sizes, given_moments, mixed, moments_of, opened_moments, whitening
from .queries import WHO, Queries, check_directions, check_moments_alike, check_whole

DAMPING = 0.1


class Asked(NamedTuple):
    """What a method may look at."""

    ds: Any
    queries: Queries
    moments: Any
    damping: float
    mix: float
    progress: Callable[[int], None] | None


class Prepared(NamedTuple):
    """What is scored: the dot product of a query with a row, each column's own matrix applied to the row first."""

    queries: dict[str, torch.Tensor]  # float64 [Q, values] by column
    maps: dict[str, torch.Tensor]  # float64 [values, values]: row @ map; {} leaves rows as they are
    is_cosine: bool  # whether it is divided by both norms, those over all columns


class Method(NamedTuple):
    """A way of scoring."""

    prepare: Callable[[Asked], Prepared]
    takes: tuple[str, ...] = ()  # which of the arguments moments, damping and mix it reads
    check: Callable[[Any, Queries], None] = lambda ds, queries: None  # before any row is read


def _dot(asked: Asked) -> Prepared:
    return Prepared(asked.queries.rows, {}, False)


def _cosine(asked: Asked) -> Prepared:
    return Prepared(asked.queries.rows, {}, True)


def _check_cosine(ds: Any, queries: Queries) -> None:
    check_directions(queries)


def _check_trackstar(ds: Any, queries: Queries) -> None:
    check_sizes(widths_of(queries))
    check_directions(queries)


def widths_of(queries: Queries) -> dict[str, int]:
    """How many values a row has in each column."""
    return {point: query.shape[1] for point, query in queries.rows.items()}


def _trackstar(asked: Asked) -> Prepared:
    """Rows and queries by the inverse root of the second moments, column by column; then their cosine."""
    rows, points = asked.queries.rows, asked.queries.points
    if asked.moments is None:
        moments = moments_of(asked.ds, points, asked.progress)
    else:
        sums = opened_moments(asked.moments)
        check_moments_alike(sums.about, *_said(asked))
        moments = given_moments(widths_of(asked.queries), sums)
    maps = whitening(mixed(moments, rows, asked.mix), asked.damping)
    return Prepared({point: query @ maps[point].to(query.device) for point, query in rows.items()}, maps, True)


def _ekfac(asked: Asked) -> Prepared:
    """Queries times the inverse of the curvature; then dot products."""
    factors = given_factors(asked.moments)
    check_whole(asked.ds, asked.queries.points)
    check_moments_alike(factors.about, *_said(asked))
    shapes = {point: tuple(asked.ds.column(point).row_shape) for point in asked.queries.points}
    modules = {point: asked.ds.sources[0].module_of(point) for point in shapes}
    check_factors(factors, {modules[point]: shape for point, shape in shapes.items()})
    made = {}
    for point, query in asked.queries.rows.items():
        given = {modules[point]: query.reshape(len(query), *shapes[point])}
        (ready,) = factors.precondition(given, damping_factor=asked.damping).values()
        made[point] = ready.flatten(1)
    return Prepared(made, {}, False)


def _said(asked: Asked) -> tuple[list[Any], dict[str, Any]]:
    """What is said of the rows, and their columns."""
    ds = asked.ds
    return [source.header for source in ds.sources], {point: ds.column(point) for point in asked.queries.points}


def given_factors(given: Any) -> Factors:
    """Factors, or those in their file; an error where there are none."""
    if isinstance(given, (str, os.PathLike)):
        return Factors.load(given)
    if not isinstance(given, Factors):
        got = "none" if given is None else type(given).__name__
        remedy = "Give moments=tlfast.factors(...), or their file."
        raise TypeError(broken_rule(WHO, "moments", 'be Factors with method="ekfac"', got, remedy))
    return given


def check_factors(factors: Factors, wanted: Mapping[str, Sequence[int]]) -> None:
    """ValueError unless there are eigenvectors, and factors of each of these modules with gradients of its shape."""
    if not factors.has_basis:
        raise ValueError(broken_rule(WHO, "moments", "have eigenvectors", "none", "Call eigen() first."))
    for module, shape in wanted.items():
        if module not in factors:
            rule, known = "have factors of each module that is scored", ", ".join(map(repr, factors.names[:8]))
            remedy = f"They have {known}{', ...' * (len(factors) > 8)}: name columns of these by points=."
            raise ValueError(broken_rule(WHO, "moments", rule, f"none of {module!r}", remedy))
        of = factors[module]
        if tuple(shape[-2:]) != (of.n_outputs, of.n_inputs):
            rule, got = f"be of gradients {list(shape[-2:])} at {module!r}", [of.n_outputs, of.n_inputs]
            raise ValueError(broken_rule(WHO, "moments", rule, got, "Say bias= alike where both are made."))


# A method is a line here: `docs/attribution.md` says what each computes.
METHODS = {
    "dot": Method(_dot),
    "cosine": Method(_cosine, check=_check_cosine),
    "trackstar": Method(_trackstar, ("moments", "damping", "mix"), _check_trackstar),
    "ekfac": Method(_ekfac, ("moments", "damping")),
}


def check_arguments(method: str, k: int | None, given: Mapping[str, Any]) -> None:
    """ValueError for a method or numbers that `score` refuses."""
    one_of(WHO, "method", method, tuple(METHODS))
    if k is not None and (type(k) is not int or k < 1):
        raise ValueError(broken_rule(WHO, "k", "be an int of at least 1, or None", repr(k), "None gives all scores."))
    plain = {"moments": None, "damping": DAMPING, "mix": 0.0}
    for name, value in given.items():
        if name not in METHODS[method].takes and value != plain[name]:
            others = ", ".join(other for other, entry in METHODS.items() if name in entry.takes)
            rule, got = f"be left out but with {others}", f"it with {method}"
            raise ValueError(broken_rule(WHO, name, rule, got, "Leave it out, or choose that method."))
    if method == "ekfac":
        given_factors(given["moments"])
    damping, mix = given["damping"], given["mix"]
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        remedy = "0.1 is a tenth of the mean eigenvalue."
        raise ValueError(broken_rule(WHO, "damping", "be a number above 0", repr(damping), remedy))
    if isinstance(mix, bool) or not isinstance(mix, (int, float)) or not 0 <= mix <= 1:
        remedy = "0 takes the rows' second moments alone."
        raise ValueError(broken_rule(WHO, "mix", "be a number from 0 to 1", repr(mix), remedy))
