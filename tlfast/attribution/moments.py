"""Second moments of rows, and what makes rows of them that weigh each direction by how rare it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from ..errors import broken_rule
from ..hooks.running import RunningSums
from .pieces import read_pieces
from .queries import WHO

_SMALLEST = 2.0**-60  # of the root's diagonal: its inverse is used in float32
MOST_VALUES = 8192  # of a row, whose second moment is a matrix of 512 MiB in float64


def check_sizes(widths: Mapping[str, int]) -> None:
    """ValueError for a column, of so many values a row, whose second moment would fill the memory."""
    for point, width in widths.items():
        if width > MOST_VALUES:
            rule, got = f"have at most {MOST_VALUES} values a row for their second moments", f"{point!r} with {width}"
            raise ValueError(broken_rule(WHO, "points", rule, got, "Project rows: project=16."))


def opened_moments(moments: Any) -> RunningSums:
    """Return the sums that the user gives, or those in his file; TypeError for something else."""
    sums = RunningSums.load(moments) if isinstance(moments, (str, os.PathLike)) else moments
    if not isinstance(sums, RunningSums):
        got, remedy = type(moments).__name__, 'Make them by tlfast.running(..., stats="moment2_full").'
        raise TypeError(broken_rule(WHO, "moments", "be RunningSums or their file", got, remedy))
    return sums


def given_moments(widths: Mapping[str, int], sums: RunningSums, ending: str = "") -> dict[str, torch.Tensor]:
    """Return the second moments that sums have: float64 [D, D] by point.

    ``ending`` may stand behind the names that the sums have.
    """
    found = {}
    for point, width in widths.items():
        name = f"{point}{ending}" if f"{point}{ending}" in sums else point
        if name not in sums or not sums[name].n:
            remedy = "Name by points= those that they have; see moments.names."
            raise ValueError(broken_rule(WHO, "moments", "have rows of each point", f"none of {point!r}", remedy))
        if "moment2_full" not in sums.stats:
            got, remedy = ", ".join(sums.stats), 'Make them with stats="moment2_full".'
            raise ValueError(broken_rule(WHO, "moments", "have moment2_full", got, remedy))
        if prod(sums[name].shape) != width:
            rule, remedy = f"be of rows of {width} values at {point!r}", "They are of other columns."
            raise ValueError(broken_rule(WHO, "moments", rule, list(sums[name].shape), remedy))
        found[point] = sums[name].moment2_full.cpu()
    return found


def mixed(
    moments: Mapping[str, torch.Tensor], queries: Mapping[str, torch.Tensor], mix: float
) -> dict[str, torch.Tensor]:
    """Return the second moments with a part ``mix`` of those of the queries, float64 [Q, D] by point."""
    if not mix:
        return dict(moments)
    own = {point: query.cpu().T @ query.cpu() / len(query) for point, query in queries.items()}
    return {point: (1 - mix) * moment + mix * own[point] for point, moment in moments.items()}


def moments_of(ds: Any, points: Sequence[str], progress: Callable[[int], None] | None) -> dict[str, torch.Tensor]:
    """Return the second moments of a dataset's own rows, which are read once: float64 [D, D] by point."""
    sums = RunningSums("moment2_full", non_finite="skip")
    for piece, rows in read_pieces(ds, points, len(ds)):
        sums.add(rows)
        if progress is not None and piece.is_last:
            progress(piece.end - piece.first)
    return finite_moments(sums, points)


def finite_moments(sums: RunningSums, points: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the second moments that were added up; ValueError for a point without a finite row."""
    for point in points:
        if point not in sums or not sums[point].n:
            rule, got = "hold a finite row at each point", f"none at {point!r}"
            raise ValueError(broken_rule(WHO, "dataset", rule, got, "Name other points by points=."))
    return {point: sums[point].moment2_full for point in points}


def whitening(moments: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
    """Return W of each column, [D, D] float64, so that ``(x @ W) . (y @ W)`` is ``x^T (M + damping m I)^-1 y``.

    M is the second moment and m the mean of its eigenvalues. All of them are scaled by one number, which no direction
    of a row depends on.
    """
    means = {point: float(moment.trace()) / len(moment) for point, moment in moments.items()}
    for point, mean in means.items():
        if not mean > 0:
            rule, got = "have a second moment that isn't zero", repr(point)
            raise ValueError(broken_rule(WHO, "points", rule, got, "Leave it out: all its rows are zeros."))
    scale = sum(means.values()) / len(means)
    found = {}
    for point, moment in moments.items():
        damped = moment / scale
        damped.diagonal().add_(damping * means[point] / scale)
        lower, failed = torch.linalg.cholesky_ex(damped)  # the inverse is L^-T L^-1: no eigenvalues are needed
        if int(failed) or float(lower.diagonal().min()) < _SMALLEST:
            rule = f"make the second moments at {point!r} invertible"
            raise ValueError(broken_rule(WHO, "damping", rule, damping, "Give a larger one."))
        identity = torch.eye(len(lower), dtype=lower.dtype)
        found[point] = torch.linalg.solve_triangular(lower, identity, upper=False).T.contiguous()
    return found
