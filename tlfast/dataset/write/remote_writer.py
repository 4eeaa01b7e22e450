"""Writing a dataset to a URL: the same units and the same protocol in a staging folder, uploaded in the background."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from ..check.verify import verify_dataset
from ..errors import DatasetError, dataset_error
from ..format.card import dataset_card
from ..format.commits import commit_path, committed_names, read_commit, read_commits
from ..format.description import (
    FILE_NAME,
    MAX_BYTES,
    Description,
    describe,
    differences,
    read_description,
)
from ..format.encodings import Encoded
from ..format.plan import Example, Plan, Unit
from ..places.remote import local_path, url_of
from ..places.remote_store import RemoteStore
from .remote_folder import clear_at, create_at, is_dataset, publish_extension_at, refuse_stranger_at
from .staging import Slot, abandoned, claim, staging_root
from .upload import Uploader
from .writer import DatasetWriter, as_yaml

_WHO = "DatasetWriter"
MAX_STAGED = 4  # units on the local disk: one is written, one on its way, two for a store that stutters


class LocalWriter(DatasetWriter):
    """A DatasetWriter with the rest of RemoteWriter's face: a unit is where it belongs as soon as it is written."""

    waits_for = "the disk"
    waited_s = 0.0

    def flush(self, time_s: float | None = None) -> bool:
        """There is nothing to wait for."""
        return True

    def abandon(self) -> None:
        """Nor anything to leave."""

    def still_to_do(self) -> str:
        """Return what is to be said of units that are elsewhere: nothing."""
        return ""

    def __enter__(self) -> LocalWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left to do."""
        self.end_work()


class RemoteWriter:
    """Create the dataset at a URL, or continue the one that is there; as DatasetWriter, which it drives.

    A unit that `write_unit` has returned for is durable in the staging folder and will be at the URL after `close`, or
    after the next run of the same process. See docs/remote.md.

    Args:
        url: such as ``s3://bucket/folder``.
        header, columns, plan, config, overwrite, about, backend: as for DatasetWriter.
        staging: a folder on a local disk; None: ``tlfast/staging`` in the user's cache folder.
        max_staged: units in it, at most; `write_unit` waits for more room.

    Raises:
        DatasetError: as DatasetWriter.
        UploadError: from `write_unit` and `close`, where an upload has failed for good.
        OSError: where the store can't be reached.
    """

    waits_for = "the upload"

    def __init__(
        self,
        url: str,
        *,
        header: Mapping[str, Any],
        columns: Mapping[str, Any],
        plan: Plan,
        config: str | Mapping[str, Any] = "",
        overwrite: bool = False,
        about: Mapping[str, Any] | None = None,
        backend: str = "auto",
        staging: str | os.PathLike[str] | None = None,
        max_staged: int = MAX_STAGED,
    ) -> None:
        self.out = url
        self.waited_s = 0.0  # in flush
        self._abandoned = False
        self._max_staged = max_staged
        self._store = RemoteStore(url)
        description = describe(_WHO, header, columns, plan, about)
        refuse_stranger_at(self._store, _WHO)
        if overwrite and is_dataset(self._store, _WHO):
            clear_at(self._store, _WHO)
        create_at(self._store, description, as_yaml(config), dataset_card(description), _WHO)
        self.description = self._same(description)
        self.columns = self.description.columns
        self.plan = self.description.plan
        self.done = {commit.unit.name for commit in read_commits(self._store, self.description, _WHO)}
        root = staging_root(url, description.config_hash, _WHO, staging)
        own = claim(root, _WHO)
        self._slots = [own, *abandoned(root, _WHO)]
        self._uploader = Uploader(self._store, self.description)
        files = {FILE_NAME: self._store.read(FILE_NAME, _WHO, MAX_BYTES)}
        files |= {extension.path: extension.to_bytes() for extension in self.description.extensions}
        try:
            staged = [(slot, name) for slot in self._slots for name in self._whole(slot, files)]
            own.describe(files)
            self._local = DatasetWriter(
                own.folder, header=header, columns=columns, plan=plan, backend=backend, max_units=max_staged
            )
            for slot, name in staged:
                self._uploader.add(slot, read_commit(slot.folder, name, self.description, _WHO))
                self.done.add(name)
        except BaseException:
            self._release()
            raise

    def _same(self, description: Description) -> Description:
        there = read_description(self._store, _WHO)
        if there.config_hash != description.config_hash:
            what = "; ".join(differences(there, description))
            what += "" if committed_names(self._store, _WHO) else "; it has no unit"
            remedy = "Use the same settings to continue it, another URL, or overwrite it."
            raise dataset_error(_WHO, "out", "be the same dataset to continue it", f"{self.out}: {what}", remedy)
        return there

    def _whole(self, slot: Slot, files: Mapping[str, bytes]) -> list[str]:
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
        names = committed_names(slot.folder, _WHO)
        for name in self.done.intersection(names):
            slot.drop(name)
        return [name for name in names if name not in self.done]

    def committed(self) -> set[str]:
        """Look up the names of all units that have a commit at the URL by now, whichever process made it."""
        with suppress(OSError):  # a store that stutters: then it is not known, which costs work and nothing else
            self.done |= set(committed_names(self._store, _WHO))
        return set(self.done)

    def extend(self, n_examples: int, examples: Mapping[str, Any], config: str | Mapping[str, Any] = "") -> None:
        """Add examples to the plan for good, as DatasetWriter.extend."""
        new = self.description.extended(n_examples, examples)
        cards = (dataset_card(self.description), dataset_card(new))
        publish_extension_at(self._store, new, as_yaml(config), cards, _WHO)
        self._local.extend(n_examples, examples)
        self.description, self.plan = new, new.plan

    @property
    def bytes_written(self) -> int:
        """Bytes written to the staging folder until now."""
        return self._local.bytes_written

    @bytes_written.setter
    def bytes_written(self, n_bytes: int) -> None:
        self._local.bytes_written = n_bytes

    def write_unit(
        self,
        unit: Unit,
        tensors: Mapping[str, torch.Tensor | Encoded],
        examples: Sequence[Example],
        flags: Sequence[int] | None = None,
    ) -> bool:
        """Write one unit to the staging folder, durably, and have it uploaded; as DatasetWriter.write_unit.

        Raises:
            UploadError: where the upload of an earlier unit has failed.
        """
        self._uploader.wait_for(self._max_staged - 1)
        with suppress(OSError):  # the upload looks again, patiently
            if self._store.folder.exists(commit_path(unit)):
                self.done.add(unit.name)
                return False
        slot = self._slots[0]
        self._local.write_unit(unit, tensors, examples, flags)
        self._uploader.add(slot, read_commit(slot.folder, unit.name, self.description, _WHO))
        self.done.add(unit.name)
        return True

    def still_to_do(self) -> str:
        """Return what is to be said of units that are not at the URL yet; nothing if they all are."""
        n = self._uploader.n_staged
        return f", {n} of them in {self._slots[0].folder.parent} still to be uploaded" if n else ""

    def flush(self, time_s: float | None = None) -> bool:
        """Wait until every unit is at the URL; False if ``time_s`` seconds were not enough; raises UploadError."""
        start = time.monotonic()
        try:
            return self._uploader.wait_for(0, time_s)
        finally:
            self.waited_s += time.monotonic() - start

    def abandon(self) -> None:
        """Let nothing be waited for: a unit that is being uploaded is whole later, or never exists."""
        self._abandoned = True

    def close(self) -> None:
        """Wait until every unit is at the URL; raises a failure as UploadError."""
        try:
            self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        self._uploader.close(wait=not self._abandoned)
        for slot in self._slots:
            slot.close()

    def __enter__(self) -> RemoteWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # the units that wait are uploaded by the next run
            self._release()


def open_writer(
    out: str | os.PathLike[str],
    *,
    staging: str | os.PathLike[str] | None = None,
    replace_unused: bool = False,
    **arguments: Any,
) -> LocalWriter | RemoteWriter:
    """Return what writes the dataset at ``out``, a path or a URL, with the arguments of DatasetWriter.

    At a URL nothing is replaced but by ``overwrite``: nobody can see there whether others are at work.
    """
    place = local_path(out)
    if url := url_of(place):
        return RemoteWriter(url, staging=staging, **arguments)
    return LocalWriter(place, replace_unused=replace_unused, **arguments)
