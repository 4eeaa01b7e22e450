"""Re-read every byte of a dataset against its checksums, counts and plan."""

from __future__ import annotations

import errno
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from os import PathLike
from typing import Any

import numpy as np

from ...markup import table
from ..errors import DatasetError, NoDataset, dataset_error
from ..format.commits import (
    Commit,
    CommittedFile,
    check_sizes,
    commit_path,
    data_path,
    file_sizes,
    read_commit,
    read_folder,
    rows_path,
)
from ..format.description import Description, read_description
from ..format.layout import check_header, unit_layout
from ..format.merged import read_parts
from ..format.plan import FLAG_NON_FINITE, Unit
from ..format.row_table import decode_rows
from ..places.durable import crc32c
from ..places.store import OpenFile, Store, as_store

_WHO = "verify"
_BLOCK_BYTES = 8 << 20

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the unit it is wrong in ("" for the dataset as a whole)."""

    unit: str
    text: str
    damaged: bool = False  # made again, the unit would be right: repair_dataset drops its commit

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

    def _repr_html_(self) -> str:
        head, *_ = str(self).splitlines()
        return table(["unit", "problem"] if self.problems else [], [(p.unit, p.text) for p in self.problems], head)

    def __str__(self) -> str:
        checked = f"{self.n_rows} rows in {self.n_units} units, {self.n_bytes / 1e6:.1f} MB read"
        if self.ok:
            return f"ok: {checked}"
        return "\n".join([f"{len(self.problems)} problems; right: {checked}", *map(str, self.problems)])


def verify_dataset(
    path: str | PathLike[str] | Store, *, partial: bool = False, progress: Callable[[int], None] | None = None
) -> Report:
    """Re-read every byte of the dataset in ``path``; damage is reported, not raised.

    Args:
        path: the dataset's folder, or its store.
        partial: whether units that are not committed yet are no problem.
        progress: called with the number of bytes just read.

    Returns:
        A Report; ``report.ok`` and ``report.problems`` say it all.

    Example:
        >>> from tlfast.dataset import verify_dataset
        >>> verify_dataset("no/such/folder").ok
        False
    """
    store, report = as_store(path), Report()
    try:
        description, names = read_folder(store, _WHO)
        files = file_sizes(store, _WHO)
    except NoDataset as error:
        return _verify_parts(store, error, partial, progress)
    except DatasetError as error:
        report.problems.append(Problem("", str(error)))
        return report
    named = {name for unit in names for name in _check_unit(store, unit, description, files, report, progress)}
    absent = description.plan.n_units - len(names)
    if absent > 0 and not partial:
        first = ", ".join(missing_names(description, names, 3))
        text = f"{absent} of {description.plan.n_units} units are not there ({first}, ...): resume the collection"
        report.problems.append(Problem("", text))
    commits = (f"commits/{name}" for name in store.names("commits", _WHO))
    report.unnamed = sorted(name for name in chain(files, commits) if name not in named)
    return report


def _verify_parts(store: Store, absent: NoDataset, partial: bool, progress: Callable[[int], None] | None) -> Report:
    """Verify each of the datasets that were merged; where there is no such dataset, say what ``absent`` says."""
    report = Report()
    try:
        parts = read_parts(store, _WHO)
    except DatasetError as error:
        parts, absent = None, NoDataset(str(error))
    if parts is None:
        report.problems.append(Problem("", str(absent)))
        return report
    for part in parts:
        place = part.store(store)
        try:
            changed = read_description(place, _WHO).last_checksum != part.identity
        except DatasetError as error:
            report.problems.append(Problem(part.path, str(error)))
            continue
        if changed:
            text = "another dataset, or one that was extended since it was merged: merge the datasets again"
            report.problems.append(Problem(part.path, text))
        found = verify_dataset(place, partial=partial, progress=progress)
        for problem in found.problems:
            unit = f"{part.path}/{problem.unit}".rstrip("/")
            report.problems.append(Problem(unit, problem.text, problem.damaged))
        report.n_units += found.n_units
        report.n_rows += found.n_rows
        report.n_bytes += found.n_bytes
        report.unnamed += [f"{part.path}/{name}" for name in found.unnamed]
    return report


def _check_unit(
    store: Store,
    name: str,
    description: Description,
    files: Mapping[str, int | None],
    report: Report,
    progress: Callable[[int], None] | None,
) -> set[str]:
    """Check one unit into ``report``; return the files that its commit names."""

    def count(n_bytes: int) -> None:
        report.n_bytes += n_bytes
        if progress is not None:
            progress(n_bytes)

    try:
        unit = description.plan.unit_named(name)
    except DatasetError as error:  # of another plan perhaps, but not damaged
        report.problems.append(Problem(name, str(error)))
        return {f"commits/{name}.json"}
    try:
        commit = check_unit(store, unit, description, files, count)
    except (DatasetError, OSError) as error:
        report.problems.append(Problem(name, str(error), is_damage(error)))
        return {commit_path(unit), data_path(unit), rows_path(unit)}
    report.n_units += 1
    report.n_rows += len(unit)
    return {commit_path(unit), *(file.path for file in commit.files)}


def check_unit(
    store: Store,
    unit: Unit,
    description: Description,
    files: Mapping[str, int | None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Commit:
    """Re-read every byte of a committed unit, and return its commit; DatasetError or OSError where something is wrong.

    ``files`` is a listing (see file_sizes), where there is one: it saves reading a file of another size.
    """
    commit = read_commit(store, unit.name, description, _WHO)
    if files is not None:
        check_sizes(store, commit, description, files, _WHO)
    with ThreadPoolExecutor(1, "tlfast-verify") as thread:
        content = thread.submit(_check_content, store, commit, description)
        for file in commit.files:
            _check_bytes(store, file, progress)
        content.result()  # what is wrong with the content of wrong bytes says nothing
    return commit


# What a file that is gone, replaced or on a bad sector says. Anything else (no permission, too many open files) says
# nothing of the file; and no number at all is what pyarrow makes of bytes that are no Parquet.
_DAMAGE = {None, errno.EIO, errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.ENXIO}


def is_damage(error: Exception) -> bool:
    """Whether an error of check_unit says that the unit's files are wrong, and not that they couldn't be read here."""
    reason = error.__cause__ if isinstance(error, DatasetError) else error
    if isinstance(reason, OSError):
        return reason.errno in _DAMAGE
    return not isinstance(reason, (ImportError, MemoryError, NotImplementedError))


def missing_names(description: Description, names: list[str], most: int) -> list[str]:
    """Return up to ``most`` planned units that are not in ``names``."""
    there = set(names)
    planned = (description.plan.unit(k).name for k in range(description.plan.n_units))
    return list(islice((name for name in planned if name not in there), most))


def _check_bytes(store: Store, file: CommittedFile, progress: Callable[[int], None] | None) -> None:
    crc, n_bytes = 0, 0
    for block in _blocks(store, store.open(file.path, _WHO)):
        crc = crc32c(block, crc)
        n_bytes += len(block)
        if progress is not None:
            progress(len(block))
    if crc != file.crc32c or n_bytes != file.n_bytes:
        rule = f"have the CRC32C {file.crc32c:08x} of its commit"
        remedy = "Its bytes changed after it was written. Run `tlfast verify --repair`, then resume."
        raise dataset_error(_WHO, store.where(file.path), rule, f"{crc:08x} over {n_bytes} bytes", remedy)


def _blocks(store: Store, file: OpenFile) -> Iterator[Array]:
    """Yield a file's bytes, each block valid until the next is asked for; the next two are being read meanwhile.

    A file of several blocks is read from the disk itself: what the page cache holds of it may be better than that.
    """
    n = -(-file.size // _BLOCK_BYTES)
    n_kept = min(n, 3)
    memory = [np.frombuffer(mmap.mmap(-1, min(_BLOCK_BYTES, file.size)), np.uint8) for _ in range(n_kept)]

    def fetch(k: int) -> Array:
        start = k * _BLOCK_BYTES
        block = memory[k % n_kept][: file.size - start]
        store.fill([(file, start, block.data)], _WHO)
        return block

    if n < 2:
        yield from map(fetch, range(n))
        return
    file.past_cache()
    with ThreadPoolExecutor(1, "tlfast-verify") as thread:  # one: a disk reads in order faster than here and there
        ahead = deque(thread.submit(fetch, k) for k in range(n_kept - 1))
        for k in range(n_kept - 1, n):
            block = ahead.popleft().result()
            ahead.append(thread.submit(fetch, k))
            yield block
        while ahead:
            yield ahead.popleft().result()


def _check_content(store: Store, commit: Commit, description: Description) -> None:
    unit_file, row_table = (file.path for file in commit.files)
    layout = unit_layout(description.columns, commit.unit, commit.tokens or 0)
    check_header(store.open(unit_file, _WHO), store.where(unit_file), layout, _WHO)
    table = decode_rows(store, commit.unit, list(description.columns), row_table, commit.tokens, description.kept)
    flagged = sum(flags & FLAG_NON_FINITE != 0 for flags in table.column("flags").to_pylist())
    if flagged != commit.non_finite:
        rule = f"flag {commit.non_finite} rows as non-finite, as its commit says"
        raise dataset_error(_WHO, store.where(row_table), rule, flagged, "Run `tlfast verify --repair`, then resume.")
