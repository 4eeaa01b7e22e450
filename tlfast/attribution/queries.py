"""Queries of a scoring: rows of another dataset or tensors by column, checked against the dataset that is scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from os import PathLike
from typing import Any, NamedTuple

import torch

from ..dataset import open_dataset
from ..dataset.format.layout import WEIGHT, Column
from ..dataset.format.meaning import Meanings
from ..dataset.read.search import check_alike, flat_queries
from ..dataset.read.views import Readable
from ..errors import broken_rule
from ..hooks.points import match_names

WHO = "score"
_STORED = ("points", "name", "dtype", "encoding")  # of a spec: what makes no other numbers of a row
# What a spec, or an import, says of rows that aren't whole gradients.
_NOT_WHOLE = ("project", "normalizer", "normalized", "preprocessed", "summed", "heads", "queries")


class Queries(NamedTuple):
    """The queries of all points that are scored."""

    rows: dict[str, torch.Tensor]  # by point, in the order of the dataset: float64 [Q, values of a row]
    source: Any  # the dataset or view that they are of, or None

    @property
    def points(self) -> list[str]:
        """The columns whose scores are added up."""
        return list(self.rows)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


def check_directions(queries: Queries) -> None:
    """ValueError for a query of zeros, which points nowhere."""
    there = torch.stack([(rows != 0).any(1) for rows in queries.rows.values()]).any(0)
    if not bool(there.all()):
        got = f"zeros alone in query {int((~there).nonzero()[0])}"
        raise ValueError(broken_rule(WHO, "queries", "have a direction", got, "Leave it out."))


def opened(argument: str, given: Any) -> Any:
    """Return a dataset or view, opened where its path was given."""
    if isinstance(given, Readable):
        return given
    if isinstance(given, (str, PathLike)):
        return open_dataset(given)
    got, remedy = type(given).__name__, "Give the path of one, or open it."
    raise TypeError(broken_rule(WHO, argument, "be a dataset", got, remedy))


def chosen_queries(ds: Any, queries: Any, points: str | Iterable[str] | None) -> Queries:
    """Return the queries of each point that both sides have, or of those that are named; an error for bad ones."""
    named: list[Any] | None = None if points is None else [points] if isinstance(points, str) else list(points)
    wanted = None if named is None else match_names(WHO, ds.points, named)
    if isinstance(queries, Mapping):
        return _of_tensors(ds, dict(queries), wanted)
    source = opened("queries", queries)
    names = _shared(ds, source, wanted)
    _check_same_kind(ds, source)
    for name in names:
        _check_same_spec(ds, source, name)
    if not len(source):
        raise ValueError(broken_rule(WHO, "queries", "hold a row at least", "none", "Select some rows."))
    for name in names:
        ours, theirs = (list(side.column(name).row_shape) for side in (ds, source))
        if ours != theirs:
            rule, remedy = f"have rows of shape {ours} at {name!r}, as the dataset", "Name other points by points=."
            raise ValueError(broken_rule(WHO, "queries", rule, theirs, remedy))
        if source.column(name).per != "example":
            rule, remedy = f"have a row for each example at {name!r}", "Give tensors by column."
            raise ValueError(broken_rule(WHO, "queries", rule, "one per token", remedy))
    rows = {}
    for name in names:
        found = source[name][:]
        good = found.reshape(len(found), -1).isfinite().all(1)
        if not bool(good.all()):
            got = f"NaN or infinity at {name!r} in row {int((~good).nonzero()[0])} of the queries"
            remedy = 'Leave it out: queries.filter("not non_finite").'
            raise ValueError(broken_rule(WHO, "queries", "be finite", got, remedy))
        rows[name] = _flat(ds, name, found)
    return Queries(rows, source)


def _of_tensors(ds: Any, named: dict[str, Any], wanted: list[str] | None) -> Queries:
    if not named:
        raise ValueError(broken_rule(WHO, "queries", "name a column at least", "an empty dict", "Give its rows."))
    for name in named:
        ds.column(name)  # KeyError for one that there isn't
    unused = [name for name in named if wanted is not None and name not in wanted]
    absent = [name for name in wanted or () if name not in named]
    if unused or absent:
        got = f"queries at {unused[0]!r}" if unused else f"no queries at {absent[0]!r}"
        remedy = "Leave points out: the dict names them."
        raise ValueError(broken_rule(WHO, "points", "name what the queries are of", got, remedy))
    names = [name for name in ds.points if name in named]
    check_columns(ds, names, by_name=True)
    check_alike(WHO, named)
    rows = {name: _flat(ds, name, named[name]) for name in names}
    if not len(next(iter(rows.values()))):
        raise ValueError(broken_rule(WHO, "queries", "hold a row at least", "none", "Give one as queries[None]."))
    return Queries(rows, None)


def _flat(ds: Any, name: str, rows: Any) -> torch.Tensor:
    return flat_queries(WHO, name, ds.column(name).row_shape, rows)


def _shared(ds: Any, source: Any, wanted: list[str] | None) -> list[str]:
    names = [name for name in ds.points if name in source] if wanted is None else wanted
    absent = [name for name in names if name not in source]
    if absent:
        remedy = "Name points that both have."
        raise ValueError(broken_rule(WHO, "points", "be of the queries too", repr(absent[0]), remedy))
    if not names:
        got = f"{', '.join(map(repr, source.points[:3]))}, where the dataset has {', '.join(map(repr, ds.points[:3]))}"
        rule, remedy = "share a column with the dataset", "Collect them with the same points."
        raise ValueError(broken_rule(WHO, "queries", rule, got, remedy))
    check_columns(ds, names, by_name=wanted is not None)
    return names


def check_columns(ds: Any, names: list[str], by_name: bool) -> None:
    """ValueError for columns whose rows can't be laid behind each other, or not unless somebody says so."""
    for name in names:
        column = ds.column(name)
        if column.per != "example":
            rule, remedy = "have a row for each example", "Leave it out; ds.search finds tokens."
            raise ValueError(broken_rule(WHO, "points", rule, f"{name!r}, per token", remedy))
        if not prod(column.row_shape):
            rule, got = "have a value in each row", f"{name!r} of shape {list(column.row_shape)}"
            raise ValueError(broken_rule(WHO, "points", rule, got, "Leave it out."))
    kinds = dict.fromkeys(_kind(ds, name) for name in names)
    if len(kinds) > 1 and not by_name:
        rule, got = "be named where columns are of several kinds", f"none with {', '.join(kinds)}"
        raise ValueError(broken_rule(WHO, "points", rule, got, 'Say which are added up: points=["..."].'))


def _kind(ds: Any, name: str) -> str:
    """Which quantity a column has: a norm, or products with queries, isn't added to products of rows."""
    of, spec = str(ds.column(name).of), ds.sources[0].made_by(name) or {}
    if spec.get("queries") is not None:
        return f"scores of {of}"
    return f"{spec['reduce']} of {of}" if spec.get("reduce") in ("norm", "absmax") else of


def _check_same_kind(ds: Any, source: Any) -> None:
    """ValueError where two datasets say that they are of different weights, or keep other things of them."""
    for what, said in (("the model", _weights), ("the specs", _specs)):
        ours, theirs = said(ds), said(source)
        if ours and theirs and ours.isdisjoint(theirs):
            rule, got = f"be of {what} of the dataset", "another" if what == "the model" else "others"
            remedy = "Collect them alike; or give tensors, {point: queries[point][:]}, to score them all the same."
            raise ValueError(broken_rule(WHO, "queries", rule, got, remedy))


def _check_same_spec(ds: Any, source: Any, name: str) -> None:
    """ValueError where two datasets say that a column of one name is of other numbers: another seed or reduction."""
    odd = _differing(part.made_by(name) for side in (ds, source) for part in side.sources)
    if odd:
        rule = f"be made as the dataset's rows at {name!r}"
        remedy = "Collect them alike; or give tensors, {point: queries[point][:]}, to score them all the same."
        raise ValueError(broken_rule(WHO, "queries", rule, f"another {', '.join(odd)}", remedy))


def _differing(made: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """By which keys specs that made a column differ from the first, but for what makes no other numbers."""
    known = [{key: value for key, value in spec.items() if key not in _STORED} for spec in made if spec is not None]
    return sorted({key for spec in known[1:] for key in {*spec, *known[0]} if spec.get(key) != known[0].get(key)})


def check_moments_alike(
    about: Mapping[str, Any], headers: Iterable[Mapping[str, Any]], columns: Mapping[str, Column]
) -> None:
    """ValueError where sums say that they are of other weights than rows, or of rows that were made in another way.

    ``about`` is what the sums say of themselves, ``headers`` what is said of the rows, ``columns`` those of these.
    """
    said = [about, *headers]
    ours, theirs = _fingerprints(said[1:]), _fingerprints(said[:1])
    remedy = "Make them of the same model and specs; moments.about.clear() takes them all the same."
    if ours and theirs and ours.isdisjoint(theirs):
        raise ValueError(broken_rule(WHO, "moments", "be of the model of the rows", "another", remedy))
    if "specs" not in about:
        return
    meanings = [Meanings(header) for header in said]
    for name, column in columns.items():
        summed = column._replace(encoding=None)  # what is summed isn't encoded, as rows may be
        of_sums, made = meanings[0].made_by(name, summed), [one.made_by(name, column) for one in meanings[1:]]
        odd = [] if of_sums is None else _differing(one and one.spec for one in (of_sums, *made))
        if of_sums is None and meanings[0].made_by(name, summed._replace(per="token")) is not None:
            odd = ["per"]
        if odd:
            rule, got = f"be made as the rows at {name!r}", f"another {', '.join(odd)}"
            raise ValueError(broken_rule(WHO, "moments", rule, got, remedy))


def check_whole(ds: Any, names: Iterable[str]) -> None:
    """ValueError for columns that say that they are no weight gradients, or not these as they are."""
    for name in names:
        for part in ds.sources:
            spec = part.made_by(name)
            if spec is None:
                continue
            of = str(spec.get("of", "grad"))
            odd = [f"rows of {of}"] if of != WEIGHT else [key for key in _NOT_WHOLE if key in spec]
            if odd:
                rule, got = "be whole weight gradients with ekfac", f"{odd[0]} at {name!r}"
                remedy = 'The curvature is of these: collect with of="weight" alone, or take trackstar.'
                raise ValueError(broken_rule(WHO, "points", rule, got, remedy))


def _weights(ds: Any) -> set[str]:
    return _fingerprints(source.header for source in ds.sources)


def _fingerprints(headers: Iterable[Mapping[str, Any]]) -> set[str]:
    models = [header.get("model") for header in headers]
    return {str(model["fingerprint"]) for model in models if isinstance(model, Mapping) and "fingerprint" in model}


def _specs(ds: Any) -> set[str]:
    specs = [source.header.get("specs") for source in ds.sources]
    return {
        json.dumps({key: value for key, value in spec.items() if key not in _STORED}, sort_keys=True)
        for some in specs
        if isinstance(some, list)
        for spec in some
        if isinstance(spec, dict)
    }
