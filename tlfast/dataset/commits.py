"""Commits: the one file per unit that says its data exist, how long they are, and their CRC32C."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .description import Description, parse_json
from .durable import PendingFile, locked, read_small, sync_folder
from .errors import dataset_error
from .layout import PAGE_BYTES
from .plan import Unit

FOLDERS = ("data", "rows", "commits")
MAX_BYTES = 64 << 10
_CRC = re.compile(r"[0-9a-f]{8}", re.ASCII)
_NAME = re.compile(r"(u[0-9]{6,18})\.json", re.ASCII)


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


@dataclass(frozen=True)
class CommittedFile:
    """One file of a unit as its commit names it."""

    path: str
    n_bytes: int
    crc32c: int


@dataclass(frozen=True)
class Commit:
    """A unit that exists: its files, and how many of its rows hold non-finite values."""

    unit: Unit
    config_hash: str
    files: tuple[CommittedFile, CommittedFile]  # the unit file, the row table
    non_finite: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the unit's files."""
        return sum(file.n_bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Return the commit as it stands in its file."""
        return {
            "version": 1,
            "unit": self.unit.name,
            "first_example": self.unit.start,
            "rows": len(self.unit),
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


def committed_names(folder: Path) -> list[str]:
    """Return the names of the units that have a commit file, sorted; files of other names are not commits."""
    with os.scandir(folder / "commits") as entries:
        names = [match[1] for entry in entries if (match := _NAME.fullmatch(entry.name))]
    return sorted(names, key=lambda name: (len(name), name))


def read_commit(folder: Path, name: str, description: Description, who: str) -> Commit:
    """Read the commit of unit ``name``; DatasetError where it says anything that the plan does not."""
    path = folder / "commits" / f"{name}.json"
    unit = description.plan.unit_named(name)
    value = parse_json(read_small(path, who, MAX_BYTES), who, path)
    try:
        files = tuple(_read_file(entry) for entry in value["files"])
        commit = Commit(unit, description.config_hash, files, value["non_finite_rows"])  # type: ignore[arg-type]
        # The paths are compared with the only possible ones, so no commit can point anywhere else.
        names = (data_path(unit), rows_path(unit))
        paths_agree = len(files) == 2 and all(
            file.path in (name, path_with_crc(name, file.crc32c)) for file, name in zip(files, names, strict=True)
        )
        agrees = paths_agree and _is_count(commit.non_finite) and commit.to_json() == value
    except (KeyError, TypeError, ValueError) as error:
        rule = "have the keys of a commit"
        raise dataset_error(who, str(path), rule, repr(error)[:200], "Remove this commit and resume.") from error
    if not agrees:
        rule = f"agree with the plan: {data_path(unit)}, {rows_path(unit)}, {len(unit)} rows from {unit.start}"
        raise dataset_error(who, str(path), rule, repr(value)[:300], "Remove this commit and resume.")
    return commit


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_file(entry: Any) -> CommittedFile:
    if not _is_count(entry["bytes"]) or not _CRC.fullmatch(entry["crc32c"]):
        raise ValueError(f"bytes {entry['bytes']!r}, crc32c {entry['crc32c']!r}")
    return CommittedFile(entry["path"], entry["bytes"], int(entry["crc32c"], 16))


def check_sizes(folder: Path, commit: Commit, description: Description, who: str) -> None:
    """Check that the commit's files lie there with the size that the commit and the plan give them."""
    remedy = f"Remove {commit_path(commit.unit)} and resume to make the unit again."
    payload = len(commit.unit) * description.row_bytes
    header = commit.files[0].n_bytes - payload  # its exact bytes are compared when the file is first used
    if header <= 0 or header % PAGE_BYTES:
        rule = f"give {data_path(commit.unit)} whole pages of header and {payload} bytes of rows"
        raise dataset_error(who, commit_path(commit.unit), rule, commit.files[0].n_bytes, remedy)
    for file in commit.files:
        path = f"{folder}/{file.path}"
        try:
            info = os.lstat(path)
        except OSError as error:
            raise dataset_error(who, path, "exist, its commit names it", error.strerror, remedy) from error
        if not stat.S_ISREG(info.st_mode):
            raise dataset_error(who, path, "be a regular file", stat.filemode(info.st_mode), remedy)
        if info.st_size != file.n_bytes:
            raise dataset_error(who, path, f"have {file.n_bytes} bytes", info.st_size, remedy)


def check_folders(folder: Path, who: str) -> None:
    """Check that data, rows and commits are folders of this dataset, not links to elsewhere."""
    for name in FOLDERS:
        path = folder / name
        if path.is_symlink() or not path.is_dir():
            got = "a link" if path.is_symlink() else "no folder"
            raise dataset_error(who, str(path), "be a folder", got, "Restore the dataset, or start a new one.")
