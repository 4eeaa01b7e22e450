"""The bytes of a unit file: the safetensors layout, all offsets known from columns and unit alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from ..errors import DatasetError, dataset_error
from ..places.store import OpenFile
from .encodings import check_encoding, code_kind, scale_shape
from .plan import Unit

PAGE_BYTES = 4096  # the payload begins at a multiple of this: what O_DIRECT and mmap align to
MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer JSON

# The safetensors names of the dtypes that a row can have.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FIELD_DTYPE_NAMES = DTYPE_NAMES | {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}  # of codes too
CODES, SCALES = ":codes", ":scales"  # the fields of an encoded column are called by its name and these
MOST_OF = 64  # characters of what a column says it is of
WEIGHT = "weight"  # what a column is of whose rows are gradients of a module's weight, projected or not

Per = Literal["example", "token"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a CPU tensor's memory as integers of its value's size: numpy has no bfloat16, and no bit may change."""
    array: np.ndarray[Any, Any] = tensor.view(_INTEGERS[tensor.dtype.itemsize]).numpy()
    return array


class Field(NamedTuple):
    """One tensor of a unit file: what a row of it is, and whether each example or each token has one."""

    dtype: torch.dtype
    row_shape: tuple[int, ...]
    per: Per = "example"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * prod(self.row_shape)


class Column(NamedTuple):
    """What one row of a point is: ``Column(torch.float32, (768,))``, or the pair alone.

    Attributes:
        dtype: of the values that are read; of an encoded column float32.
        row_shape: shape of one row.
        of: what the values are: "grad", "act", "weight" (the gradient of a module's weight), or another short text.
        per: whether each example has a row, or each of its tokens.
        encoding: None, or how rows are stored: "int8" or "float8_e4m3fn" (a scale for each row), "int8:64" or "int4:64"
            (a scale for each 64 values); perhaps with ":stochastic" behind it.

    Example:
        >>> import torch
        >>> from tlfast.dataset import Column
        >>> Column(torch.float32, (768,), of="act", per="token", encoding="int8:64").row_bytes  # 768 codes, 12 scales
        816
    """

    dtype: torch.dtype
    row_shape: tuple[int, ...]
    of: str = "grad"
    per: Per = "example"
    encoding: str | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return sum(field.row_bytes for field in self.fields("").values())

    @property
    def is_plain(self) -> bool:
        """Whether version 1 of the format can hold it."""
        return (self.of, self.per, self.encoding) == ("grad", "example", None)

    @property
    def notes(self) -> str:
        """What people are told beside dtype and shape; nothing of a column as version 1 has it."""
        return notes_of(self.of, self.per, self.encoding)

    def fields(self, name: str) -> dict[str, Field]:
        """Return the tensors that hold a column of this name."""
        if self.encoding is None:
            return {name: Field(self.dtype, self.row_shape, self.per)}
        scales = Field(torch.float32, scale_shape(self.encoding, self.row_shape), self.per)
        return {name + CODES: Field(*code_kind(self.encoding, self.row_shape), self.per), name + SCALES: scales}


def notes_of(of: str = "grad", per: str = "example", encoding: str | None = None) -> str:
    """Return what people are told of a column beside dtype and shape: ``", act, per token, as int8"``."""
    said = [of] * (of != "grad") + ["per token"] * (per == "token") + [f"as {encoding}"] * (encoding is not None)
    return "".join(f", {note}" for note in said)


class Block(NamedTuple):
    """Where one field's rows lie in a unit file; ``start`` and ``stop`` count bytes from the start of the file."""

    field: Field
    start: int
    stop: int


def fields_of(columns: Mapping[str, Column]) -> dict[str, Field]:
    """Return the tensors of a unit file, in the order of the columns."""
    return {key: field for name, column in columns.items() for key, field in column.fields(name).items()}


def version_of(columns: Mapping[str, Column]) -> int:
    """Return the version of the format that these columns need: the first that can hold them."""
    return 1 if all(column.is_plain for column in columns.values()) else 2


def has_tokens(columns: Mapping[str, Column]) -> bool:
    """Whether some column has a row for each token."""
    return any(column.per == "token" for column in columns.values())


def check_columns(who: str, columns: Mapping[Any, Any]) -> dict[str, Column]:
    """Return ``columns`` as Column tuples; DatasetError for one that cannot be stored."""
    if not columns:
        raise dataset_error(who, "columns", "name at least one point", "none", "Check the points.")
    checked: dict[str, Column] = {}
    for name, given in columns.items():
        if not isinstance(given, (tuple, list)) or not 2 <= len(given) <= len(Column._fields):
            remedy = "Give the dtype and the shape of a row."
            raise dataset_error(who, f"column {name!r}", "be a pair or a Column", repr(given)[:80], remedy)
        column = Column(*given)
        if not isinstance(name, str) or name == "__metadata__" or not _is_utf8(name):
            raise dataset_error(who, "column name", "be valid text and not __metadata__", repr(name), "Rename it.")
        if column.dtype not in DTYPE_NAMES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_NAMES)
            raise dataset_error(who, f"dtype of {name!r}", f"be one of {known}", column.dtype, "Store as one of these.")
        shape: Any = column.row_shape
        if not isinstance(shape, (tuple, list)):  # torch.Size is a tuple
            remedy = f"Write ({shape},)." if type(shape) is int else "Give a tuple of ints."
            rule = "be a tuple, the shape of one row"
            raise dataset_error(who, f"shape of {name!r}", rule, repr(shape)[:80], remedy)
        if any(type(size) is not int or not 0 <= size < 2**48 for size in column.row_shape):
            rule = "be non-negative ints below 2**48"
            raise dataset_error(who, f"shape of {name!r}", rule, list(column.row_shape), "Check the spec.")
        checked[name] = column._replace(row_shape=tuple(column.row_shape))
        _check_kind(who, name, checked[name])
    _check_field_names(who, checked)
    return checked


def _check_kind(who: str, name: str, column: Column) -> None:
    of: Any = column.of
    if not isinstance(of, str) or not 1 <= len(of) <= MOST_OF or not of.isprintable() or not _is_utf8(of):
        rule, remedy = f"be 1 to {MOST_OF} printable characters", 'Say "grad", "act" or the like.'
        raise dataset_error(who, f"of of {name!r}", rule, repr(of)[:80], remedy)
    if column.per not in get_args(Per):
        rule, remedy = f"be one of {', '.join(get_args(Per))}", "Say which rows it has."
        raise dataset_error(who, f"per of {name!r}", rule, repr(column.per)[:80], remedy)
    wrong = check_encoding(who, name, column.dtype, column.row_shape, column.encoding)
    if wrong is not None:
        raise DatasetError(wrong)


def _check_field_names(who: str, columns: Mapping[str, Column]) -> None:
    """The fields of an encoded column may not have the name of another column."""
    for name, column in columns.items():
        for field in column.fields(name):
            if field != name and field in columns:
                rule = f"not be the name of a tensor of the encoded {name!r}"
                raise dataset_error(who, "column name", rule, repr(field), "Rename it.")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class UnitLayout:
    """A unit file's header (everything before the payload), its blocks in file order, and its size in bytes."""

    header: bytes
    blocks: dict[str, Block]
    n_bytes: int


def payload_spans(columns: Mapping[str, Column], n_rows: int, n_tokens: int = 0) -> dict[str, tuple[int, int]]:
    """Return where each field lies in the payload of a unit of ``n_rows`` and ``n_tokens``, in bytes, as in the file.

    Fields of wide dtypes come first (each value then lies at a multiple of its own size), otherwise in the order of
    the columns; blocks touch, as safetensors asks.
    """
    return _spans(fields_of(columns), n_rows, n_tokens)


def _spans(fields: Mapping[str, Field], n_rows: int, n_tokens: int) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, field in sorted(fields.items(), key=lambda item: -item[1].dtype.itemsize):
        start, end = end, end + (n_tokens if field.per == "token" else n_rows) * field.row_bytes
        spans[name] = start, end
    return spans


def unit_layout(columns: Mapping[str, Column], unit: Unit, n_tokens: int = 0) -> UnitLayout:
    """Return the layout of ``unit``'s file; equal arguments give equal bytes, always.

    Spaces behind the JSON bring the payload to a page boundary. ``n_tokens`` are those of the unit, where a column has
    a row for each.
    """
    version = str(version_of(columns))
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", "tlfast": version, "unit": unit.name, "first_example": str(unit.start)}
    }
    fields = fields_of(columns)
    spans = _spans(fields, len(unit), n_tokens)
    for name, span in spans.items():
        field = fields[name]
        entries[name] = {
            "dtype": FIELD_DTYPE_NAMES[field.dtype],
            "shape": [n_tokens if field.per == "token" else len(unit), *field.row_shape],
            "data_offsets": list(span),
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    payload = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    if payload - 8 > MAX_HEADER_BYTES:
        rule = f"fit a safetensors header of {MAX_HEADER_BYTES} bytes"
        raise dataset_error("unit_layout", "columns", rule, payload - 8, "Capture fewer points per dataset.")
    header = struct.pack("<Q", payload - 8) + text.ljust(payload - 8)
    blocks = {name: Block(fields[name], payload + start, payload + stop) for name, (start, stop) in spans.items()}
    return UnitLayout(header, blocks, payload + max(stop for _, stop in spans.values()))


def check_header(file: OpenFile, where: str, layout: UnitLayout, who: str) -> None:
    """Check that an open unit file has the size and begins with the header that its plan gives it.

    The plan fixes every byte of the header, so nothing in it has to be parsed, and no length, offset, dtype or shape
    that a file claims is ever believed.
    """
    remedy = "Run `tlfast verify --repair`, then resume."
    if file.size != layout.n_bytes:  # mapped, a shorter file would end the process by SIGBUS
        raise dataset_error(who, where, f"have {layout.n_bytes} bytes", file.size, remedy)
    found = file.read(0, len(layout.header))
    if found != layout.header:
        at = next((k for k, (a, b) in enumerate(zip(found, layout.header, strict=False)) if a != b), len(found))
        raise dataset_error(who, where, "begin with the header of its plan", f"another byte at {at}", remedy)
