"""A thread that writes units while the model computes the next; its errors surface in the caller."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch

from ...errors import broken_rule
from ..format.encodings import Encoded
from ..format.plan import Example, Unit
from ..places.full_disk import FullDisk, print_line


class UnitWriter(Protocol):
    """What a BackgroundWriter drives: a DatasetWriter, or a test's stand-in."""

    bytes_written: int

    def write_unit(
        self,
        unit: Unit,
        tensors: Mapping[str, torch.Tensor | Encoded],
        examples: Sequence[Example],
        flags: Sequence[int] | None = None,
    ) -> bool:
        """Write one unit durably."""
        ...


Contents = tuple[Mapping[str, "torch.Tensor | Encoded"], "Sequence[int] | None"]
"""What a unit is made of: its tensors, and the flags of its rows."""

_Job = tuple[Unit, Callable[[], Contents], Sequence[Example]]


class BackgroundWriter:
    """Write units in another thread, at most ``max_pending`` of them not yet durable.

    The tensors are not copied: leave a unit's memory alone until it is durable. With ``max_pending=1`` that is when
    the next ``submit`` returns, with ``max_pending=2`` when `wait_for_room` says that there is room for the unit after
    the next: two sets of buffers suffice for either.

    A failed write is raised by the next ``check``, ``submit``, ``flush`` or ``close``; units behind it are dropped and
    do not exist. Leaving the ``with`` block waits for what was submitted, also when the block raised.

    Args:
        writer: what writes a unit.
        max_pending: see above.
        disk_wait_s: how long a full disk, or a used up quota, is waited for before it is a failed write; when the
            ``with`` block has raised, it is not waited for.
        say: is told of a full disk, in a line.

    Raises:
        ValueError: where ``max_pending`` is below 1.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import BackgroundWriter, DatasetWriter, Example, Plan
        >>> plan = Plan(1, 1)
        >>> writer = DatasetWriter(tempfile.mkdtemp(), header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> with BackgroundWriter(writer) as background:
        ...     background.submit(plan.unit(0), {"h": torch.zeros(1, 2)}, [Example(0, [1], "a", 0, 1)])
        >>> writer.done
        {'u000000'}
    """

    def __init__(
        self,
        writer: UnitWriter,
        max_pending: int = 1,
        disk_wait_s: float = 0.0,
        say: Callable[[str], None] = print_line,
    ) -> None:
        if max_pending < 1:
            remedy = "1 needs two sets of buffers."
            raise ValueError(broken_rule("BackgroundWriter", "max_pending", "be at least 1", max_pending, remedy))
        self._writer = writer
        self._max_pending = max_pending
        self._disk = FullDisk(disk_wait_s, say)
        self._jobs: deque[_Job] = deque()
        self._unfinished = 0  # submitted and not yet durable
        self._closing = self._abandoned = False
        self._writing = False  # the thread is at the disk, not waiting for what it is to write
        self.waited_s = 0.0  # how long callers waited for room, while the thread was at the disk
        self._error: BaseException | None = None
        self._raised = False
        self._changed = threading.Condition()
        # A daemon: a caller that dies without close() must not wait for ever; what it loses was never committed.
        self._thread = threading.Thread(target=self._run, name="tlfast-writer", daemon=True)
        self._thread.start()

    @property
    def bytes_written(self) -> int:
        """Bytes handed to the operating system until now."""
        return self._writer.bytes_written

    @property
    def full_s(self) -> float:
        """How long the disk has been full now, in seconds; 0.0 where it is not."""
        return self._disk.full_s

    def check(self) -> None:
        """Raise an earlier failure; waits for nothing."""
        if self._error is not None:
            self._raised = True
            raise self._error

    def submit(
        self,
        unit: Unit,
        tensors: Mapping[str, torch.Tensor | Encoded],
        examples: Sequence[Example],
        flags: Sequence[int] | None = None,
    ) -> None:
        """Hand over one unit; waits while ``max_pending`` units are not yet durable, and raises an earlier failure."""
        self.submit_unfinished(unit, lambda: (tensors, flags), examples)

    def submit_unfinished(self, unit: Unit, finish: Callable[[], Contents], examples: Sequence[Example]) -> None:
        """The same for a unit that isn't ready: ``finish`` is called in the thread, where it may wait and compute.

        What ``finish`` raises counts as a failed write.
        """
        with self._changed:
            self._wait(self._max_pending - 1)
            if self._closing:
                raise RuntimeError(
                    broken_rule("BackgroundWriter", "submit", "come before close", unit.name, "Reopen it.")
                )
            self._unfinished += 1
            self._jobs.append((unit, finish, examples))
            self._changed.notify_all()

    def wait_for_room(self, time_s: float | None = None) -> bool:
        """Wait until ``submit`` wouldn't; False if ``time_s`` seconds were not enough; raises an earlier failure."""
        with self._changed:
            return self._wait(self._max_pending - 1, time_s)

    def flush(self, time_s: float | None = None) -> bool:
        """Wait until every submitted unit is durable; False if ``time_s`` seconds were not enough; raises a failure."""
        with self._changed:
            waited_s, durable = self.waited_s, self._wait(0, time_s)
            self.waited_s = waited_s  # at the end there is nothing to compute meanwhile
            return durable

    def abandon(self) -> None:
        """Let ``close`` wait for nothing: a unit that is being written is whole later, or never exists."""
        self._abandoned = True

    def close(self) -> None:
        """Wait for every submitted unit and end the thread; raises a failure that was not raised before."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._abandoned:
            return
        self._thread.join()
        with self._changed:
            if self._error is not None and not self._raised:
                self._raised = True
                raise self._error

    def _wait(self, allowed: int, time_s: float | None = None) -> bool:
        start = time.monotonic()
        while self._unfinished > allowed and self._error is None:
            before, writing = time.monotonic(), self._writing
            if time_s is not None and before - start >= time_s:
                return False
            self._changed.wait(1.0 if time_s is None else min(1.0, start + time_s - before))
            if writing:
                self.waited_s += time.monotonic() - before
            if not self._thread.is_alive() and self._unfinished > allowed and self._error is None:
                remedy = "Open a dataset after forking, not before."
                self._error = RuntimeError(broken_rule("BackgroundWriter", "thread", "be alive", "none", remedy))
        self.check()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closing:
                    self._changed.wait()
                if not self._jobs:
                    return
                unit, finish, examples = self._jobs.popleft()
            try:
                tensors, flags = finish()
                self._at_the_disk(True)
                self._disk.write(unit.name, partial(self._write, unit, tensors, examples, flags))
            except BaseException as error:  # whatever it was, the caller must hear of it
                with self._changed:
                    self._error = error
                    self._jobs.clear()
                    self._unfinished = 0
                    self._changed.notify_all()
                return
            del finish, tensors  # the caller may reuse this memory now
            self._at_the_disk(False)

    def _write(self, *job: Any) -> None:
        before = self._writer.bytes_written
        try:
            self._writer.write_unit(*job)
        except OSError:
            self._writer.bytes_written = before  # if it is tried again, they count once
            raise

    def _at_the_disk(self, writing: bool) -> None:
        with self._changed:
            self._writing = writing
            self._unfinished -= not writing
            self._changed.notify_all()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._disk.give_up()
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            # The block's own error (often KeyboardInterrupt) stays the one that is raised.
            warnings.warn(f"BackgroundWriter: a unit was not written: {failure!r}", RuntimeWarning, stacklevel=2)
