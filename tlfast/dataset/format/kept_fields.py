"""The fields of examples that a row table keeps: what each is called, and of what type its values are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import dataset_error, extra

# What a row table tells of each example anyway, or a reader or a condition under a name of its own.
TAKEN = (
    "id", "input_ids", "source", "start", "length", "flags", "norms", "tokens", "norm", "non_finite", "missing",
    "saturated",
)  # fmt: skip
TAKEN_BEGINNINGS = ("norm:", "grad:")
TYPES = ("int64", "float64", "bool", "string", "list<int64>", "list<float64>", "list<bool>")


def check_kept(who: str, fields: Any) -> dict[str, str]:
    """Return the types by name as they are stored; DatasetError for others."""
    if not isinstance(fields, Mapping):
        raise dataset_error(who, "fields", "be a mapping", type(fields).__name__, "Give names and types.")
    for name, kind in fields.items():
        if not isinstance(name, str) or not name or kind not in TYPES:
            rule = f"map names to {', '.join(TYPES)}"
            raise dataset_error(who, "fields", rule, f"{name!r}: {kind!r}", "Keep small values alone.")
        if name in TAKEN or name.startswith(TAKEN_BEGINNINGS):
            rule = f"have other names than {', '.join(TAKEN)}"
            raise dataset_error(who, "fields", rule, repr(name), "Give it another name.")
    return dict(fields)


def arrow_type(kind: str) -> Any:
    """Return the Arrow type of a field of this type."""
    pa = extra("pyarrow", "tlfast.dataset")
    if not kind.startswith("list<"):
        return getattr(pa, {"bool": "bool_"}.get(kind, kind))()
    element = arrow_type(kind.removeprefix("list<").removesuffix(">"))
    return pa.list_(pa.field("element", element, nullable=False))
