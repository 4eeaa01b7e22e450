"""What a column holds, in words: which form of which place, how it was reduced, projected and stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ...globs import ForeignGlob, is_glob
from ...markup import shortened
from .encodings import told
from .layout import WEIGHT, Column

_OF = {
    "grad": "gradient",
    "act": "activation",
    "grad*act": "gradient times activation, element by element,",
    "grad*ref": "gradient times a reference, element by element,",
    WEIGHT: "weight gradient",
}
_REDUCED = {
    "sum": "sum over", "mean": "mean over", "last": "the last of", "norm": "L2 norm over",
    "absmax": "largest magnitude over",
}  # fmt: skip
_CALLS = {  # by the setting ``calls``
    "sum": "a module's calls added up",
    "last": "of a module's calls the last to fire",
    "stack": "a module's calls stacked, the first dimension",
}
# What a spec of `collect`, or of an import, says that words below tell, or that columns do.
_TOLD = {
    "points", "reduce", "over", "dtype", "output", "name", "of", "side", "ref", "heads", "at", "per", "encoding",
    "project", "bias", "queries", "normalizer", "summed",
}  # fmt: skip
_MOST = 200  # characters of a part of what is said


class Made(NamedTuple):
    """What made a column, as the header says it: an entry of its ``specs``, and the name of the module."""

    spec: Mapping[str, Any]
    point: str


class Meanings:
    """What the columns of a dataset hold, as far as its header says.

    Columns are called by their point, or by it and what tells one spec from another: ``h.3``, ``h.3:act``.

    Args:
        header: of the dataset; its ``specs`` say how the rows were made.
        about: of the dataset; it knows the sizes of two factors that lie side by side.

    Example:
        >>> import torch
        >>> from tlfast.dataset import Column
        >>> from tlfast.dataset.format.meaning import Meanings
        >>> spec = {"points": "h.*", "reduce": "mean", "over": [1], "of": "act"}
        >>> Meanings({"specs": [spec]}).holds("h.3:act", Column(torch.float32, (768,), of="act"))
        'activation at the output; mean over positions'
    """

    def __init__(self, header: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        specs = header.get("specs")
        self._specs = [_Spec(spec) for spec in specs if isinstance(spec, Mapping)] if isinstance(specs, list) else []
        self._calls, self._about = header.get("calls"), about or {}
        batching = header.get("batching")
        self._width = batching.get("width") if isinstance(batching, Mapping) else None

    def made_by(self, name: str, column: Column) -> Made | None:
        """Return what made a column; None where the header doesn't say, or where it could have been several."""
        labelled, plain = list[Made](), list[Made]()
        for spec in self._specs:
            if not spec.is_of(column):
                continue
            point = name[: -len(spec.label) - 1] if name.endswith(f":{spec.label}") else None
            if spec.said.get("summed") is True:
                if point == "gradients":
                    labelled.append(Made(spec.said, point))
            elif point is not None and spec.means(point):
                labelled.append(Made(spec.said, point))
            elif spec.is_plain and spec.means(name):
                plain.append(Made(spec.said, name))
        found = labelled or plain
        return found[0] if len(found) == 1 else None

    def keeps_positions(self, name: str, column: Column) -> bool:
        """Return whether the first dimension of an example's row is that of all its positions, padding included."""
        made, shape = self.made_by(name, column), tuple(column.row_shape)
        if made is None or column.per != "example" or column.of == WEIGHT:
            return False
        if type(self._width) is not int or shape[:1] != (self._width,):
            return False
        if "at" in made.spec or self._calls == "stack":  # a few of them, or a mask of each example; calls come first
            return False
        dims = _dims(made.spec)
        rank = 1 + len(shape) + len(dims)  # of the gradient, with heads as a dimension of their own
        return 1 not in {dim + rank if dim < 0 else dim for dim in dims}

    def first_factor(self, name: str, column: Column) -> int | None:
        """Return how many numbers the first of two factors has which a token's row is; None for other rows."""
        if column.of != WEIGHT:
            return None
        made = self.made_by(name, column)
        project = None if made is None else made.spec.get("project")
        dim = project.get("dim") if isinstance(project, Mapping) else None
        return factor_of(name, column, dim if type(dim) is int else None, self._about)

    def holds(self, name: str, column: Column) -> str:
        """Return in words what a column holds."""
        made = self.made_by(name, column)
        if made is None:
            said = [_OF.get(column.of, column.of).rstrip(",")]
            said += ["a row for each real token"] if column.per == "token" else []
        elif column.of == WEIGHT:
            said = list(_of_weight(column, made.spec, self.first_factor(name, column)))
        else:
            said = list(_of_place(column, made.spec))
        if made is not None:
            said += [_CALLS[self._calls]] if isinstance(self._calls, str) and self._calls in _CALLS else []
            others = sorted(str(key) for key in made.spec if key not in _TOLD)
            said += [f"also {', '.join(others)}: see the header"] if others else []
        said += [] if column.encoding is None else [told(column.encoding)]
        return "; ".join(shortened(text, _MOST) for text in said)


class _Spec:
    """An entry of ``specs``, and which columns are its: what is in it may be anything that JSON has."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.said, self.label = said, _label(said)
        self.is_plain = said.get("of", "grad") == "grad" and said.get("side", "output") == "output"
        patterns = _patterns(said)
        self._names = {pattern for pattern in patterns if not is_glob(pattern)}
        self._globs = [pattern for pattern in patterns if is_glob(pattern)]

    def is_of(self, column: Column) -> bool:
        """Whether its columns are of the kind of this one."""
        kind = (self.said.get("of", "grad"), self.said.get("per", "example"), self.said.get("encoding"))
        return kind == (column.of, column.per, column.encoding)

    def means(self, point: str) -> bool:
        """Whether its points mean a module, or the experts that this one is of."""
        around = [point, point.partition(".expert_")[0]] if self.said.get("of") == WEIGHT else [point]
        return any(name in self._names or any(_matches(glob, name) for glob in self._globs) for name in around)


@lru_cache(1 << 10)
def _glob(pattern: str) -> ForeignGlob | None:
    """A glob; None where no collection would take it."""
    try:
        return ForeignGlob(pattern)
    except ValueError:
        return None


@lru_cache(1 << 16)  # parts of a merged dataset ask the same of the same columns
def _matches(pattern: str, name: str) -> bool:
    glob = _glob(pattern)
    return glob is not None and glob.matches(name)


def _of_place(column: Column, spec: Mapping[str, Any]) -> Iterator[str]:
    """What is said of a row of a gradient, an activation or a product."""
    side = spec.get("side", "output")
    yield f"{_OF.get(column.of, column.of)} at the {side}"
    if spec.get("output") is not None:
        yield f"{side} {spec['output']!r} of the module"
    heads = _pair(spec.get("heads"))
    if heads is not None:
        yield f"the last dimension as {heads[0]} heads of {heads[1]}"
    at = spec.get("at")
    if isinstance(at, str):
        yield f"at the positions that the field {at!r} names"
    elif at is not None:
        several = isinstance(at, list)
        places = ", ".join(map(str, at)) if isinstance(at, list) else str(at)
        yield f"position{'s' * several} {places} of the real tokens"
    if column.per == "token":
        yield "a row for each real token"
    reduce, dims = str(spec.get("reduce")), _dims(spec)
    if (reduce, dims) == ("last", [1]):
        yield "the last real position"
    elif dims:
        yield f"{_REDUCED.get(reduce, reduce)} {_named(dims)}"
    elif column.per == "example":
        yield "not reduced"


def _of_weight(column: Column, spec: Mapping[str, Any], first: int | None) -> Iterator[str]:
    """What is said of a row of weight gradients; ``first``: the numbers of the first of two factors."""
    shape = list(column.row_shape)
    if spec.get("summed") is True:
        yield f"weight gradients of {_points(spec)} added up"
    else:
        yield f"weight gradient of each {column.per}"
    project, queries = spec.get("project"), spec.get("queries")
    if spec.get("bias") is True:
        is_matrix = project is None and queries is None and column.per == "example" and len(shape) == 2
        yield "with the bias" + ", the last column" * is_matrix
    heads = _pair(spec.get("heads"))
    if heads is not None:
        yield f"each of {heads[0]} heads apart"
    if spec.get("normalizer") is not None:
        yield "divided by the root of an optimizer's second moments"
    if isinstance(project, Mapping):
        yield from _projected(project)
    else:
        yield "not projected"
    if queries is not None:
        yield f"its dot products with {shape[0] if shape else 'some'} queries"
    elif spec.get("reduce") == "norm":
        yield "its norm"
    elif first is not None:
        yield f"as its two factors side by side, that of the outputs first: {first} numbers and {shape[0] - first}"


def factor_of(name: str, column: Column, dim: int | None, about: Mapping[str, Any]) -> int | None:
    """Return how many numbers the first of two factors has which rows of weights are, side by side.

    None for other rows: those of a norm are the token's own vector, and as many as ``dim`` where they are projected.
    """
    if column.per != "token" or len(column.row_shape) != 1:
        return None
    if dim is not None:
        return dim if tuple(column.row_shape) == (2 * dim,) else None
    said = about.get("factors")
    found = said.get(name) if isinstance(said, Mapping) else None
    return found if isinstance(found, int) and 0 < found < column.row_shape[0] else None


def _projected(project: Mapping[str, Any]) -> Iterator[str]:
    dim, scheme = project.get("dim"), project.get("scheme", "tlfast-1")
    one_sided = project.get("form") == "one-sided"
    yield f"projected to {dim}, R vec(G)" if one_sided else f"projected to {dim} a side, L G R^T"
    seed = project.get("seed", 0 if scheme == "tlfast-1" else "none")
    more = [f"{key} {value}" for key, value in project.items() if key not in ("dim", "kind", "seed", "scheme", "form")]
    yield ", ".join(map(str, [project.get("kind", "rademacher"), f"seed {seed}", scheme, *more]))


def _points(spec: Mapping[str, Any]) -> str:
    patterns = _patterns(spec)
    return ", ".join(patterns[:3]) + (f" and {len(patterns) - 3} more" if len(patterns) > 3 else "")


def _named(dims: list[int]) -> str:
    names = {0: "the batch", 1: "positions", -1: "the last dimension"}
    return " and ".join(names.get(dim, f"dimension {dim}") for dim in dims)


def _dims(spec: Mapping[str, Any]) -> list[int]:
    """The dimensions that a spec reduces; of what says none of it, none."""
    over = spec.get("over")
    found = [dim for dim in over if type(dim) is int] if isinstance(over, list) else []
    return [] if spec.get("reduce") in (None, "none") else found


def _pair(value: Any) -> tuple[int, int] | None:
    two = isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
    return (value[0], value[1]) if two else None


def _label(spec: Mapping[str, Any]) -> str:
    """What tells a spec's columns from another's at the same point: see `tlfast.Spec`."""
    of, name = spec.get("of", "grad"), spec.get("name")
    if name or (of == "grad" and spec.get("side", "output") == "output"):
        return str(name or spec.get("reduce"))
    kept = ["norm"] * (of == WEIGHT and spec.get("reduce") == "norm") + ["scores"] * (spec.get("queries") is not None)
    return ":".join(["input"] * (spec.get("side") == "input") + [str(of)] * (of != "grad") + kept)


def _patterns(spec: Mapping[str, Any]) -> list[str]:
    points = spec.get("points")
    given = [points] if isinstance(points, str) else points if isinstance(points, list) else []
    return [point for point in given if isinstance(point, str)]
