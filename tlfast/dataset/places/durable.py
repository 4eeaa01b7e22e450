"""Files that are whole or absent: temporary name, CRC32C on the way, fsync, then the name."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import dataset_error, extra

LOCK_NAME = ".lock"
TEMPORARY = re.compile(r"\.tlfast-[0-9a-f]{16}\.tmp", re.ASCII)

# A filesystem that cannot reserve space says one of these; the write itself then finds the full disk.
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def crc32c(data: Any, crc: int = 0) -> int:
    """Continue the CRC32C ``crc`` with ``data`` (bytes or a contiguous uint8 array)."""
    # google-crc32c: the CPU's instruction (13 GB/s and more), wheels for every platform, kept by Google, Apache-2.0.
    return int(extra("google_crc32c", "tlfast.dataset").extend(crc, data))


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        # Some network filesystems are mounted without locks; a unit must then have one writer at a time.
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a dataset folder; the kernel drops it where the process dies."""
    fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def hold(folder: Path, *, alone: bool = False) -> int | None:
    """Open a folder and hold a lock on it: with all others who hold it, or ``alone``.

    Returns the descriptor, which holds it until it is closed; None where others hold it, or it can't be locked.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def write_all(fd: int, data: memoryview, at: int, path: Path) -> None:
    """Write all of ``data`` at an offset; an OSError names ``path``."""
    while data:
        try:
            n = os.pwrite(fd, data, at)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if n == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        data, at = data[n:], at + n


class PendingFile:
    """A file of known size, written under a temporary name beside its final one.

    Nothing bears the final name before ``seal`` (fsync) and ``rename`` or ``link``. Leaving the ``with`` block removes
    the temporary file. Its lock tells other processes that it is alive (see remove_stale).
    """

    def __init__(self, final: Path, n_bytes: int) -> None:
        self.final = final
        self.n_bytes = n_bytes
        self.crc = 0
        self.position = 0  # where the next byte goes
        self._header = b""
        self._temporary, self.fd = _create_locked(final.parent)
        try:
            self._reserve()
        except BaseException:
            self.discard()
            raise

    def _reserve(self) -> None:
        # Reserving first turns a full disk into an error here, before the minutes of writing.
        if self.n_bytes and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.fd, 0, self.n_bytes)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise OSError(
                        error.errno, f"{error.strerror} reserving {self.n_bytes} bytes", str(self.final)
                    ) from None

    def start_with(self, header: bytes) -> None:
        """Count ``header`` as the first bytes; it is written last, so that a torn file is invalid to every reader."""
        self._header = header
        self.crc = crc32c(header, self.crc)
        self.position = len(header)

    def append(self, data: bytes | np.ndarray[Any, Any]) -> None:
        """Write ``data`` (bytes or a contiguous array) behind what is there."""
        array = np.frombuffer(data, dtype=np.uint8)
        self.crc = crc32c(array, self.crc)
        write_all(self.fd, array.data, self.position, self.final)
        self.position += array.size

    def seal(self) -> None:
        """Make the content durable; the file then has exactly ``n_bytes``."""
        write_all(self.fd, memoryview(self._header), 0, self.final)
        size = os.fstat(self.fd).st_size
        if not self.position == size == self.n_bytes:
            raise RuntimeError(f"{self.final}: wrote {self.position} bytes into {size}, planned {self.n_bytes}")
        getattr(os, "fdatasync", os.fsync)(self.fd)  # the times of a file may be lost, its size may not

    def rename(self) -> None:
        """Give the file its name, replacing what has it; sync_folder makes that durable."""
        os.replace(self._temporary, self.final)

    def link(self) -> bool:
        """Give the file its name unless another has it (first wins); False then. Durable after sync_folder."""
        try:
            os.link(self._temporary, self.final)
        except FileExistsError:
            return False
        return True

    def discard(self) -> None:
        """Remove the temporary name, if it is still there, and close."""
        if self.fd >= 0:
            with suppress(OSError):  # already named, or not removable now: the next run removes it
                os.unlink(self._temporary)
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> PendingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _create_locked(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f".tlfast-{secrets.token_hex(8)}.tmp"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _lock(fd)
            if os.fstat(fd).st_nlink:  # else remove_stale took it between open and flock
                return path, fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def remove_stale(folder: Path) -> None:
    """Remove temporary files in ``folder`` whose writer is dead; those of living writers are locked and stay."""
    for path in (folder / name for name in os.listdir(folder) if TEMPORARY.fullmatch(name)):
        if path.is_file() and not path.is_symlink():
            with suppress(OSError):  # gone meanwhile, or locked
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                finally:
                    os.close(fd)


def write_small(final: Path, data: bytes, *, replace: bool) -> bool:
    """Write a small file durably; with ``replace=False`` the first writer wins and False is returned to the others."""
    with PendingFile(final, len(data)) as file:
        file.append(data)
        file.seal()
        won = True
        if replace:
            file.rename()
        else:
            won = file.link()
    sync_folder(final.parent)
    return won


def open_regular(path: str | Path, who: str) -> tuple[int, int]:
    """Open a file of a dataset for reading: (descriptor, size). DatasetError for a link, a folder, a device."""
    try:
        # O_NONBLOCK: a FIFO in the place of a file must not block the reader.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        rule = "be a readable file, not a link"
        raise dataset_error(who, str(path), rule, os.strerror(error.errno or 0), "Run `tlfast verify`.") from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise dataset_error(who, str(path), "be a regular file", stat.filemode(info.st_mode), "Run `tlfast verify`.")
    return fd, info.st_size


def read_small(path: str | Path, who: str, limit: int) -> bytes:
    """Return the bytes of a regular file of at most ``limit`` bytes; DatasetError otherwise."""
    fd, size = open_regular(path, who)
    try:
        if size > limit:
            raise dataset_error(who, str(path), f"have at most {limit} bytes", size, "Run `tlfast verify`.")
        return os.read(fd, size)  # of a regular file one read returns all that is asked for
    finally:
        os.close(fd)
