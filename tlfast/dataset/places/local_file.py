"""A file of this machine that is read: at an offset, past the page cache, mapped; and the threads that wait."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

IN_FLIGHT = 16  # reads at once: what fills the queue of an SSD or the latency of a network, measured
_DONT_WAIT = getattr(os, "RWF_NOWAIT", 0)  # of Linux: read what is in memory, or nothing
# A mapping that keeps no descriptor lets a process map more units than it may open files.
_NO_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class LocalFile:
    """A regular file in a folder of this machine."""

    def __init__(self, name: str, fd: int, size: int) -> None:
        self.name = name
        self.size = size
        self._fd = fd
        self._direct = False

    def fileno(self) -> int:
        """Return the descriptor, which belongs to this object."""
        return self._fd

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset`` on."""
        return os.pread(self._fd, n_bytes, offset)

    def read_into(self, offset: int, target: memoryview) -> int:
        """Fill ``target`` from ``offset`` on; return how many bytes there were."""
        done = 0
        while done < len(target):
            try:
                n = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = not set_direct(self._fd, False)  # the end of a file is no whole page
                continue
            if n == 0:
                break
            done += n
        return done

    def read_at_once(self, offset: int, target: memoryview) -> bool:
        """Fill ``target`` if all of it is in memory; False otherwise, or where the system doesn't say."""
        try:
            return bool(_DONT_WAIT) and os.preadv(self._fd, [target], offset, _DONT_WAIT) == len(target)
        except OSError:
            return False

    def past_cache(self) -> None:
        """Read from the disk itself from now on, where the filesystem can: whole pages, into whole pages."""
        self._direct = set_direct(self._fd, True)

    def map(self) -> mmap.mmap:
        """Map the whole file for reading."""
        return mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ, **_NO_DESCRIPTOR)

    def cached(self, offset: int) -> bool:
        """Whether the byte at ``offset`` is in memory."""
        # Not by mincore, which says yes of every file that the caller may not write.
        try:
            os.preadv(self._fd, [bytearray(1)], offset, _DONT_WAIT)
        except BlockingIOError:
            return False
        except OSError:  # a filesystem that cannot say
            return True
        return True

    def will_need(self, offset: int, n_bytes: int) -> None:
        """Let the system begin to read a range into memory."""
        os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        # Not by a close() that someone has to call: another thread may be reading when the file leaves a cache.
        with suppress(AttributeError, OSError):
            os.close(self._fd)


def set_direct(fd: int, wanted: bool) -> bool:
    """Ask for O_DIRECT on an open file, or give it up; whether the file is now as asked."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
    except OSError:
        return not wanted
    return bool(flag) if wanted else True


_pool: ThreadPoolExecutor | None = None


def threads() -> ThreadPoolExecutor:
    """Return the threads that reads wait in."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(IN_FLIGHT, "tlfast-reader")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None  # a forked child (a worker of a DataLoader) has none of its parent's threads


os.register_at_fork(after_in_child=_forget_threads)
