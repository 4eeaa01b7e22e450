"""The ledger of a capture, in plain Python: which rows are reserved and which are committed, as `tlfast._C.Ledger`."""

from __future__ import annotations

import threading

import torch

from ..errors import broken_rule
from .column import Column
from .streams import current_stream


class Block:
    """The rows of one backward: reserved at its first gradient, counted once it has ended well."""

    def __init__(self, base: int, n: int):
        self.base, self.n = base, n
        self.state = "open"  # open -> committed | aborted
        self.missing: list[int] = []


class Ledger:
    """Reserved and committed rows of all columns of a capture."""

    recording = False  # of a step as a graph, which is for native code alone

    def __init__(self, rows: int):
        self.capacity = rows
        self.columns: list[Column] = []  # of all points; filled before the first backward
        self.n_ended = 0  # blocks that were ever committed
        self.blocks: list[Block] = []
        self._n_rows = 0  # of the committed ones
        self._n_open = 0  # blocks whose backwards run
        self.failed: list[torch.cuda.Event] = []  # the work of a backward that failed: the next may write its rows
        self._lock = threading.RLock()

    def reserve(self, who: str, n: int) -> Block:
        """Reserve rows for a backward; RuntimeError in the name of ``who`` where there is no room."""
        with self._lock:
            base = self.blocks[-1].base + self.blocks[-1].n if self.blocks else 0
            if base + n > self.capacity:
                raise RuntimeError(
                    broken_rule(
                        who, "rows", f"hold the {base} rows written and {n} more", self.capacity,
                        "Give capture more rows, or read them and call clear().",
                    )
                )  # fmt: skip
            self.blocks.append(Block(base, n))
            self._n_open += 1
            return self.blocks[-1]

    def commit(self, block: Block, missing: list[int]) -> None:
        """A backward has ended well, without a gradient at the points ``missing``."""
        with self._lock:
            block.missing, block.state = missing, "committed"
            self._n_open -= 1
            self._n_rows += block.n
            self.n_ended += 1
            self.failed = []

    def abort(self, block: Block) -> None:
        """A backward has failed: its rows are void."""
        with self._lock:
            if block.state != "open":
                return
            block.state = "aborted"
            self._n_open -= 1
            while self.blocks and self.blocks[-1].state == "aborted":
                self.blocks.pop()

    @property
    def extent(self) -> tuple[int, int]:
        """The rows of all committed blocks, and where the last of them ends: more only where others left holes."""
        with self._lock:
            last = next((block for block in reversed(self.blocks) if block.state == "committed"), None)
            return self._n_rows, 0 if last is None else last.base + last.n

    def committed(self) -> list[tuple[int, int, list[int]]]:
        """(first row, rows, points that did not fire) of every committed block, in order."""
        with self._lock:
            return [(b.base, b.n, b.missing) for b in self.blocks if b.state == "committed"]

    def clear(self) -> None:
        """Forget all rows and their shapes; RuntimeError while a backward is running."""
        with self._lock:
            if self._n_open:
                raise RuntimeError(
                    broken_rule(
                        "clear", "the capture", "be at rest", "a running backward", "Call it after backward() returned."
                    )
                )
            self.blocks.clear()
            self._n_rows = 0
            for column in self.columns:
                column.memory.clear()

    def note_failed(self, waited_for: list[torch.cuda.Event], written: list[torch.cuda.Event]) -> None:
        """What a backward that failed has begun to write, in place of what it has waited for."""
        with self._lock:
            self.failed = [done for done in self.failed if done not in waited_for] + written

    def settle(self) -> None:
        """Let the current streams of the devices that hold rows wait for what failed backwards have begun to write."""
        with self._lock:
            for rows in (column.rows for column in self.columns if self.failed):
                stream = None if rows is None else current_stream(rows.device)
                if stream is not None:
                    for done in self.failed:
                        stream.wait_event(done)
