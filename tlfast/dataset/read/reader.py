"""Reading a dataset: points as columns of rows, examples beside them, nothing loaded before it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ...errors import broken_rule
from ...markup import makers
from ..check.verify import Report, check_unit, missing_names, verify_dataset
from ..errors import NoDataset, dataset_error
from ..format.commits import Commit, read_commits, read_folder
from ..format.description import Description, skipped_examples
from ..format.layout import DTYPE_NAMES, WEIGHT, Column
from ..format.merged import read_parts
from ..format.plan import Plan, Unit
from ..format.row_table import ExampleTable
from ..places.store import LocalStore, Store, as_store
from .columns import GradientColumn, RawColumn, column_of, integers, row_numbers
from .decoding import recorded_tokenizer
from .hub import OnHub
from .merged import MergedDataset
from .showing import described
from .token_columns import TokenColumn, TokenSpans
from .unit_files import UnitFiles
from .views import Readable

_WHO = "open_dataset"


Access = Literal["auto", "mmap", "pread"]


def open_dataset(
    path: str | PathLike[str] | Store, *, partial: bool = False, access: Access = "auto"
) -> GradientDataset | MergedDataset:
    """Open the dataset in folder ``path`` for reading.

    Args:
        path: the folder that tlfast wrote, or another store that holds one.
        partial: open it although units are missing; rows are then those of the committed units, in order.
        access: how rows here and there are read. "mmap" copies them out of mapped files; "pread" never maps, and
            reads 16 at once over a network. "auto" is "pread" on network filesystems and where nothing can be mapped.

    Returns:
        A GradientDataset: ``ds.points``, ``len(ds)``, ``ds[point][rows]``, ``ds.examples[row]``. Where merge_datasets
        made the folder a MergedDataset, which is read in the same way.

    Raises:
        DatasetError: where the folder is no dataset, is damaged, lacks units, or cannot be read by ``access``.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, open_dataset
        >>> out, plan = tempfile.mkdtemp(), Plan(1, 1)
        >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> writer.write_unit(plan.unit(0), {"h": torch.tensor([[3.0, 4.0]])}, [Example(0, [1], "a", 0, 1)])
        True
        >>> open_dataset(out)["h"][0]
        tensor([3., 4.])
    """
    if access not in get_args(Access):
        rule = f"be one of {', '.join(get_args(Access))}"
        raise dataset_error(_WHO, "access", rule, repr(access), "Leave it out to let tlfast choose.")
    store = as_store(path)
    try:
        return _open(store, partial, access)
    except NoDataset:
        parts = read_parts(store, _WHO)
        if parts is None:
            raise
    return MergedDataset(store, parts, [_open(part.store(store), partial, access) for part in parts], partial)


def _open(store: Store, partial: bool, access: Access) -> GradientDataset:
    description, names = read_folder(store, _WHO)
    commits = read_commits(store, description, _WHO, names)
    absent = description.plan.n_units - len(commits)
    if absent and not partial:
        first = ", ".join(missing_names(description, names, 3))
        rule = f"hold all {description.plan.n_units} units of its plan"
        remedy = "Run the collection again to complete it, or open it with partial=True."
        raise dataset_error(_WHO, "path", rule, f"{store.where('')} without {absent} ({first}, ...)", remedy)
    if access == "mmap" and not store.maps:
        remedy = 'Use access="auto".'
        raise dataset_error(_WHO, "access", "be auto or pread for this store", "mmap", remedy)
    mapped = access == "mmap" or (access == "auto" and store.maps and not store.network())
    return GradientDataset(store, description, commits, partial=partial, mapped=mapped)


class GradientDataset(Readable, OnHub):
    """A dataset of gradients; made by open_dataset."""

    def __init__(
        self, store: Store, description: Description, commits: Sequence[Commit], *, partial: bool, mapped: bool
    ) -> None:
        self._store = store
        self._description = description
        self._commits = commits
        self._partial = partial
        self._files = UnitFiles(store, commits, description.columns, mapped)
        self.examples = ExampleTable(store, commits, list(description.columns), description.kept)
        self.spans = TokenSpans(self.examples, self._files)

    @classmethod
    def _open(cls, place: Any, partial: bool) -> Any:
        return open_dataset(place, partial=partial)

    @property
    def path(self) -> Path | str:
        """The folder, or the URL, of the dataset."""
        return self._store.folder if isinstance(self._store, LocalStore) else self._store.where("").rstrip("/")

    @property
    def points(self) -> list[str]:
        """The names of the points, in the order of the collection."""
        return list(self._description.columns)

    @property
    def kept(self) -> dict[str, str]:
        """The fields that the row tables keep of the examples, with their types: "int64", "list<float64>", ..."""
        return dict(self._description.kept)

    @property
    def header(self) -> dict[str, Any]:
        """How the data were made: the header that the writer was given."""
        return self._description.header

    @property
    def examples_fingerprint(self) -> tuple[str, ...] | None:
        """SHA-256 of all planned examples, of each extension too; None where the writer didn't say."""
        found = [part.get("sha256") for _, part in self._description.examples]
        return tuple(map(str, found)) if all(found) else None

    @property
    def identity(self) -> str:
        """SHA-256 of what it holds and how it was made: another one once examples are added."""
        return self._description.last_checksum

    @property
    def plan(self) -> Plan:
        """Which examples form which unit."""
        return self._description.plan

    @property
    def skipped(self) -> list[tuple[str, int, str]]:
        """The bad examples that were left out: source, start in it, and the reason of each."""
        return skipped_examples(self._description, _WHO)

    @property
    def units(self) -> list[Unit]:
        """The units that are there."""
        return [commit.unit for commit in self._commits]

    @property
    def sources(self) -> list[GradientDataset]:
        """The datasets whose rows these are: this one."""
        return [self]

    @property
    def unit_bounds(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The rows of each unit that is there: where they start, and where they stop; int64 [units] each."""
        return self._files.examples.starts, self._files.examples.stops

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, point: str) -> GradientColumn | TokenColumn:
        """Return the rows of ``point``, lazily, decoded where they are encoded; KeyError where there is no such point.

        Of a point per token each example has as many rows as tokens: see TokenColumn.
        """
        column = self.column(point)
        flat = column_of(point, column, self._files)
        return TokenColumn(flat, self.spans) if column.per == "token" else flat

    def column(self, point: str) -> Column:
        """Return what ``point`` is: dtype, shape of a row, of what, per example or token, encoding; or KeyError."""
        if point not in self._description.columns:
            known = ", ".join(self.points[:5]) + (", ..." if len(self.points) > 5 else "")
            raise KeyError(f"GradientDataset: point must be one of {known}, got {point!r}. See ds.points.")
        return self._description.columns[point]

    def holds(self, point: str) -> str:
        """Return in words what ``point`` holds: which form of which place, how reduced, projected and stored."""
        self.column(point)
        return self._description.holds(point)

    def made_by(self, point: str) -> dict[str, Any] | None:
        """Return the entry of the header's ``specs`` that made ``point``; None where the header doesn't tell."""
        made = self._description.meanings.made_by(point, self.column(point))
        return None if made is None else dict(made.spec)

    def factor_sizes(self, point: str) -> tuple[int, int] | None:
        """Return how many numbers g and a have, where a row of ``point`` is the two factors of a token; else None."""
        column = self.column(point)
        first = self._description.meanings.first_factor(point, column)
        return None if first is None else (first, column.row_shape[0] - first)

    def module_of(self, point: str) -> str:
        """Return the name of the module that ``point`` is of: its own but for the label of what made it.

        Where the header doesn't tell it is the name before ":weight", or all of it.
        """
        made = self._description.meanings.made_by(point, self.column(point))
        return point.removesuffix(f":{WEIGHT}") if made is None else made.point

    def keeps_positions(self, point: str) -> bool:
        """Return whether a row of ``point`` begins with the dimension of positions, as far as the header says."""
        return self._description.meanings.keeps_positions(point, self.column(point))

    def raw(self, point: str) -> RawColumn:
        """Return the codes and scales of an encoded ``point`` as they are stored: ``ds.raw(point)[row].codes``.

        Raises:
            KeyError: where there is no such point.
            ValueError: where its rows are stored as they are.
        """
        column = self.column(point)
        if column.encoding is None:
            rule, remedy = "name an encoded point", f"Read ds[{point!r}]."
            raise ValueError(broken_rule("GradientDataset.raw", "point", rule, f"the plain {point!r}", remedy))
        fields = [GradientColumn(name, field, self._files) for name, field in column.fields(point).items()]
        if column.per == "token":
            return RawColumn(*(TokenColumn(field, self.spans) for field in fields))
        return RawColumn(*fields)

    def ids_of(self, rows: Any) -> torch.Tensor:
        """Return the ids of the examples in these rows: int64, of the shape of ``rows``."""
        numbers = row_numbers(rows, len(self))
        axis = self._files.examples
        return torch.from_numpy(np.asarray(numbers + (self._files.firsts - axis.starts)[axis.unit_of(numbers)]))

    def rows_of(self, ids: Any) -> torch.Tensor:
        """Return in which rows the examples with these ids are: int64, of the shape of ``ids``.

        ``ds[point][ds.rows_of(ids)]``, ``ds.examples[int(ds.rows_of(7))]``. KeyError where a unit with one is missing.
        """
        wanted = integers("GradientDataset", "ids", ids)
        firsts, lengths, starts = self._files.firsts, self._files.examples.lengths, self._files.examples.starts
        flat = wanted.reshape(-1)
        k = np.searchsorted(firsts, flat, side="right") - 1  # -1 is before the first unit: the 0 behind the last
        within = flat - np.append(firsts, 0)[k]
        absent = (k < 0) | (within >= np.append(lengths, 0)[k])
        if absent.any():
            example, n = int(flat[absent][0]), self.plan.n_examples
            rule = "be of a unit that is there" if 0 <= example < n else f"be in 0..{n - 1}"
            raise KeyError(broken_rule("GradientDataset", "id", rule, example, "See ds.ids; complete the dataset."))
        return torch.from_numpy(np.append(starts, 0)[k] + within).reshape(wanted.shape)

    def tokenizer(self) -> Any:
        """Return the tokenizer that the examples were cut with; None where it isn't here. Asks no network."""
        return recorded_tokenizer(self._store, self.header)

    def verify(self, progress: Callable[[int], None] | None = None) -> Report:
        """Re-read every byte against its checksum; see verify_dataset."""
        return verify_dataset(self._store, partial=self._partial, progress=progress)

    def verify_unit(self, unit: Unit) -> None:
        """Re-read every byte of one unit against its checksum; DatasetError where something is wrong."""
        check_unit(self._store, unit, self._description)

    def verify_rows(self, start: int, stop: int) -> None:
        """Re-read the units of these rows against their checksums; DatasetError where something is wrong."""
        for number in np.unique(self._files.examples.unit_of(np.arange(start, stop))).tolist():
            self.verify_unit(self.units[number])

    def info(self) -> dict[str, Any]:
        """Return what is inside, as JSON-able values; reads nothing."""
        columns = self._description.columns
        return (
            {
                "path": str(self.path),
                "rows": len(self),
                "planned_rows": self.plan.n_examples,
                "units": len(self._commits),
                "planned_units": self.plan.n_units,
                "bytes": sum(commit.n_bytes for commit in self._commits),
                "non_finite_rows": sum(commit.non_finite for commit in self._commits),
                "points": {name: _point_info(column) for name, column in columns.items()},
                "holds": {name: self.holds(name) for name in columns},
                "header": self.header,
                "examples": self._description.all_examples(),
                "about": self._description.about,
                "config_hash": self._description.config_hash,
            }
            | ({"tokens": len(self._files.tokens)} if self._description.has_tokens else {})
            | ({"kept": self.kept} if self.kept else {})
        )

    def report(self, *, tokenizer: Any = None, found: Any = None) -> Any:
        """Return the page of `tlfast report` for a notebook, which shows it in place; needs the extra ``plot``.

        Args:
            tokenizer: an object with ``decode``, or the name of one, for texts; None: the dataset's, if it is here.
            found: what a search found here, `tlfast.score` or ``ds.search``, or the Parquet file of it: the page shows
                these examples with their text.
        """
        return makers["report"](self, tokenizer=tokenizer, found=found)

    def __repr__(self) -> str:
        n_bytes = sum(commit.n_bytes for commit in self._commits)
        units = f"{len(self._commits)} of {self.plan.n_units} units"
        lines = [f"GradientDataset({str(self.path)!r}): {len(self)} rows, {units}, {n_bytes / 1e6:.1f} MB"]
        lines += [f"  {self[name]!r}" for name in self.points[:8]]
        return "\n".join(lines + ([f"  and {len(self.points) - 8} more points"] if len(self.points) > 8 else []))

    def _repr_html_(self) -> str:
        columns = {point: (column, self.holds(point)) for point, column in self._description.columns.items()}
        return described(repr(self).splitlines()[0], columns)

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of a DataLoader open the files themselves, and see the units that are seen here.
        opened = functools.partial(GradientDataset, partial=self._partial, mapped=self._files.mapped)
        return opened, (self._store, self._description, self._commits)


def _point_info(column: Column) -> dict[str, Any]:
    more = {} if column.is_plain else {"of": column.of, "per": column.per, "encoding": column.encoding}
    return {"dtype": DTYPE_NAMES[column.dtype], "shape": list(column.row_shape)} | more
