"""dataset.json: what a dataset holds and how it was made, written once."""

from __future__ import annotations

import difflib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ...errors import broken_rule
from ..errors import DatasetError, NoDataset, dataset_error
from ..places.store import LocalStore, Store, as_store
from .extension import Extension, read_extensions
from .kept_fields import check_kept
from .layout import DTYPE_NAMES, DTYPES, Column, check_columns, has_tokens, version_of
from .meaning import Meanings
from .plan import Plan, Unit
from .strict_json import checksum_of, parse_json, sha256_of, to_file

FORMAT = "tlfast-dataset"
VERSIONS = (1, 2, 3)  # what can be read; written is the first that suffices
FILE_NAME = "dataset.json"
CONFIG, CARD = "config.yaml", "README.md"  # beside it, for people and for the next run
EXAMPLES = ".examples"  # what a run that continues needn't read again, as long as there are units to be made
MAX_BYTES = 64 << 20  # of dataset.json: tens of thousands of points stay far below

_KEYS = {"format", "version", "header", "columns", "plan", "config_hash", "about", "checksum"}
_COLUMN_KEYS = {1: ("name", "dtype", "shape"), 2: ("name", "dtype", "shape", "of", "per", "encoding")}
_COLUMN_KEYS[3] = _COLUMN_KEYS[2]
_WITH_FIELDS = 3  # the version that keeps fields of the examples in its row tables


@dataclass(frozen=True)
class Description:
    """The content of dataset.json; ``about`` (when, by what) is kept but is not part of the identity.

    ``plan`` has the examples of ``extensions`` too, which stand in files of their own; ``kept`` are the fields that the
    row tables keep, with their types.
    """

    header: dict[str, Any]
    columns: dict[str, Column]
    plan: Plan
    about: dict[str, Any]
    extensions: tuple[Extension, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to continue a dataset."""
        version = _WITH_FIELDS if self.kept else version_of(self.columns)
        columns = [_column_entry(name, column, version) for name, column in self.columns.items()]
        plan = self.plan.to_json()
        said = {"format": FORMAT, "version": version, "header": self.header, "columns": columns, "plan": plan}
        fields = [{"name": name, "type": kind} for name, kind in self.kept.items()]
        return said | ({"fields": fields} if fields else {})

    def payload_bytes(self, n_rows: int, n_tokens: int | None) -> int:
        """Bytes of so many examples and tokens at all points together."""
        return self._row_bytes["example"] * n_rows + self._row_bytes["token"] * (n_tokens or 0)

    @cached_property
    def _row_bytes(self) -> dict[str, int]:
        columns = self.columns.values()
        return {per: sum(c.row_bytes for c in columns if c.per == per) for per in ("example", "token")}

    @cached_property
    def has_tokens(self) -> bool:
        """Whether some column has a row for each token."""
        return has_tokens(self.columns)

    @cached_property
    def meanings(self) -> Meanings:
        """What its columns hold, as far as the header says."""
        return Meanings(self.header, self.about)

    def holds(self, name: str) -> str:
        """Return in words what a column holds."""
        return self.meanings.holds(name, self.columns[name])

    @cached_property
    def config_hash(self) -> str:
        """SHA-256 of the identity."""
        return sha256_of(self.identity())

    @property
    def last_checksum(self) -> str:
        """The config_hash, or the checksum of the last extension: another one whenever examples are added."""
        return self.extensions[-1].checksum if self.extensions else self.config_hash

    def hash_of(self, unit: Unit) -> str:
        """What the commit of a unit names: the config_hash, or the checksum of the extension that planned the unit."""
        number = self.plan.extension_of(unit.start)
        return self.extensions[number - 1].checksum if number else self.config_hash

    def extended(self, n_examples: int, examples: Mapping[str, Any]) -> Description:
        """Return the description with an extension by so many examples, of which ``examples`` is said."""
        before = self.last_checksum
        number = len(self.extensions) + 1
        extension = Extension(number, before, self.plan.n_examples, n_examples, dict(examples))
        return replace(self, plan=self.plan.extended(n_examples), extensions=(*self.extensions, extension))

    @property
    def examples(self) -> list[tuple[int, dict[str, Any]]]:
        """How many examples dataset.json plans and each extension, and what it says of them."""
        own = self.header.get("examples")
        parts = [(self.plan.to_json()["n_examples"], own if isinstance(own, dict) else {})]
        return parts + [(extension.n_examples, extension.examples) for extension in self.extensions]

    def all_examples(self) -> dict[str, Any]:
        """Return what is said of all planned examples together.

        Of a dataset that was extended the tokens are added up, and ``sha256`` lists that of each part; ``skipped`` is a
        number.
        """
        parts = [said for _, said in self.examples]
        found = dict(parts[0])
        if len(parts) > 1:
            tokens = [n for said in parts if type(n := said.get("tokens")) is int]
            found["tokens"] = sum(tokens) if len(tokens) == len(parts) else None
            found["sha256"] = [str(said.get("sha256")) for said in parts]
        lists = [said["skipped"] for said in parts if isinstance(said.get("skipped"), list)]
        return found | ({"skipped": sum(map(len, lists))} if lists else {})

    def to_bytes(self) -> bytes:
        """Return the content of dataset.json."""
        return to_file(self.identity() | {"config_hash": self.config_hash, "about": self.about})


def describe(
    who: str,
    header: Mapping[str, Any],
    columns: Mapping[str, Any],
    plan: Plan,
    about: Mapping[str, Any] | None = None,
    kept: Mapping[str, str] | None = None,
) -> Description:
    """Return the description of a new dataset; DatasetError for a header or column that cannot be stored."""
    try:
        plain, more = (json.loads(json.dumps(dict(part or {}), allow_nan=False)) for part in (header, about))
    except (TypeError, ValueError) as error:
        raise dataset_error(
            who, "header", "be JSON", str(error), "Use dicts, lists, text and finite numbers."
        ) from error
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = {"created": created, "torch": str(torch.__version__), "python": platform.python_version()}
    return Description(
        plain, check_columns(who, columns), plan, made | more, kept=check_kept(who, {} if kept is None else kept)
    )


def read_description(place: str | PathLike[str] | Store, who: str) -> Description:
    """Read and check dataset.json in a folder or store; DatasetError where it is missing, newer, changed or damaged."""
    store = as_store(place)
    path = store.where(FILE_NAME)
    try:
        content = store.read(FILE_NAME, who, MAX_BYTES)
    except DatasetError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            raise _no_dataset(store, who) from error
        raise
    value = parse_json(content, who, path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise dataset_error(who, path, f'say "format": "{FORMAT}"', repr(value)[:80], "Is it a tlfast dataset?")
    version = value.get("version")
    if type(version) is not int or version not in VERSIONS:
        rule = f"be of format version {' or '.join(map(str, VERSIONS))}"
        raise dataset_error(who, path, rule, repr(version)[:80], "Update tlfast to read it.")
    checksum = value.pop("checksum", None)
    keys = _KEYS - {"checksum"} | ({"fields"} if version == _WITH_FIELDS else set())
    if set(value) != keys or checksum_of(value) != checksum:
        raise dataset_error(who, path, "match its own checksum", "other content", "Restore the file as it was.")
    columns = _read_columns(value["columns"], version, who, path)
    if not isinstance(value["header"], dict) or not isinstance(value["about"], dict):
        raise dataset_error(who, path, "hold objects header and about", "other types", "Restore the file.")
    kept = _read_kept(value["fields"], who, path) if version == _WITH_FIELDS else {}
    description = Description(value["header"], columns, Plan.from_json(value["plan"]), value["about"], kept=kept)
    if description.config_hash != value["config_hash"]:
        raise dataset_error(who, path, "match its config_hash", "other content", "Restore the file as it was.")
    extensions = read_extensions(store, who, description.config_hash, description.plan.n_examples)
    plan = description.plan
    for extension in extensions:
        plan = plan.extended(extension.n_examples)
    return replace(description, plan=plan, extensions=extensions)


def _no_dataset(store: Store, who: str) -> DatasetError:
    """What to say where there is no dataset.json: where one is, if that can be seen."""
    rule, place = "be the folder of a dataset", store.where("").rstrip("/")
    if not isinstance(store, LocalStore):
        return NoDataset(broken_rule(who, "path", rule, f"{place} without dataset.json", "Check the URL."))
    folder = store.folder
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, _datasets_in(folder.parent), n=1)
        got = f"{place}, {'a file' if folder.exists() else 'no such folder'}"
        remedy = f"Nearest: {folder.parent / near[0]}." if near else "Check the path."
        return NoDataset(broken_rule(who, "path", rule, got, remedy))
    got = f"{place} without dataset.json"
    if (folder / "commits").exists():
        remedy = "Restore that file: it is written once, and never changed."
        return dataset_error(who, "path", rule, got, remedy)
    inside = _datasets_in(folder)
    remedy = f"Datasets in it: {', '.join(inside[:5])}{', ...' * (len(inside) > 5)}." if inside else "Check the path."
    return NoDataset(broken_rule(who, "path", rule, got, remedy))


def _datasets_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if (path / FILE_NAME).is_file())
    except OSError:
        return []


def _column_entry(name: str, column: Column, version: int) -> dict[str, Any]:
    values = (name, DTYPE_NAMES[column.dtype], list(column.row_shape), column.of, column.per, column.encoding)
    return dict(zip(_COLUMN_KEYS[version], values, strict=False))


def _read_columns(value: Any, version: int, who: str, path: str) -> dict[str, Column]:
    keys = _COLUMN_KEYS[version]
    try:
        columns = {
            entry["name"]: (DTYPES[entry["dtype"]], tuple(entry["shape"]), *(entry[key] for key in keys[3:]))
            for entry in value
        }
        if len(columns) != len(value) or any(set(entry) != set(keys) for entry in value):
            raise KeyError(f"{', '.join(keys)}, once per column")
    except (KeyError, TypeError) as error:
        rule = f"list columns with {', '.join(keys[:-1])} and {keys[-1]}"
        raise dataset_error(who, path, rule, repr(error)[:200], "Restore the file as it was.") from error
    return check_columns(who, columns)


def _read_kept(value: Any, who: str, path: str) -> dict[str, str]:
    try:
        kept = {entry["name"]: entry["type"] for entry in value}
        if not kept or len(kept) != len(value) or any(set(entry) != {"name", "type"} for entry in value):
            raise KeyError("name and type, once per field")
    except (KeyError, TypeError) as error:
        rule, remedy = "list fields with name and type", "Restore the file as it was."
        raise dataset_error(who, path, rule, repr(error)[:200], remedy) from error
    return check_kept(who, kept)


def skipped_examples(description: Description, who: str) -> list[tuple[str, int, str]]:
    """Return source, start and reason of each example that was left out, those of extensions last."""
    lists = [part.get("skipped", []) for _, part in description.examples]
    try:
        skipped = [(source, start, reason) for entries in lists for source, start, reason in entries]
        if all((type(source), type(start), type(reason)) == (str, int, str) for source, start, reason in skipped):
            return skipped
    except (TypeError, ValueError):
        pass
    rule = "list a source, a start and a reason each"
    raise dataset_error(who, "examples.skipped", rule, repr(lists)[:200], "Another program wrote this header.")


def differences(old: Description, new: Description, most: int = 5) -> list[str]:
    """Name what differs between two identities: ``header.model: 'a' there, 'b' here``."""
    before, after = _flat(old.identity(), ""), _flat(new.identity(), "")
    texts = [
        f"{key}: {_short(before, key)} there, {_short(after, key)} here"
        for key in [*before, *(key for key in after if key not in before)]
        if _short(before, key) != _short(after, key) or before.get(key) != after.get(key)
    ]
    return texts[:most] + ([f"and {len(texts) - most} more"] if len(texts) > most else [])


def _short(values: dict[str, Any], key: str) -> str:
    return repr(values[key])[:60] if key in values else "nothing"


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(f"{prefix}.{key}" if prefix else str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{prefix}[{k}]", part) for k, part in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for name, part in items for key, leaf in _flat(part, name).items()}
