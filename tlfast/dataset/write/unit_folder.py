"""The folder that units are written to: that of the dataset itself, which other writers may be at as well."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from weakref import finalize

from ..errors import DatasetError
from ..format.commits import FOLDERS, check_folders
from ..format.description import FILE_NAME, Description, read_description
from ..format.extension import FOLDER as EXTENSIONS
from ..format.plan import Unit
from ..places.durable import LOCK_NAME, hold, locked, remove_stale
from ..places.write_store import WriteFolder
from .folder import OURS, holds_dataset, our_files


class UnitFolder(Protocol):
    """A folder on this machine where units are written, and what becomes of them there."""

    folder: Path
    waits_for: str  # what a unit waits for that is written and not yet where it belongs
    waited_s: float  # how long `flush` has waited

    def freed(self, removed: Sequence[str]) -> int:
        """Return the bytes that are free in the folder when these files of the dataset are removed."""
        ...

    def remove_unused(self, description: Description, who: str) -> None:
        """Remove another dataset that was begun and has no unit, where it can be seen that nobody is at work on it."""
        ...

    def enter(self, who: str) -> None:
        """Let others see that units may be written here, until `release`, or until this process is gone."""
        ...

    def begin(self, description: Description, done: set[str], who: str) -> set[str]:
        """Make room for the units that are not ``done``; return those of them that are here."""
        ...

    def still_there(self) -> bool:
        """Whether this is still the folder of the same dataset, as far as that is seen without reading it."""
        ...

    def wait_for_room(self) -> None:
        """Wait until one more unit may be written; raises what has befallen an earlier one."""
        ...

    def written(self, unit: Unit) -> None:
        """A unit is whole in the folder."""
        ...

    def extended(self, description: Description) -> None:
        """The dataset has another extension, the last of this description."""
        ...

    def flush(self, time_s: float | None) -> bool:
        """Wait until every unit is where it belongs; False if ``time_s`` seconds were not enough."""
        ...

    def still_to_do(self) -> str:
        """Return what is to be said of units that are not where they belong yet; nothing if they all are."""
        ...

    def release(self, wait: bool) -> None:
        """End all work, after what is on its way if ``wait``."""
        ...


class OwnFolder:
    """The dataset's own folder: a unit is where it belongs as soon as it is written."""

    waits_for = "the disk"
    waited_s = 0.0

    def __init__(self, store: WriteFolder) -> None:
        self.folder = store.folder
        self._store = store
        self._held: int | None = None  # None where the mount has no locks, too
        self._released = False
        self._close: finalize[..., OwnFolder] | None = None

    def freed(self, removed: Sequence[str]) -> int:
        """Return the bytes of these files."""
        return sum((self.folder / name).lstat().st_size for name in removed if (self.folder / name).exists())

    def remove_unused(self, description: Description, who: str) -> None:
        """Remove it unless a writer of it is alive.

        Of several who find it one removes it; the others wait, and then find what the first has made in its place.
        """
        with suppress(DatasetError):  # one that another removes meanwhile; what is damaged is found again below
            if self._is(description, who):
                return
        with locked(self.folder):  # whose file stays: others wait for it
            if not holds_dataset(self._store, who) or self._is(description, who):
                return
            commits = self.folder / "commits"
            if commits.is_symlink() or not commits.is_dir():  # a kill came before it was made, or after it was removed
                self._remove_remains(who)
            elif not any(map(OURS["commits"].fullmatch, os.listdir(commits))):
                alone = hold(commits, alone=True)
                if alone is not None:
                    try:
                        self._remove_remains(who)
                    finally:
                        os.close(alone)

    def _is(self, description: Description, who: str) -> bool:
        return read_description(self._store, who).config_hash == description.config_hash

    def _remove_remains(self, who: str) -> None:
        for name in our_files(self._store, who):
            if name not in (LOCK_NAME, FILE_NAME):
                self._store.remove(name)
        self._store.remove_folders(list(OURS))
        self._store.sync()
        self._store.remove(FILE_NAME)  # the last, so that a kill leaves remains
        self._store.sync()

    def enter(self, who: str) -> None:
        """Hold a lock that is shared with other writers."""
        # Not on dataset.json: a kill may leave a temporary name of it, whose lock would say that its writer is alive.
        check_folders(self.folder, who)
        self._held = hold(self.folder / "commits")
        self._close = finalize(self, os.close, self._held) if self._held is not None else None

    def begin(self, description: Description, done: set[str], who: str) -> set[str]:
        """Remove the temporary files of writers that are dead."""
        check_folders(self.folder, who)
        sweep(self.folder)
        return set()

    def still_there(self) -> bool:
        """Whether no other process has put another dataset in the place of this one."""
        if self._released:  # then nobody keeps others from it
            return False
        if self._held is None:
            return True
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._held), os.stat(self.folder / "commits"))
        return False

    def wait_for_room(self) -> None:
        """There is room."""

    def written(self, unit: Unit) -> None:
        """It is where it belongs."""

    def extended(self, description: Description) -> None:
        """The extension lies here already."""

    def flush(self, time_s: float | None) -> bool:
        """There is nothing to wait for."""
        return True

    def still_to_do(self) -> str:
        """Nothing."""
        return ""

    def release(self, wait: bool) -> None:
        """Give up the lock."""
        self._released, self._held = True, None
        if self._close is not None:
            self._close()


def sweep(out: Path) -> None:
    """Remove the temporary files in a dataset's folder whose writers are dead."""
    for folder in (out, *(out / name for name in (*FOLDERS, EXTENSIONS))):
        if folder.is_dir() and not folder.is_symlink():
            remove_stale(folder)
