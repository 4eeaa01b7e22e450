"""Commits: the one file per unit that says its data exist, how long they are, and their CRC32C."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import dataset_error
from ..places.durable import PendingFile, locked, sync_folder
from ..places.store import Store, as_store, open_folder
from .description import Description, read_description
from .layout import PAGE_BYTES
from .plan import Unit
from .strict_json import parse_json

FOLDERS = ("data", "rows", "commits")
MAX_BYTES = 64 << 10
_CRC = re.compile(r"[0-9a-f]{8}", re.ASCII)
_NAME = re.compile(r"(u[0-9]{6,18})\.json", re.ASCII)
_REMEDY = "Run `tlfast verify --repair`, then resume."
_COUNT = r"(0|[1-9][0-9]{0,17})"


def data_path(unit: Unit) -> str:
    """Return the name of the unit's file within the dataset."""
    return f"data/{unit.name}.safetensors"


def rows_path(unit: Unit) -> str:
    """Return the name of the unit's row table within the dataset."""
    return f"rows/{unit.name}.parquet"


def path_with_crc(path: str, crc: int) -> str:
    """Return the name of a unit's file on an object store that has other bytes under ``path``, uncommitted."""
    stem, dot, kind = path.rpartition(".")
    return f"{stem}-{crc:08x}{dot}{kind}"


def commit_path(unit: Unit) -> str:
    """Return the name of the unit's commit within the dataset."""
    return f"commits/{unit.name}.json"


class CommittedFile(NamedTuple):
    """One file of a unit as its commit names it."""

    path: str
    n_bytes: int
    crc32c: int


class Commit(NamedTuple):
    """A unit that exists: its files, how many of its rows hold non-finite values, and its tokens where they count."""

    unit: Unit
    config_hash: str
    files: tuple[CommittedFile, CommittedFile]  # the unit file, the row table
    non_finite: int
    tokens: int | None = None  # of a dataset with a column per token

    @property
    def n_bytes(self) -> int:
        """Bytes of the unit's files."""
        return sum(file.n_bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return the commit as it stands in its file."""
        return {
            "version": 1 if self.tokens is None else 2,
            "unit": self.unit.name,
            "first_example": self.unit.start,
            "rows": len(self.unit),
            **({} if self.tokens is None else {"tokens": self.tokens}),
            "non_finite_rows": self.non_finite,
            "config_hash": self.config_hash,
            "files": [{"path": f.path, "bytes": f.n_bytes, "crc32c": f"{f.crc32c:08x}"} for f in self.files],
        }

    def to_bytes(self) -> bytes:
        """Return the content of its file."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()


def publish(folder: Path, commit: Commit, files: Sequence[PendingFile]) -> bool:
    """Give the sealed ``files`` their names, then the commit its own; False where the unit was committed before.

    The lock keeps a second writer of the same unit from replacing files that a first one has just committed.
    """
    data = commit.to_bytes()
    final = folder / commit_path(commit.unit)
    with ExitStack() as stack:
        pending = stack.enter_context(PendingFile(final, len(data)))
        pending.append(data)
        pending.seal()
        stack.enter_context(locked(folder))
        if os.path.lexists(final):
            return False
        for file in files:
            file.rename()
        for name in ("data", "rows"):
            sync_folder(folder / name)
        won = pending.link()
        sync_folder(folder / "commits")
        return won


def _pattern() -> re.Pattern[bytes]:
    """Return what matches a commit as `publish` writes it: one match instead of a parser, of 10,000 commits."""
    files = (
        CommittedFile("data/@unit.safetensors", 901, 0x90290290),
        CommittedFile("rows/@unit.parquet", 903, 0x90490490),
    )
    text = json.dumps(Commit(Unit("@unit", 905, 905 + 906), "@hash", files, 907).to_json(), indent=1) + "\n"
    pattern = re.escape(text).replace("@unit", r"(?P<unit>u[0-9]+)", 1).replace("@unit", "(?P=unit)")
    for sentinel in ("905", "906", "907", "901", "903"):
        pattern = pattern.replace(sentinel, _COUNT)
    for sentinel in ("90290290", "90490490"):
        pattern = pattern.replace(sentinel, "([0-9a-f]{8})")
    return re.compile(pattern.replace("@hash", "([0-9a-f]{64})").encode())


_AS_WRITTEN = _pattern()


def committed_names(place: str | PathLike[str] | Store, who: str) -> list[str]:
    """Return the names of the units that have a commit file, sorted; files of other names are not commits."""
    names = [match[1] for name in as_store(place).names("commits", who) if (match := _NAME.fullmatch(name))]
    return sorted(names, key=lambda name: (len(name), name))


def read_folder(place: str | PathLike[str] | Store, who: str) -> tuple[Description, list[str]]:
    """Read what the dataset holds, and which of its units have a commit file."""
    store = as_store(place)
    description, names = read_description(store, who), committed_names(store, who)
    if names and not description.plan.has(names[-1]):
        description = read_description(store, who)  # it was extended after it was read, and before it was listed
    return description, names


def file_sizes(place: str | PathLike[str] | Store, who: str) -> dict[str, int | None]:
    """Return the size of each file in data and rows, by its name within the dataset; None for no regular file.

    List the commits before: then whatever they name has its own name by now.
    """
    store = as_store(place)
    folders = ("data", "rows")
    return {f"{folder}/{name}": size for folder in folders for name, size in store.sizes(folder, who).items()}


def read_commits(
    place: str | PathLike[str] | Store, description: Description, who: str, names: Sequence[str] | None = None
) -> list[Commit]:
    """Read all commits in the order of their examples, and compare the sizes of their files; DatasetError as below."""
    store = as_store(place)
    names = committed_names(store, who) if names is None else names
    files = file_sizes(store, who)
    paths = [f"commits/{name}.json" for name in names]
    commits = []
    for name, data in zip(names, store.read_all(paths, who, MAX_BYTES), strict=True):
        commits.append(_parse(store, name, data, description, who))
        check_sizes(store, commits[-1], description, files, who)
    return commits


def read_commit(place: str | PathLike[str] | Store, name: str, description: Description, who: str) -> Commit:
    """Read the commit of unit ``name``; DatasetError where it says anything that the plan does not."""
    store = as_store(place)
    return _parse(store, name, store.read(f"commits/{name}.json", who, MAX_BYTES), description, who)


def _parse(store: Store, name: str, data: bytes, description: Description, who: str) -> Commit:
    unit = description.plan.unit_named(name)
    if not description.has_tokens and (match := _AS_WRITTEN.fullmatch(data)):
        texts = match.groups()
        planned_by = description.hash_of(unit)
        expected = (name.encode(), b"%d" % unit.start, b"%d" % len(unit), planned_by.encode())
        if (texts[0], texts[1], texts[2], texts[4]) == expected:
            unit_file = CommittedFile(data_path(unit), int(texts[5]), int(texts[6], 16))
            row_table = CommittedFile(rows_path(unit), int(texts[7]), int(texts[8], 16))
            return Commit(unit, planned_by, (unit_file, row_table), int(texts[3]))
    return _parse_json(store.where(f"commits/{name}.json"), unit, data, description, who)


def _parse_json(path: str, unit: Unit, data: bytes, description: Description, who: str) -> Commit:
    """Parse a commit that is spelled otherwise, or wrong."""
    value = parse_json(data, who, path)
    try:
        files = tuple(_read_file(entry) for entry in value["files"])
        tokens = value["tokens"] if description.has_tokens else None
        commit = Commit(unit, description.hash_of(unit), files, value["non_finite_rows"], tokens)  # type: ignore[arg-type]
        # The paths are compared with the only possible ones, so no commit can point anywhere else.
        names = (data_path(unit), rows_path(unit))
        paths_agree = len(files) == 2 and all(
            file.path in (name, path_with_crc(name, file.crc32c)) for file, name in zip(files, names, strict=True)
        )
        counts = commit.non_finite, commit.tokens or 0
        agrees = paths_agree and all(map(_is_count, counts)) and commit.to_json() == value
    except (KeyError, TypeError, ValueError) as error:
        rule = "have the keys of a commit"
        raise dataset_error(who, path, rule, repr(error)[:200], _REMEDY) from error
    if not agrees:
        rule = f"agree with the plan: {data_path(unit)}, {rows_path(unit)}, {len(unit)} rows from {unit.start}"
        raise dataset_error(who, path, rule, repr(value)[:300], _REMEDY)
    return commit


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


def _read_file(entry: Any) -> CommittedFile:
    if not _is_count(entry["bytes"]) or not _CRC.fullmatch(entry["crc32c"]):
        raise ValueError(f"bytes {entry['bytes']!r}, crc32c {entry['crc32c']!r}")
    return CommittedFile(entry["path"], entry["bytes"], int(entry["crc32c"], 16))


def check_sizes(
    store: Store, commit: Commit, description: Description, files: Mapping[str, int | None], who: str
) -> None:
    """Check that the commit's files are among ``files`` (of file_sizes) with the size that commit and plan give."""
    payload = description.payload_bytes(len(commit.unit), commit.tokens)
    header = commit.files[0].n_bytes - payload  # its exact bytes are compared when the file is first used
    if header <= 0 or header % PAGE_BYTES:
        rule = f"give {data_path(commit.unit)} whole pages of header and {payload} bytes of rows"
        raise dataset_error(who, commit_path(commit.unit), rule, commit.files[0].n_bytes, _REMEDY)
    for file in commit.files:
        size = files.get(file.path)
        if size != file.n_bytes:
            path = store.where(file.path)
            if file.path not in files:
                raise dataset_error(who, path, "exist, its commit names it", "no such file", _REMEDY)
            if size is None:
                raise dataset_error(who, path, "be a regular file", "a link, a folder or a device", _REMEDY)
            raise dataset_error(who, path, f"have {file.n_bytes} bytes", size, _REMEDY)


def check_folders(folder: Path, who: str) -> None:
    """Check that data, rows and commits are folders of this dataset, not links to elsewhere."""
    for name in FOLDERS:
        os.close(open_folder(folder / name, who))
