"""The units of a dataset at a URL: written to a staging folder, and uploaded from there in the background."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..check.verify import verify_dataset
from ..errors import DatasetError
from ..format.commits import committed_names, read_commit
from ..format.description import FILE_NAME, MAX_BYTES, Description
from ..format.plan import Unit
from ..places.write_store import WriteUrl
from .staging import Slot, abandoned, claim, staging_root
from .upload import Uploader


class StagedUnits:
    """A slot of the staging folder, and the slots that dead processes have left units in.

    A unit that is written is durable in the slot, and will be at the URL after `flush`, or after the next run of the
    same process. See docs/remote.md.
    """

    waits_for = "the upload"

    def __init__(
        self, store: WriteUrl, config_hash: str, staging: str | os.PathLike[str] | None, max_staged: int, who: str
    ) -> None:
        self.waited_s = 0.0
        self._store = store
        self._max_staged = max_staged
        self._root: Path = staging_root(store.url, config_hash, who, staging)
        self.folder = self._root
        self._slots: list[Slot] = []
        self._uploader: Uploader | None = None
        self._who = who

    def freed(self, removed: Sequence[str]) -> int:
        """Return nothing: they are elsewhere."""
        return 0

    def remove_unused(self, description: Description, who: str) -> None:
        """Remove nothing: nobody can see at a URL whether others are at work."""

    def enter(self, who: str) -> None:
        """Claim a slot, and those that are left alone."""
        own = claim(self._root, who)
        self.folder = own.folder
        self._slots = [own, *abandoned(self._root, who)]

    def begin(self, description: Description, done: set[str], who: str) -> set[str]:
        """Have the units uploaded that are staged whole; return their names."""
        self._description = description
        self._uploader = Uploader(self._store, description)
        files = {FILE_NAME: self._store.read(FILE_NAME, who, MAX_BYTES)}
        files |= {extension.path: extension.to_bytes() for extension in description.extensions}
        staged = [(slot, name) for slot in self._slots for name in _whole(slot, files, done)]
        self._slots[0].describe(files)
        for slot, name in staged:
            self._uploader.add(slot, read_commit(slot.folder, name, description, who))
        return {name for _, name in staged}

    def still_there(self) -> bool:
        """The slot is this process's alone."""
        return True

    def wait_for_room(self) -> None:
        """Wait until fewer than ``max_staged`` units are here; UploadError where an upload has failed."""
        self._uploads().wait_for(self._max_staged - 1)

    def written(self, unit: Unit) -> None:
        """Have it uploaded."""
        commit = read_commit(self.folder, unit.name, self._description, self._who)
        self._uploads().add(self._slots[0], commit)

    def extended(self, description: Description) -> None:
        """Keep the extension beside the staged units."""
        self._description = self._uploads().description = description
        added = description.extensions[-1]
        self._slots[0].describe({added.path: added.to_bytes()})

    def flush(self, time_s: float | None) -> bool:
        """Wait until every unit is at the URL; False if ``time_s`` seconds were not enough; raises UploadError."""
        start = time.monotonic()
        try:
            return self._uploads().wait_for(0, time_s)
        finally:
            self.waited_s += time.monotonic() - start

    def still_to_do(self) -> str:
        """Return how many units wait where."""
        n = self._uploads().n_staged
        return f", {n} of them in {self._root} still to be uploaded" if n else ""

    def release(self, wait: bool) -> None:
        """End the uploads after the unit that is on its way, and give the slots back; what is staged stays."""
        if self._uploader is not None:
            self._uploader.close(wait=wait)
        for slot in self._slots:
            slot.close()

    def _uploads(self) -> Uploader:
        assert self._uploader is not None, "begin comes first"
        return self._uploader


def _whole(slot: Slot, files: Mapping[str, bytes], done: set[str]) -> list[str]:
    """Return the units staged in a slot that are still needed; remove everything else there."""
    if not slot.is_of(files):
        slot.clear()
    slot.sweep()
    if not slot.holds_units():
        return []
    slot.describe(files)
    for problem in verify_dataset(slot.folder, partial=True).problems:
        if not problem.damaged:
            raise DatasetError(str(problem))
        slot.drop(problem.unit)
    names = committed_names(slot.folder, "DatasetWriter")
    for name in done.intersection(names):
        slot.drop(name)
    return [name for name in names if name not in done]
