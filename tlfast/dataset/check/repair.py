"""Repair a dataset: drop the commits of damaged units, so that the next run makes these units again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from ..errors import DatasetError, dataset_error
from ..format.commits import commit_path, data_path, read_folder, rows_path
from ..format.description import Description
from ..format.merged import read_parts
from ..format.plan import Unit
from ..places.durable import locked, sync_folder
from ..places.store import LocalStore, as_store
from .verify import Problem, Report, check_unit, is_damage, verify_dataset

_WHO = "repair_dataset"


@dataclass
class Repair:
    """What repair_dataset found and did."""

    found: Report
    dropped: list[str] = field(default_factory=list)  # units whose commits and files are gone
    left: list[Problem] = field(default_factory=list)  # what is still wrong

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more; units that are not there are for the next run to make."""
        return not self.left

    def __str__(self) -> str:
        lines = [str(self.found)]
        if self.dropped:
            lines += [f"dropped {', '.join(self.dropped)}: the next run of the same collection makes them again"]
        return "\n".join(lines + [f"not repaired: {problem}" for problem in self.left])


def repair_dataset(path: str | PathLike[str], *, progress: Callable[[int], None] | None = None) -> Repair:
    """Re-read every byte of the dataset in folder ``path`` and drop the units that are damaged, nothing else.

    Of a folder of merged datasets these are repaired, each where it lies.

    A dropped unit loses its commit, durably, and then its two files; the next run of the same collection makes it
    again, byte for byte. A unit that only can't be read here (no permission, no memory) stays, and so does a commit
    of a unit that the plan doesn't have.

    Args:
        path: the dataset's folder.
        progress: called with the number of bytes just read.

    Returns:
        A Repair: ``repair.ok``, ``repair.dropped`` and ``repair.left`` say it all.

    Raises:
        DatasetError: where dataset.json is damaged, or ``path`` no folder of this machine: nothing is changed then.
        OSError: where a file can't be removed.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, repair_dataset
        >>> out, plan = tempfile.mkdtemp(), Plan(1, 1)
        >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> writer.write_unit(plan.unit(0), {"h": torch.tensor([[3.0, 4.0]])}, [Example(0, [1], "a", 0, 1)])
        True
        >>> repair_dataset(out).dropped
        []
    """
    store = as_store(path)
    if not isinstance(store, LocalStore):
        raise dataset_error(_WHO, "path", "be a folder of this machine", path, "Repair a copy of it.")
    parts = read_parts(store, _WHO)
    repair = Repair(verify_dataset(store, partial=True, progress=progress))
    if parts is None:
        _drop_damaged(store, repair.found.problems, repair)
        return repair
    of_part: dict[str, list[Problem]] = {part.path: [] for part in parts}
    for problem in repair.found.problems:
        folder, _, unit = problem.unit.rpartition("/")
        if problem.damaged and folder in of_part:
            of_part[folder].append(replace(problem, unit=unit))
        else:
            repair.left.append(problem)
    for part in parts:
        place = part.store(store)
        if isinstance(place, LocalStore) and of_part[part.path]:
            _drop_damaged(place, of_part[part.path], repair, f"{part.path}/")
        else:
            repair.left += [replace(problem, unit=f"{part.path}/{problem.unit}") for problem in of_part[part.path]]
    return repair


def _drop_damaged(store: LocalStore, problems: Iterable[Problem], repair: Repair, above: str = "") -> None:
    """Drop the damaged units of one dataset; ``above`` comes before their names."""
    description, _ = read_folder(store, _WHO)  # raises where verify could not even begin
    for problem in problems:
        if problem.damaged:
            _drop(store, description.plan.unit_named(problem.unit), description, repair, above)
        else:
            repair.left.append(problem)


def _drop(store: LocalStore, unit: Unit, description: Description, repair: Repair, above: str = "") -> None:
    """Remove a unit's commit, and then its files, if it is damaged for certain."""
    with locked(store.folder):  # so that no other process gives the unit its names meanwhile
        try:
            check_unit(store, unit, description)
            return  # another process dropped it, and a third one made it again
        except (DatasetError, OSError) as error:
            if not is_damage(error):
                repair.left.append(Problem(f"{above}{unit.name}", str(error)))
                return
        for names in ((commit_path(unit),), (data_path(unit), rows_path(unit))):
            for name in names:
                _remove(store.folder / name)
            for folder in sorted({str(Path(name).parent) for name in names}):
                sync_folder(store.folder / folder)
        repair.dropped.append(f"{above}{unit.name}")


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            os.rmdir(path)  # an empty folder in the place of a file; a full one is an OSError, for people to look at
        else:
            path.unlink()
