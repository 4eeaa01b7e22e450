"""A thread that uploads staged units to a URL, commits them there by conditional put, and removes them here."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from ...errors import broken_rule
from ..errors import dataset_error
from ..format.commits import Commit, CommittedFile, commit_path, path_with_crc, read_commit
from ..format.description import Description
from ..places.remote import DEFINITE
from ..places.remote_store import RemoteStore
from .staging import Slot

_WHO = "upload"
# Ten minutes: a store's failover takes as long. The library of the store has tried several times before each of these.
_PAUSES_S: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 60, 120, 180, 180)


class UploadError(OSError):
    """What is staged could not be uploaded: it stays there, and what is committed stays committed."""


class Uploader:
    """Uploads units in a thread, one after the other, each made of several requests at once by fsspec.

    Objects are never replaced. Where another process has put other bytes under a unit's name without committing them
    (it died, or is about to commit), ours get a name with their CRC32C in it, and the first commit decides.
    """

    def __init__(self, store: RemoteStore, description: Description) -> None:
        self._store = store
        self.description = description
        self._jobs: deque[tuple[Slot, Commit]] = deque()  # the first one is being uploaded
        self._error: BaseException | None = None
        self._stop = False
        self._changed = threading.Condition()
        # A daemon: a caller that dies without close() must not wait for ever; what is staged is uploaded next time.
        self._thread = threading.Thread(target=self._run, name="tlfast-upload", daemon=True)
        self._thread.start()

    @property
    def n_staged(self) -> int:
        """Units that are not uploaded yet."""
        return len(self._jobs)

    def add(self, slot: Slot, commit: Commit) -> None:
        """Upload a unit that is committed in its slot; raises an earlier failure as UploadError."""
        with self._changed:
            self._raise()
            self._jobs.append((slot, commit))
            self._changed.notify_all()

    def wait_for(self, n_staged: int, time_s: float | None = None) -> bool:
        """Wait until at most so many units are not uploaded; False if ``time_s`` seconds were not enough.

        Raises a failure as UploadError.
        """
        end = None if time_s is None else time.monotonic() + time_s
        with self._changed:
            while len(self._jobs) > n_staged:
                left_s = 1.0 if end is None else end - time.monotonic()
                if left_s <= 0:
                    return False
                self._raise()
                if not self._thread.is_alive():
                    remedy = "Open a dataset after forking, not before."
                    raise RuntimeError(broken_rule(_WHO, "thread", "be alive", "none", remedy))
                self._changed.wait(min(1.0, left_s))
            self._raise()
            return True

    def close(self, wait: bool = True) -> None:
        """End the thread after the unit that is on its way, and wait for that; what is staged stays so."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if wait:
            self._thread.join()

    def _raise(self) -> None:
        if self._error is None:
            return
        slot, commit = self._jobs[0]
        rule = f"take unit {commit.unit.name}"
        got = f"<{type(self._error).__name__}: {' '.join(str(self._error).split())}>"
        remedy = (
            f"What is committed stays; {len(self._jobs)} units wait in {slot.folder.parent} for the same command again."
        )
        raise UploadError(broken_rule(_WHO, self._store.where(""), rule, got, remedy)) from self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stop)
                if self._stop:
                    return
                slot, commit = self._jobs[0]
            try:
                self._patiently(commit.unit.name, lambda: self._upload(slot, commit))  # noqa: B023 (called at once)
                slot.drop(commit.unit.name)
            except BaseException as error:  # whatever it was, the caller must hear of it
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._jobs.popleft()
                self._changed.notify_all()

    def _patiently(self, name: str, work: Callable[[], None]) -> None:
        for pause_s in _PAUSES_S:
            error = _failure(work)
            if error is None:
                return
            text = " ".join(str(error).split())
            print(f"{_WHO}: {name} is tried again in {pause_s:g} s: {text}", file=sys.stderr, flush=True)
            with self._changed:
                if self._changed.wait_for(lambda: self._stop, pause_s):
                    raise error
        work()

    def _upload(self, slot: Slot, commit: Commit) -> None:
        path = commit_path(commit.unit)
        if self._store.folder.exists(path):
            return
        unit_file, row_table = (self._place(slot, file) for file in commit.files)
        ours = commit._replace(files=(unit_file, row_table))
        won = self._store.folder.create(path, ours.to_bytes())
        if won and ours == commit:
            return
        # Nothing of this unit can be committed any more: what its commit doesn't name can go, whoever put it there.
        winner = ours if won else read_commit(self._store, commit.unit.name, self.description, _WHO)
        for file in {*commit.files, *ours.files} - set(winner.files):
            if file.path not in {named.path for named in winner.files}:
                self._store.folder.remove(file.path)

    def _place(self, slot: Slot, file: CommittedFile) -> CommittedFile:
        """Put a file of a unit under its name, or under the one with its CRC32C where other bytes have the first."""
        for path in (file.path, path_with_crc(file.path, file.crc32c)):
            there = self._store.folder.create_from(path, slot.folder / file.path)
            if there or self._store.folder.holds(path, file.n_bytes, file.crc32c):
                return file._replace(path=path)
        rule = f"have the CRC32C {file.crc32c:08x} of its name"
        remedy = "Remove this object: no commit names it."
        raise dataset_error(_WHO, self._store.where(path), rule, "other bytes", remedy)


def _failure(work: Callable[[], None]) -> OSError | None:
    """Do it; return the failure after which it is worth trying again."""
    try:
        work()
    except DEFINITE:
        raise
    except OSError as error:
        return error
    return None
