"""merged.json: a dataset that consists of other datasets, which stay where they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DatasetError, NoDataset, dataset_error
from ..places.remote import url_of
from ..places.store import LocalStore, Store, as_store
from .description import read_description
from .strict_json import checksum_of, parse_json, to_file

FILE_NAME, FORMAT, VERSION = "merged.json", "tlfast-merged", 1
MAX_BYTES = 64 << 20
MOST_PARTS = 10_000
_REMEDY = "Restore the file as it was, or merge the datasets again."


class Part(NamedTuple):
    """One of the datasets: where it is, which it is, and how many examples it plans."""

    path: str  # relative to the folder of merged.json, or absolute, or a URL
    identity: str  # the config_hash of its dataset.json, or the checksum of its last extension
    n_examples: int

    def store(self, merged: Store) -> Store:
        """Return where it lies."""
        if url_of(self.path) or not isinstance(merged, LocalStore):
            return as_store(self.path)
        return as_store(Path(os.path.normpath(merged.folder / self.path)))


def to_bytes(parts: Sequence[Part]) -> bytes:
    """Return the content of merged.json."""
    return to_file({"format": FORMAT, "version": VERSION, "parts": [part._asdict() for part in parts]})


def read_parts(place: str | PathLike[str] | Store, who: str) -> list[Part] | None:
    """Read merged.json; None where there is none, DatasetError where it is damaged or newer."""
    store = as_store(place)
    path = store.where(FILE_NAME)
    try:
        content = store.read(FILE_NAME, who, MAX_BYTES)
    except DatasetError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return None
        raise
    value = parse_json(content, who, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise dataset_error(who, path, f'say "format": "{FORMAT}"', repr(value)[:80], _REMEDY)
    if value.get("version") != VERSION:
        rule = f"be of format version {VERSION}"
        raise dataset_error(who, path, rule, repr(value.get("version"))[:80], "Update tlfast to read it.")
    checksum = value.pop("checksum", None)
    if set(value) != {"format", "version", "parts"} or checksum_of(value) != checksum:
        raise dataset_error(who, path, "match its own checksum", "other content", _REMEDY)
    return _checked(value["parts"], path, who)


def _checked(value: Any, path: str, who: str) -> list[Part]:
    try:
        parts = [Part(**entry) for entry in value]
        kinds = all((type(p.path), type(p.identity), type(p.n_examples)) == (str, str, int) for p in parts)
        if not (kinds and 1 <= len(parts) <= MOST_PARTS and all(0 < p.n_examples < 2**48 for p in parts)):
            raise ValueError("no parts, or parts of other types")
    except (TypeError, ValueError) as error:
        rule = "list parts with path, identity and n_examples"
        raise dataset_error(who, path, rule, repr(error)[:200], _REMEDY) from error
    return parts


def stores_of(place: str | PathLike[str] | Store, who: str) -> list[Store]:
    """Return where the data of a dataset are: the place itself, or those of the datasets that were merged."""
    store = as_store(place)
    try:
        read_description(store, who)
    except NoDataset:
        parts = read_parts(store, who)
        if parts is None:
            raise
        return [part.store(store) for part in parts]
    return [store]
