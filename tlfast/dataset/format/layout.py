"""The bytes of a unit file: the safetensors layout, all offsets known from columns and unit alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import dataset_error
from ..places.store import OpenFile
from .plan import Unit

PAGE_BYTES = 4096  # the payload begins at a multiple of this: what O_DIRECT and mmap align to
MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer JSON

# The safetensors names of the dtypes that a row can have.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a CPU tensor's memory as integers of its value's size: numpy has no bfloat16, and no bit may change."""
    array: np.ndarray[Any, Any] = tensor.view(_INTEGERS[tensor.dtype.itemsize]).numpy()
    return array


class Column(NamedTuple):
    """What one row of a point is: its stored dtype and its shape."""

    dtype: torch.dtype
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * prod(self.row_shape)


class Block(NamedTuple):
    """Where one column's rows lie in a unit file; ``start`` and ``stop`` count bytes from the start of the file."""

    column: Column
    start: int
    stop: int


def check_columns(who: str, columns: Mapping[Any, Any]) -> dict[str, Column]:
    """Return ``columns`` as Column tuples; DatasetError for a name, dtype or shape that cannot be stored."""
    if not columns:
        raise dataset_error(who, "columns", "name at least one point", "none", "Check the points.")
    checked: dict[str, Column] = {}
    for name, (dtype, row_shape) in columns.items():
        if not isinstance(name, str) or name == "__metadata__" or not _is_utf8(name):
            raise dataset_error(who, "column name", "be valid text and not __metadata__", repr(name), "Rename it.")
        if dtype not in DTYPE_NAMES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_NAMES)
            raise dataset_error(who, f"dtype of {name!r}", f"be one of {known}", dtype, "Store as one of these.")
        if any(type(size) is not int or not 0 <= size < 2**48 for size in row_shape):
            rule = "be non-negative ints below 2**48"
            raise dataset_error(who, f"shape of {name!r}", rule, list(row_shape), "Check the spec.")
        checked[name] = Column(dtype, tuple(row_shape))
    return checked


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


def payload_spans(columns: Mapping[str, Column], n_rows: int) -> dict[str, tuple[int, int]]:
    """Return where each column lies in the payload of a unit of ``n_rows``, in bytes; the order is the file's.

    Columns of wide dtypes come first (each value then lies at a multiple of its own size), otherwise in the given
    order; blocks touch, as safetensors asks.
    """
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, column in sorted(columns.items(), key=lambda item: -item[1].dtype.itemsize):
        start, end = end, end + n_rows * column.row_bytes
        spans[name] = start, end
    return spans


def unit_layout(columns: Mapping[str, Column], unit: Unit) -> UnitLayout:
    """Return the layout of ``unit``'s file; two equal arguments give equal bytes, always.

    Spaces behind the JSON bring the payload to a page boundary.
    """
    entries: dict[str, Any] = {
        "__metadata__": {"format": "pt", "tlfast": "1", "unit": unit.name, "first_example": str(unit.start)}
    }
    spans = payload_spans(columns, len(unit))
    for name, span in spans.items():
        column = columns[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[column.dtype],
            "shape": [len(unit), *column.row_shape],
            "data_offsets": list(span),
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    payload = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    if payload - 8 > MAX_HEADER_BYTES:
        rule = f"fit a safetensors header of {MAX_HEADER_BYTES} bytes"
        raise dataset_error("unit_layout", "columns", rule, payload - 8, "Capture fewer points per dataset.")
    header = struct.pack("<Q", payload - 8) + text.ljust(payload - 8)
    blocks = {name: Block(columns[name], payload + start, payload + stop) for name, (start, stop) in spans.items()}
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
