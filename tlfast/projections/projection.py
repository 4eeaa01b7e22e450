"""What a projection is: its size, its kind, and the matrix of each module and side, which nothing else decides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from operator import index
from typing import Any, Literal, cast, get_args

import torch

from ..errors import broken_rule, one_of
from . import entries
from .philox import Key, key_of
from .sketches import CountSketch, HadamardSketch

Kind = Literal["rademacher", "normal", "count-sketch", "hadamard"]
Scheme = Literal["tlfast-1", "bergson-2"]
Form = Literal["two-sided", "one-sided"]
Role = Literal["left", "right", "single"]
ROLES = {"two-sided": ("left", "right"), "one-sided": ("single",)}

MOST_SKETCHED = 2**20  # rows of a sketch: a block of columns has as many, and lies in a cache where that is to be fast
MOST_ROWS, MOST_COLUMNS = 2**31 - 1, 2**32  # a counter has 32 bits for the row, and for the block of a sketch
# Entries of a column block of bergson's one-sided matrix, which has an identifier of its own.
BERGSON_BLOCK = 2**27


@dataclass(frozen=True)
class Projection:
    """Which random matrices make weight gradients small; the same bits on every machine, for ever.

    The weight gradient G [O, I] of a module becomes L G R^T [dim, dim], or R vec(G) [dim], with vec row-major. L, R and
    the single R depend on this object, the module's name and the side alone, not on a device, a batch or an order. The
    page docs/projections.md defines every bit.

    Args:
        dim: rows of each matrix. A row of a dataset then has dim * dim numbers per module, or dim if one-sided.
        kind: dense matrices, "rademacher", entries +1 and -1, or "normal", standard normal entries; or sketches, which
            cost additions alone and a few for each number: "count-sketch", or "hadamard", which is as good as dense
            signs.
        seed: another number gives other matrices. None is 0; by the scheme "bergson-2" it is bergson's own default,
            which has no seed in its identifiers.
        scheme: "tlfast-1", or "bergson-2": the matrices of bergson 2.5, signs to the bit and normal entries to 1e-6 of
            their size, so that its stores and ours can be compared row by row.
        form: "two-sided", a left matrix for outputs and a right one for inputs; or "one-sided", a single one for the
            whole gradient. One-sided rows of several modules may be added up, which is one projection of them all.
        nonzeros: of each column of a count sketch; dim is a multiple of it. More make large errors rarer
            and cost as much more.

    Raises:
        ValueError, TypeError: for settings that make no matrix.

    Example:
        >>> import tlfast
        >>> projection = tlfast.Projection(4)
        >>> projection.matrix("h.0.mlp.c_fc", "right", 6).shape, projection.scale
        (torch.Size([4, 6]), 0.5)
        >>> tlfast.Projection(16, "normal", seed=1).describe()
        {'dim': 16, 'kind': 'normal', 'seed': 1}
    """

    dim: int
    kind: Kind = "rademacher"
    seed: int | None = None
    scheme: Scheme = "tlfast-1"
    form: Form = "two-sided"
    nonzeros: int = 1

    def __post_init__(self) -> None:
        who = "Projection"
        object.__setattr__(self, "dim", whole_number(who, "dim", self.dim, 1, MOST_ROWS))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole_number(who, "seed", self.seed))
        one_of(who, "kind", self.kind, get_args(Kind))
        one_of(who, "scheme", self.scheme, get_args(Scheme))
        one_of(who, "form", self.form, get_args(Form))
        object.__setattr__(self, "nonzeros", whole_number(who, "nonzeros", self.nonzeros, 1, MOST_ROWS))
        self._check_together(who)

    def _check_together(self, who: str) -> None:
        """ValueError for settings of which one doesn't go with the other."""
        if self.scheme == "bergson-2" and self.is_sketch:
            rule, remedy = 'be rademacher or normal with scheme="bergson-2"', 'Leave scheme= out: "tlfast-1" has all.'
            raise ValueError(broken_rule(who, "kind", rule, repr(self.kind), remedy))
        if self.nonzeros != 1 and self.kind != "count-sketch":
            rule, remedy = 'be left out unless kind="count-sketch"', "Leave it out: other matrices are full."
            raise ValueError(broken_rule(who, "nonzeros", rule, self.nonzeros, remedy))
        if self.dim % self.nonzeros:
            rule, remedy = f"divide dim={self.dim}", "Pass a divisor: each part has as many rows."
            raise ValueError(broken_rule(who, "nonzeros", rule, self.nonzeros, remedy))
        if self.is_sketch and self.dim > MOST_SKETCHED:
            rule, remedy = f"be at most {MOST_SKETCHED} in a sketch", "Take fewer, or a dense kind."
            raise ValueError(broken_rule(who, "dim", rule, self.dim, remedy))

    @property
    def is_sketch(self) -> bool:
        """Whether it is applied without its matrix."""
        return self.kind in ("count-sketch", "hadamard")

    @property
    def roles(self) -> tuple[Role, ...]:
        """The matrices that a module has: ("left", "right") or ("single",)."""
        return cast("tuple[Role, ...]", ROLES[self.form])

    @property
    def scale(self) -> float:
        """What one matrix is multiplied with, so that it keeps squared lengths on average.

        1 / sqrt(dim); 1 / sqrt(nonzeros) of a count sketch.
        """
        return 1 / math.sqrt(self.nonzeros if self.kind == "count-sketch" else self.dim)

    @property
    def row_scale(self) -> float:
        """What the numbers of a row are multiplied with in all: the square of ``scale`` where both are projected."""
        squared = self.nonzeros if self.kind == "count-sketch" else self.dim
        return 1 / squared if self.form == "two-sided" else self.scale

    def matrix(self, module: str, role: Role, columns: int, start: int = 0) -> torch.Tensor:
        """The matrix of one side of a module, before it is scaled.

        Args:
            module: the module's name, as ``named_modules`` has it.
            role: "left" (outputs), "right" (inputs), or "single" if one-sided.
            columns: how many columns to make.
            start: the first of these. Any range has the same numbers as in the whole matrix.

        Returns:
            float32 [dim, columns] on the CPU: +1 and -1 (and 0 in a count sketch), or standard normal numbers.
            Multiplied with ``scale`` it is the projection.

        Raises:
            ValueError, TypeError: for a role that this form hasn't, and for columns that can't be.
        """
        who = "Projection.matrix"
        check_side(who, self, module, role)
        start = whole_number(who, "start", start, 0, MOST_COLUMNS)
        columns = whole_number(who, "columns", columns, 0, MOST_COLUMNS - start)
        if self.is_sketch:
            extra = start % self.block_width  # a sketch is made of whole blocks
            return torch.from_numpy(self.sketch(module, role, columns + extra, start - extra).matrix()[:, extra:])
        made = torch.empty(self.dim, columns)
        for key, first, last, shift in self._blocks(module, role, start, start + columns):
            if self.kind == "normal":
                block = entries.normals(key, self.dim, first - shift, last - shift, self.scheme == "bergson-2")
            else:
                block = entries.signs(key, self.dim, first - shift, last - shift)
            made[:, first - start : last - start] = torch.from_numpy(block)
        return made

    @property
    def block_width(self) -> int:
        """Columns of one block of a sketch."""
        return self.dim // self.nonzeros if self.kind == "count-sketch" else 1 << (self.dim - 1).bit_length()

    def sketch(self, module: str, role: Role, columns: int, start: int = 0) -> CountSketch | HadamardSketch:
        """What applies a sketch without its matrix, from the first column of a block on."""
        ((key, first, last, _),) = self._blocks(module, role, start, start + columns)
        if self.kind == "count-sketch":
            return CountSketch.make(key, self.dim, self.nonzeros, first, last)
        return HadamardSketch.make(key, self.dim, first, last)

    def _blocks(self, module: str, role: Role, start: int, stop: int) -> Iterator[tuple[Key, int, int, int]]:
        """(key, first column, the one after the last, column that counts as 0) of each block of a range of columns."""
        if self.scheme == "tlfast-1":
            yield key_of(f"tlfast-1/{self.seed or 0}/{role}/{module}", "sha256"), start, stop, 0
            return
        name = f"{module}/{role}" + ("" if self.seed is None else f"/seed{self.seed}")
        if role != "single":
            yield key_of(name, "md5"), start, stop, 0
            return
        wide = max(1, BERGSON_BLOCK // self.dim)
        for shift in range(start - start % wide, stop, wide):
            yield key_of(f"{name}/{shift}", "md5"), max(start, shift), min(stop, shift + wide), shift

    def describe(self) -> dict[str, Any]:
        """The settings that aren't the defaults, and dim, as JSON has them: what an identity holds of a projection.

        A seed of 0 is the default of the scheme "tlfast-1".
        """
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.scheme == "tlfast-1":
            said["seed"] = self.seed or None
        return {field.name: said[field.name] for field in fields(self) if said[field.name] != field.default}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> Projection:
        """The projection that ``describe`` has described.

        Raises:
            ValueError, TypeError: for what describes none.
        """
        names = [field.name for field in fields(cls)]
        for name in described:
            if name not in names:
                rule, remedy = f"be among {', '.join(names)}", "It was written by a later version, or by hand."
                raise ValueError(broken_rule("Projection.from_json", "a setting", rule, repr(name), remedy))
        if "dim" not in described:
            got = dict(described)
            raise ValueError(broken_rule("Projection.from_json", "described", "say dim", got, "Add it."))
        return cls(**described)


def as_projection(who: str, given: Projection | int) -> Projection:
    """The projection meant by ``project=16`` or by itself; TypeError or ValueError for anything else."""
    if isinstance(given, Projection):
        return given
    return Projection(whole_number(who, "project", given, 1, MOST_ROWS, "a Projection, or "))


def check_side(who: str, projection: Projection, module: object, role: object) -> None:
    """TypeError or ValueError for a module that has no name, or a role that the projection's form hasn't."""
    if not isinstance(module, str):
        got = type(module).__name__
        raise TypeError(broken_rule(who, "module", "be a module's name", got, "Pass its name in named_modules()."))
    if role not in projection.roles:
        rule = f"be {' or '.join(projection.roles)} of a {projection.form} projection"
        raise ValueError(broken_rule(who, "role", rule, repr(role), "Pass one of these, or make another Projection."))


def whole_number(
    who: str, argument: str, given: object, least: int | None = None, most: int | None = None, otherwise: str = ""
) -> int:
    """A whole number in a range; TypeError or ValueError for anything else."""
    span = "" if least is None or most is None else f" from {least} to {most}"
    rule = f"be {otherwise}a whole number{span}"
    try:
        if isinstance(given, (bool, torch.Tensor)):
            raise TypeError
        number = index(cast(Any, given))
    except TypeError:
        raise TypeError(broken_rule(who, argument, rule, repr(given), "Pass an int.")) from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(broken_rule(who, argument, rule, number, "Pass a number in this range."))
    return number
