"""Where a dataset's files are made, as whoever writes it sees it: small files, whole or absent, by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

from .durable import sync_folder, write_small
from .remote import local_path, url_of
from .remote_store import RemoteStore
from .store import LocalStore, Store


class WriteStore(Store, Protocol):
    """A place that a dataset is written to: a Store, and what is done there. Every file is whole, or not there."""

    noun: str  # what `out` is, for people: "folder" or "URL"
    empty: str  # what it must be before there is a dataset

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name."""
        ...

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return whether each entry of a folder is a folder itself; {} where nothing is; no link is followed."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Make a file, durably; False where there is one of this name, which stays: the first wins."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Make a file, durably, in the place of what has its name: for what only people read."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def warn_unless_first_wins(self, who: str) -> None:
        """Warn where `create` replaces what is there: each unit must have one writer at a time then."""
        ...

    def make_folders(self, names: Sequence[str]) -> None:
        """Make folders, unless they are there; the place itself is ""."""
        ...

    def remove_folders(self, names: Sequence[str]) -> None:
        """Remove folders, which are empty, where they are there."""
        ...

    def sync(self) -> None:
        """Make durable which files and folders the place has, and that there is such a place."""
        ...


class WriteFolder(LocalStore):
    """A folder of this machine that is written to."""

    noun = "folder"
    empty = "a new or empty folder"

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name, a broken link too."""
        return os.path.lexists(self.folder / name)

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return the entries."""
        try:
            with os.scandir(self.folder / folder) as found:
                return {entry.name: entry.is_dir(follow_symlinks=False) for entry in found}
        except FileNotFoundError:
            return {}

    def create(self, name: str, data: bytes) -> bool:
        """Make a file, by link()."""
        return write_small(self.folder / name, data, replace=False)

    def replace(self, name: str, data: bytes) -> None:
        """Make a file, by rename()."""
        write_small(self.folder / name, data, replace=True)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink(missing_ok=True)

    def warn_unless_first_wins(self, who: str) -> None:
        """The first wins on every filesystem."""

    def make_folders(self, names: Sequence[str]) -> None:
        """Make the folders."""
        for name in names:
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def remove_folders(self, names: Sequence[str]) -> None:
        """Remove the folders."""
        for name in names:
            if (self.folder / name).is_dir():
                (self.folder / name).rmdir()

    def sync(self) -> None:
        """Sync the folder and the one that it lies in."""
        sync_folder(self.folder)
        sync_folder(self.folder.parent)


class WriteUrl(RemoteStore):
    """A URL that is written to. Its folders are the names of objects alone, and what is made is durable at once."""

    noun = "URL"
    empty = "an empty place"

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        return self.folder.exists(name)

    def entries(self, folder: str = "") -> dict[str, bool]:
        """Return the entries."""
        return {name: size is None for name, size in self.folder.sizes(folder).items()}

    def create(self, name: str, data: bytes) -> bool:
        """Make an object, by conditional put."""
        return self.folder.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Make an object, by put."""
        self.folder.replace(name, data)

    def remove(self, name: str) -> None:
        """Remove an object."""
        self.folder.remove(name)

    def warn_unless_first_wins(self, who: str) -> None:
        """Try it on an object of our own."""
        if not self.folder.refuses_to_replace():
            warnings.warn(
                f"{who}: {self.url} has no conditional put: give each unit one writer at a time. See docs/remote.md.",
                RuntimeWarning,
                stacklevel=2,
            )

    def make_folders(self, names: Sequence[str]) -> None:
        """There are none."""

    def remove_folders(self, names: Sequence[str]) -> None:
        """There are none."""

    def sync(self) -> None:
        """There is nothing to be done."""


def as_write_store(place: str | PathLike[str] | WriteFolder | WriteUrl) -> WriteFolder | WriteUrl:
    """Return what writes to a path or a URL; a store is returned as it is."""
    if isinstance(place, (WriteFolder, WriteUrl)):
        return place
    url = url_of(local_path(place))
    return WriteUrl(url) if url else WriteFolder(Path(local_path(place)))
