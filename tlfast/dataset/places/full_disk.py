"""A full disk is waited for: somebody may free some room, and hours of computing are at stake."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable

_FULL = {errno.ENOSPC, errno.EDQUOT}  # the disk, or the user's share of it
_RETRY_S = 5.0  # a try that fails costs little: space is reserved before anything is written


def print_line(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


class FullDisk:
    """Repeats a write while the disk is full, for ``wait_s`` seconds at most; tells of it once, in a line.

    Used by one thread that writes; any thread may look at ``full_s`` and call ``give_up``.
    """

    def __init__(self, wait_s: float, say: Callable[[str], None] = print_line) -> None:
        self._wait_s, self._say = wait_s, say
        self._since: float | None = None
        self._given_up = threading.Event()

    @property
    def full_s(self) -> float:
        """How long the disk has been full now, in seconds; 0.0 where it is not."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def give_up(self) -> None:
        """Wait no longer: a write that finds the disk full fails."""
        self._given_up.set()

    def write(self, name: str, attempt: Callable[[], object]) -> None:
        """Call ``attempt``, which writes all of ``name`` or nothing, until the disk has room for it.

        Raises:
            OSError: what ``attempt`` raised, where it was not the full disk, or it was waited for in vain.
        """
        while (error := _full_disk(attempt)) is not None:
            if not self._wait_s or self._given_up.is_set():
                raise error
            self._wait(name, error)
        self._since = None

    def _wait(self, name: str, error: OSError) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._say(
                f"{name} waits for room on the disk ({error.strerror}): free some within {self._wait_s:.0f} s, or the"
                " run ends; all units before this one are kept"
            )
        if self.full_s > self._wait_s:
            text = f"{error.strerror}, and still after {self._wait_s:.0f} s"
            raise OSError(error.errno, text, error.filename) from error
        self._given_up.wait(min(_RETRY_S, self._wait_s / 20))


def _full_disk(attempt: Callable[[], object]) -> OSError | None:
    try:
        attempt()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return error
    return None
