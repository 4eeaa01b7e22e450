"""What a unit is written from: the tensors of its fields, checked against its columns, and encoded where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import dataset_error
from ..format.encodings import ENCODED_DTYPES, STOCHASTIC, Encoded, encode, wrong_codes
from ..format.layout import CODES, SCALES, Column, Field, has_tokens
from ..format.norms import decoded_norms
from ..format.plan import Example, Unit
from ..format.rounding import Rounding, rounding_of


@dataclass(frozen=True)
class UnitContents:
    """The tensors of a unit by field, and how many tokens each of its examples has where some column counts them."""

    columns: Mapping[str, Column]
    fields: Mapping[str, torch.Tensor]
    token_counts: Sequence[int] | None

    @property
    def n_tokens(self) -> int | None:
        """The tokens of all examples; None where no column has a row for each."""
        return None if self.token_counts is None else sum(self.token_counts)

    @property
    def lengths(self) -> dict[str, Sequence[int]]:
        """How many rows each example has, for the fields that have one for each token."""
        counts = self.token_counts or ()
        return {
            field: counts
            for name, column in self.columns.items()
            if column.per == "token"
            for field in column.fields(name)
        }

    def norms(
        self, of_fields: Mapping[str, np.ndarray[Any, Any]], native: ModuleType | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the norm of each example by column, float32, where those of the fields are known."""
        return {name: self._norms(name, of_fields, native) for name in self.columns}

    def _norms(
        self, name: str, of_fields: Mapping[str, np.ndarray[Any, Any]], native: ModuleType | None
    ) -> np.ndarray[Any, Any]:
        column = self.columns[name]
        if column.encoding is None:
            return of_fields[name]
        stored = Encoded(self.fields[name + CODES].cpu(), self.fields[name + SCALES].cpu())
        return decoded_norms(stored, column, self.token_counts if column.per == "token" else None, native)


def unit_contents(
    who: str,
    columns: Mapping[str, Column],
    unit: Unit,
    tensors: Mapping[str, torch.Tensor | Encoded],
    examples: Sequence[Example],
    native: ModuleType | None = None,
) -> UnitContents:
    """Return what is to be written of ``tensors``; DatasetError where they are not the unit's.

    Args:
        who: whom errors name.
        columns: of the dataset.
        unit: whose rows they are.
        tensors: see DatasetWriter.write_unit.
        examples: of the unit; their lengths say how many tokens each has.
        native: what encodes rows on the CPU; None: torch does.
    """
    if set(tensors) != set(columns):
        odd = sorted(set(tensors) ^ set(columns))[:3]
        raise dataset_error(who, "tensors", "have the columns' names", f"a difference in {odd}", "Give every point.")
    counts = _token_counts(who, examples) if has_tokens(columns) else None
    fields: dict[str, torch.Tensor] = {}
    for name, column in columns.items():
        n = sum(counts or ()) if column.per == "token" else len(unit)
        rounding = None
        if column.encoding in STOCHASTIC:
            rounding = rounding_of(name, unit.start, (counts or ()) if column.per == "token" else [1] * n)
        fields |= _fields(who, name, column, n, tensors[name], native, rounding)
    return UnitContents(columns, fields, counts)


def _token_counts(who: str, examples: Sequence[Example]) -> list[int]:
    for example in examples:
        if type(example.length) is not int or example.length < 0:
            rule, remedy = "be the number of its tokens", "Count the rows that it has."
            raise dataset_error(who, f"length of example {example.id}", rule, repr(example.length), remedy)
    return [example.length for example in examples]


def _fields(
    who: str,
    name: str,
    column: Column,
    n: int,
    given: torch.Tensor | Encoded,
    native: ModuleType | None,
    rounding: Rounding | None,
) -> dict[str, torch.Tensor]:
    if column.encoding is None:
        if isinstance(given, Encoded):
            remedy = "Say so in its Column, or give the rows themselves."
            raise dataset_error(who, f"tensors[{name!r}]", "be of an encoded column", "codes and scales", remedy)
        _check(who, name, column, n, given, column.fields(name)[name])
        return {name: given}
    if not isinstance(given, Encoded):
        row = Field(column.dtype, column.row_shape, column.per)
        _check(who, name, column, n, given, row, ENCODED_DTYPES)
        given = encode(given.detach(), column.encoding, None, native, rounding and rounding.to(given.device))
    else:
        for part, (field, expected) in zip(given, column.fields(name).items(), strict=True):
            _check(who, field, column, n, part, expected)
        broken = wrong_codes(given, column.encoding, column.row_shape)
        if broken is not None:
            rule, got = broken
            raise dataset_error(
                who, f"tensors[{name!r}]", rule, got, "Give the rows themselves: they are encoded here."
            )
    return dict(zip(column.fields(name), given, strict=True))


def _check(
    who: str,
    name: str,
    column: Column,
    n: int,
    got: Any,  # a user's
    expected: Field,
    dtypes: Sequence[torch.dtype] = (),
) -> None:
    if not isinstance(got, torch.Tensor) or got.layout is not torch.strided or got.is_nested:
        kind = f"a tensor of layout {got.layout}" if isinstance(got, torch.Tensor) else f"a {type(got).__name__}"
        remedy = "Use .to_dense()." if isinstance(got, torch.Tensor) else "Use torch.stack or torch.as_tensor."
        raise dataset_error(who, f"tensors[{name!r}]", "be a dense torch.Tensor", kind, remedy)
    shape = (n, *expected.row_shape)
    if tuple(got.shape) != shape or got.dtype not in (dtypes or (expected.dtype,)):
        rule = f"be {expected.dtype} {list(shape)}"
        remedy = "Check the spec." if column.per == "example" else "Give a row for each token of each example's length."
        raise dataset_error(who, f"tensors[{name!r}]", rule, f"{got.dtype} {list(got.shape)}", remedy)
