"""Reading a dataset: points as columns of rows, examples beside them, nothing loaded before it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .columns import GradientColumn
from .commits import read_commits, read_folder
from .description import skipped_examples
from .errors import dataset_error
from .hub import OnHub
from .layout import DTYPE_NAMES
from .plan import Plan, Unit
from .rows import ExampleTable
from .store import LocalStore, Store, as_store
from .unit_files import UnitFiles
from .verify import Report, check_unit, missing_names, verify_dataset

_WHO = "open_dataset"


def open_dataset(path: str | PathLike[str] | Store, *, partial: bool = False) -> GradientDataset:
    """Open the dataset in folder ``path`` for reading.

    Args:
        path: the folder that tlfast wrote, or another store that holds one.
        partial: open it although units are missing; rows are then those of the committed units, in order.

    Returns:
        A GradientDataset: ``ds.points``, ``len(ds)``, ``ds[point][rows]``, ``ds.examples[row]``.

    Raises:
        DatasetError: where the folder is no dataset, is damaged, or lacks units.

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
    return GradientDataset(path, partial=partial)


class GradientDataset(OnHub):
    """A dataset of gradients; made by open_dataset."""

    def __init__(self, path: str | PathLike[str] | Store, *, partial: bool = False) -> None:
        self._store = as_store(path)
        self._partial = partial
        description, names = read_folder(self._store, _WHO)
        self._description = description
        self._commits = read_commits(self._store, description, _WHO, names)
        absent = description.plan.n_units - len(self._commits)
        if absent and not partial:
            first = ", ".join(missing_names(description, [commit.unit.name for commit in self._commits], 3))
            rule = f"hold all {description.plan.n_units} units of its plan"
            remedy = "Run the collection again to complete it, or open it with partial=True."
            raise dataset_error(_WHO, "path", rule, f"{self.path} without {absent} ({first}, ...)", remedy)
        self._files = UnitFiles(self._store, self._commits, description.columns, mapped=self._store.maps)
        self.examples = ExampleTable(self._store, [commit.unit for commit in self._commits], list(description.columns))

    @property
    def path(self) -> Path | str:
        """The folder, or the URL, of the dataset."""
        return self._store.folder if isinstance(self._store, LocalStore) else self._store.where("").rstrip("/")

    @property
    def points(self) -> list[str]:
        """The names of the points, in the order of the collection."""
        return list(self._description.columns)

    @property
    def header(self) -> dict[str, Any]:
        """How the data were made: the header that the writer was given."""
        return self._description.header

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

    def __len__(self) -> int:
        return sum(len(commit.unit) for commit in self._commits)

    def __contains__(self, point: object) -> bool:
        return point in self._description.columns

    def __getitem__(self, point: str) -> GradientColumn:
        """Return the rows of ``point``, lazily; KeyError where there is no such point."""
        if point not in self._description.columns:
            known = ", ".join(self.points[:5]) + (", ..." if len(self.points) > 5 else "")
            raise KeyError(f"GradientDataset: point must be one of {known}, got {point!r}. See ds.points.")
        return GradientColumn(point, self._description.columns[point], self._files)

    def norms(self, point: str) -> torch.Tensor:
        """Return the float32 L2 norm of every row of ``point`` from the row tables: shape [rows]."""
        self[point]
        return self.examples.norms(point)

    def verify(self, progress: Callable[[int], None] | None = None) -> Report:
        """Re-read every byte against its checksum; see verify_dataset."""
        return verify_dataset(self._store, partial=self._partial, progress=progress)

    def verify_unit(self, unit: Unit) -> None:
        """Re-read every byte of one unit against its checksum; DatasetError where something is wrong."""
        check_unit(self._store, unit, self._description)

    def info(self) -> dict[str, Any]:
        """Return what is inside, as JSON-able values; reads nothing."""
        columns = self._description.columns
        return {
            "path": str(self.path),
            "rows": len(self),
            "planned_rows": self.plan.n_examples,
            "units": len(self._commits),
            "planned_units": self.plan.n_units,
            "bytes": sum(commit.n_bytes for commit in self._commits),
            "non_finite_rows": sum(commit.non_finite for commit in self._commits),
            "points": {
                name: {"dtype": DTYPE_NAMES[c.dtype], "shape": list(c.row_shape)} for name, c in columns.items()
            },
            "header": self.header,
            "about": self._description.about,
            "config_hash": self._description.config_hash,
        }

    def __repr__(self) -> str:
        n_bytes = sum(commit.n_bytes for commit in self._commits)
        units = f"{len(self._commits)} of {self.plan.n_units} units"
        lines = [f"GradientDataset({str(self.path)!r}): {len(self)} rows, {units}, {n_bytes / 1e6:.1f} MB"]
        lines += [f"  {self[name]!r}" for name in self.points[:8]]
        return "\n".join(lines + ([f"  and {len(self.points) - 8} more points"] if len(self.points) > 8 else []))

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of a DataLoader open the files themselves.
        return _reopen, (self._store, self._partial)


def _reopen(store: Store, partial: bool) -> GradientDataset:
    return GradientDataset(store, partial=partial)
