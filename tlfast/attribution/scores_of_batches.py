"""The scores of a batch of examples, of what a capture has of them: made in its backward, or of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..collecting.fingerprint import describe_model
from ..collecting.identity import describe_spec
from ..collecting.passes import Passes
from ..dataset.format.layout import WEIGHT, Column
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..hooks.experts import submodule
from ..hooks.layers import find_layer, row_shape
from ..hooks.running import RunningSums
from ..spec import Per, Points, Query, Spec
from .moments import check_sizes, finite_moments, given_moments, mixed, opened_moments, whitening
from .queries import WHO, check_moments_alike

_SAFE = 2.0**-50, 2.0**60  # norms whose squares, and those of their parts, are float32 numbers to the last bit


class Way(NamedTuple):
    """How examples are scored."""

    method: str
    moments: Any
    damping: float
    mix: float


def check_moments_of_model(
    about: Mapping[str, Any], model: nn.Module, specs: Sequence[Spec] = (), points: Iterable[str] = ()
) -> None:
    """ValueError where sums or factors say that they are of another model than this, or of other rows at its points."""
    if about:
        header = {"model": describe_model(model), "specs": [describe_spec(model, spec) for spec in specs]}
        columns = {f"{point}:{WEIGHT}": Column(torch.float32, (), WEIGHT) for point in points}
        check_moments_alike(about, [header], columns)


class InBackward:
    """Dot products with queries that are made in the backward.

    Args:
        points: the modules.
        given: the queries by module.
        is_cosine: divide by the gradients' norms; the queries' are 1 then.
        of_rows: bias, project and per of the specs.
    """

    def __init__(self, points: Points, given: Mapping[str, Query], *, is_cosine: bool, **of_rows: Any) -> None:
        self._is_cosine, self.per = is_cosine, of_rows["per"]
        self.specs = [Spec(points, of="weight", queries=given, **of_rows)]
        if is_cosine:
            self.specs.append(Spec(points, "norm", of="weight", **of_rows))

    def prepare(self, passes: Passes, way: Way, dtype: torch.dtype) -> None:
        """Nothing is needed of the examples first."""

    def scores(self, cap: Capture) -> tuple[torch.Tensor, Sequence[int] | None]:
        """The scores of a batch, float64 [rows, Q] on the host; and of tokens how many each example has."""
        by_kind = {"none": _Sum(), "norm": _Sum()}
        examples: torch.Tensor | None = None
        for column, (_, spec) in cap.wanted.items():
            if self.per == "token":
                own, _ = cap.where(column)
                if examples is not None and not torch.equal(own, examples):
                    rule, got = "have the same tokens at all points", f"others at {column!r}"
                    raise ValueError(broken_rule(WHO, "examples", rule, got, "Score these points apart."))
                examples = own
            rows = cap[column].to(torch.float64, copy=True)  # the capture writes the next batch where they lie
            by_kind[spec.reduce].add(rows if spec.reduce == "none" else rows.square())
        scores = by_kind["none"].total()
        if self._is_cosine:
            norms = by_kind["norm"].total().sqrt()[:, None]
            # Of what is larger or smaller the squares have left the range of float32; zeros are zeros in both.
            known = (norms > _SAFE[0]) & (norms < _SAFE[1]) | (norms == 0) & (scores == 0).all(1, keepdim=True)
            scores = torch.where(norms == 0, 0.0, scores / norms).masked_fill(~known, torch.nan)
        return scores, None if examples is None else examples.bincount(minlength=cap.rows).tolist()


class Whitened:
    """Cosines of rows and queries by the inverse root of the second moments of each module: "trackstar".

    Args:
        points: the modules.
        given: whole queries by module, [Q, *shape of a row].
        of_rows: bias and project of the specs.
    """

    per: Per = "example"

    def __init__(self, points: Points, given: Mapping[str, torch.Tensor], **of_rows: Any) -> None:
        self._shapes = {point: tuple(query.shape[1:]) for point, query in given.items()}
        self._queries = {point: query.double().flatten(1) for point, query in given.items()}
        check_sizes({point: query.shape[1] for point, query in self._queries.items()})
        self.specs = [Spec(points, of="weight", **of_rows)]

    def prepare(self, passes: Passes, way: Way, dtype: torch.dtype) -> None:
        """Have the second moments: those that are given, or those of all examples, which go through the model once."""
        widths = {point: query.shape[1] for point, query in self._queries.items()}
        self._check_rows(passes)
        if way.moments is None:
            sums = RunningSums("moment2_full", non_finite="skip")
            passes.run(lambda numbers, cap: sums.add(_rows(cap)), lambda start, stop: None)
            moments = finite_moments(sums, widths)
        else:
            sums = opened_moments(way.moments)
            check_moments_of_model(sums.about, passes.model, self.specs, list(widths))
            moments = given_moments(widths, sums, ":weight")
        maps = whitening(mixed(moments, self._queries, way.mix), way.damping)
        asked = {point: query.cpu() @ maps[point] for point, query in self._queries.items()}
        norms = torch.stack([query.square().sum(1) for query in asked.values()]).sum(0).sqrt()
        self._maps = {point: matrix.to(dtype) for point, matrix in maps.items()}
        self._asked = {point: (query / norms[:, None]).T.to(dtype) for point, query in asked.items()}

    def _check_rows(self, passes: Passes) -> None:
        """ValueError for queries of other points, or of rows of another shape."""
        wanted = dict(passes.enter(1, passes.specs).wanted.values())
        odd = next(
            (point for point in [*wanted, *self._shapes] if point not in self._shapes or point not in wanted), None
        )
        if odd is not None:
            got = f"{'queries' if odd in self._shapes else 'none'} at {odd!r}"
            remedy = "Leave points= out: a mapping names them."
            raise ValueError(broken_rule(WHO, "queries", "be of the points that are scored", got, remedy))
        for point, shape in self._shapes.items():
            expected = row_shape(find_layer(WHO, point, submodule(passes.model, point)), wanted[point])
            if shape != expected:
                rule = f"have the shape [Q, {', '.join(map(str, expected))}] at {point!r}"
                remedy = "Say project= and bias= as they were made."
                raise ValueError(broken_rule(WHO, "queries", rule, ["Q", *shape], remedy))

    def scores(self, cap: Capture) -> tuple[torch.Tensor, None]:
        """The scores of a batch, float64 [rows, Q] on the host."""
        rows = _rows(cap)
        largest = torch.stack([part.abs().amax(1).cpu() for part in rows.values()]).amax(0)  # squares stay in range
        largest = torch.where(largest > 0, largest, 1.0)[:, None]
        scores, squares = _Sum(), _Sum()
        for point, part in rows.items():
            turned = (part / largest.to(part)).to(self._maps[point].dtype) @ self._at(self._maps, point, part)
            scores.add((turned @ self._at(self._asked, point, part)).double())
            squares.add(torch.linalg.vector_norm(turned, dim=1).double().square())
        norms = squares.total().sqrt()[:, None]
        return torch.where(norms == 0, 0.0, scores.total() / norms), None

    def _at(self, matrices: dict[str, torch.Tensor], point: str, like: torch.Tensor) -> torch.Tensor:
        """A matrix, on the device of the rows from the first batch on."""
        if matrices[point].device != like.device:
            matrices[point] = matrices[point].to(like.device)
        return matrices[point]


def _rows(cap: Capture) -> dict[str, torch.Tensor]:
    """The rows of a batch by point, [rows, values], on each of their devices."""
    return {point: cap[column].flatten(1) for column, (point, _) in cap.wanted.items()}


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
