"""Where the units of a remote dataset lie until they are uploaded: one folder per living process, found again later."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import dataset_error
from ..format import extension
from ..format.commits import FOLDERS
from ..format.description import FILE_NAME
from ..places.durable import remove_stale, sync_folder, write_small


def staging_root(url: str, config_hash: str, who: str, staging: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder under ``staging`` that belongs to this dataset at this URL, made if it is missing.

    ``staging`` is ``tlfast/staging`` in the user's cache folder if None. Another dataset at the URL has another folder.
    """
    if staging is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # XDG Base Directory Specification
        staging = Path(cache) / "tlfast" / "staging"
    root = Path(staging).absolute() / hashlib.sha256(f"{url}\n{config_hash}".encode()).hexdigest()[:16]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "Give a folder on a local disk by staging=."
        raise dataset_error(
            who, "staging", "be a folder that can be made", f"{root}: {error.strerror}", remedy
        ) from error
    return root


class Slot:
    """A numbered folder under a staging root, which one process has for itself until it closes it or dies."""

    def __init__(self, root: Path, number: int, lock: int) -> None:
        self.folder = root / str(number)
        self._lock = lock

    def close(self) -> None:
        """Give it back; units that lie in it stay."""
        if self._lock >= 0:
            if not self.holds_units():
                self.clear()
            os.close(self._lock)
            self._lock = -1

    def is_of(self, files: Mapping[str, bytes]) -> bool:
        """Whether what describes the dataset here are some or all of these files, byte for byte."""
        there = (self.folder / FILE_NAME, *(self.folder / extension.FOLDER).glob("*.json"))
        return all(
            files.get(str(path.relative_to(self.folder))) == path.read_bytes() for path in there if path.exists()
        )

    def describe(self, files: Mapping[str, bytes]) -> None:
        """Write the files that describe the dataset, and make its folders, those that are missing."""
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (self.folder / name).exists():
                write_small(self.folder / name, data, replace=False)

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def drop(self, name: str) -> None:
        """Remove unit ``name``: the commit first, so that a kill leaves no half of it that counts."""
        commit = self.folder / "commits" / f"{name}.json"
        commit.unlink(missing_ok=True)
        sync_folder(commit.parent)
        for path in (f"data/{name}.safetensors", f"rows/{name}.parquet"):
            (self.folder / path).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process left of units without a commit."""
        commits = self.folder / "commits"
        whole = {path.stem for path in commits.iterdir()} if commits.is_dir() else set()
        for folder in filter(Path.is_dir, (self.folder, commits)):
            remove_stale(folder)
        for part in FOLDERS[:2]:
            if (self.folder / part).is_dir():
                for path in (self.folder / part).iterdir():
                    if path.stem not in whole:
                        path.unlink(missing_ok=True)

    def holds_units(self) -> bool:
        """Whether some unit waits here for its upload."""
        commits = self.folder / "commits"
        return commits.is_dir() and any(path.suffix == ".json" for path in commits.iterdir())


def claim(root: Path, who: str) -> Slot:
    """Return the first slot that no living process has."""
    return next(slot for number in range(1 << 20) if (slot := _try(root, number, who)) is not None)


def abandoned(root: Path, who: str) -> Iterator[Slot]:
    """Claim the slots in which dead processes have left units; the others are left alone."""
    for lock in sorted(root.glob("*.lock"), key=lambda path: (len(path.name), path.name)):
        if lock.stem.isdigit() and (slot := _try(root, int(lock.stem), who)) is not None:
            if slot.holds_units():
                yield slot
            else:
                slot.close()


def _try(root: Path, number: int, who: str) -> Slot | None:
    lock = os.open(root / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError as error:
        os.close(lock)
        remedy = "Give one on a local disk by staging=."
        raise dataset_error(who, "staging", "lie where files can be locked", f"{root}: {error}", remedy) from error
    return Slot(root, number, lock)
