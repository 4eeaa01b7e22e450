"""Re-read every byte of a dataset against its checksums, counts and plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np

from .columns import check_header
from .commits import (
    FOLDERS,
    Commit,
    CommittedFile,
    check_sizes,
    read_commit,
    read_folder,
)
from .description import Description
from .durable import crc32c, open_regular
from .errors import DatasetError, dataset_error
from .layout import unit_layout
from .plan import FLAG_NON_FINITE
from .rows import decode_rows

_WHO = "verify"
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the unit it is wrong in ("" for the dataset as a whole)."""

    unit: str
    text: str

    def __str__(self) -> str:
        return f"{self.unit}: {self.text}" if self.unit else self.text


@dataclass
class Report:
    """What verify found: ``problems`` is empty where every byte is as it was committed."""

    problems: list[Problem] = field(default_factory=list)
    n_units: int = 0  # checked and right
    n_rows: int = 0
    n_bytes: int = 0  # read
    unnamed: list[str] = field(default_factory=list)  # files that no commit names: harmless, they do not exist

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        checked = f"{self.n_rows} rows in {self.n_units} units, {self.n_bytes / 1e6:.1f} MB read"
        if self.ok:
            return f"ok: {checked}"
        return "\n".join([f"{len(self.problems)} problems; right: {checked}", *map(str, self.problems)])


def verify_dataset(
    path: str | PathLike[str], *, partial: bool = False, progress: Callable[[int], None] | None = None
) -> Report:
    """Re-read every byte of the dataset in folder ``path``; damage is reported, not raised.

    Args:
        path: the dataset's folder.
        partial: whether units that are not committed yet are no problem.
        progress: called with the number of bytes just read.

    Returns:
        A Report; ``report.ok`` and ``report.problems`` say it all.

    Example:
        >>> from tlfast.dataset import verify_dataset
        >>> verify_dataset("no/such/folder").ok
        False
    """
    folder, report = Path(path), Report()
    try:
        description, names = read_folder(folder, _WHO)
    except DatasetError as error:
        report.problems.append(Problem("", str(error)))
        return report
    named = {name for unit in names for name in _check_unit(folder, unit, description, report, progress)}
    absent = description.plan.n_units - len(names)
    if absent > 0 and not partial:
        first = ", ".join(missing_names(description, names, 3))
        text = f"{absent} of {description.plan.n_units} units are not there ({first}, ...): resume the collection"
        report.problems.append(Problem("", text))
    for part in FOLDERS:
        report.unnamed += sorted(f"{part}/{n}" for n in os.listdir(folder / part) if f"{part}/{n}" not in named)
    return report


def _check_unit(
    folder: Path, name: str, description: Description, report: Report, progress: Callable[[int], None] | None
) -> set[str]:
    """Check one unit into ``report``; return the files that its commit names."""
    named = {f"commits/{name}.json"}
    try:
        commit = read_commit(folder, name, description, _WHO)
        named |= {file.path for file in commit.files}
        check_sizes(folder, commit, description, _WHO)
        for file in commit.files:
            report.n_bytes += _check_bytes(folder, file, progress)
        _check_content(folder, commit, description)
    except (DatasetError, OSError) as error:
        report.problems.append(Problem(name, str(error)))
    else:
        report.n_units += 1
        report.n_rows += len(commit.unit)
    return named


def missing_names(description: Description, names: list[str], most: int) -> list[str]:
    """Return up to ``most`` planned units that are not in ``names``."""
    there = set(names)
    planned = (description.plan.unit(k).name for k in range(description.plan.n_units))
    return list(islice((name for name in planned if name not in there), most))


def _check_bytes(folder: Path, file: CommittedFile, progress: Callable[[int], None] | None) -> int:
    path = folder / file.path
    fd, _ = open_regular(path, _WHO)
    crc, n_bytes = 0, 0
    block = bytearray(_BLOCK_BYTES)
    view = np.frombuffer(block, dtype=np.uint8)
    try:
        while n := os.readv(fd, [block]):
            crc = crc32c(view[:n], crc)
            n_bytes += n
            if progress is not None:
                progress(n)
    finally:
        os.close(fd)
    if crc != file.crc32c or n_bytes != file.n_bytes:
        rule = f"have the CRC32C {file.crc32c:08x} of its commit"
        remedy = "Its bytes changed after it was written; remove its commit and resume to make the unit again."
        raise dataset_error(_WHO, str(path), rule, f"{crc:08x} over {n_bytes} bytes", remedy)
    return n_bytes


def _check_content(folder: Path, commit: Commit, description: Description) -> None:
    path = folder / commit.files[0].path
    fd, _ = open_regular(path, _WHO)
    try:
        check_header(fd, path, unit_layout(description.columns, commit.unit))
    finally:
        os.close(fd)
    table = decode_rows(folder / commit.files[1].path, commit.unit, list(description.columns))
    flagged = sum(flags & FLAG_NON_FINITE != 0 for flags in table.column("flags").to_pylist())
    if flagged != commit.non_finite:
        rule = f"flag {commit.non_finite} rows as non-finite, as its commit says"
        raise dataset_error(_WHO, str(folder / commit.files[1].path), rule, flagged, "Remove its commit and resume.")
