"""JSON in the files of a dataset: one spelling to be hashed, and nothing ambiguous when it is read."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..errors import dataset_error


def canonical(value: Any) -> bytes:
    """Return ``value`` as JSON with one spelling: the bytes that are hashed."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical spelling of ``value``."""
    return hashlib.sha256(canonical(value)).hexdigest()


def checksum_of(value: dict[str, Any]) -> str:
    """SHA-256 of what a file says; "none", which no file holds, for what no writer of ours puts there."""
    try:
        return sha256_of(value)
    except (ValueError, RecursionError):  # 1e999 parses to infinity
        return "none"


def to_file(value: dict[str, Any]) -> bytes:
    """Return the bytes of a file that holds ``value`` and its checksum."""
    checked = value | {"checksum": checksum_of(value)}
    return (json.dumps(checked, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def parse_json(data: bytes, who: str, path: str) -> Any:
    """Parse JSON from a dataset's file; DatasetError for anything that is not plain, unambiguous JSON."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise dataset_error(who, path, "hold valid JSON", str(error)[:200], "Run `tlfast verify`.") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
