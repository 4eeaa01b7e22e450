"""The unit files of a dataset, opened when they are first used: rows out of mappings, or by many reads at once."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .commits import Commit
from .errors import dataset_error
from .layout import Column, UnitLayout, unit_layout
from .plan import Unit
from .store import OpenFile, Range, Store

_WHO = "GradientDataset"
_PIECE_BYTES = 4 << 20  # a longer stretch is cut, so that its pieces are read at once

Array = np.ndarray[Any, Any]


def check_header(file: OpenFile, where: str, layout: UnitLayout, who: str) -> None:
    """Check that an open unit file has the size and begins with the header that its plan gives it.

    The plan fixes every byte of the header, so nothing in it has to be parsed, and no length, offset, dtype or shape
    that a file claims is ever believed.
    """
    remedy = "Remove its commit and resume to make the unit again."
    if file.size != layout.n_bytes:  # mapped, a shorter file would end the process by SIGBUS
        raise dataset_error(who, where, f"have {layout.n_bytes} bytes", file.size, remedy)
    found = file.read(0, len(layout.header))
    if found != layout.header:
        at = next((k for k, (a, b) in enumerate(zip(found, layout.header, strict=False)) if a != b), len(found))
        raise dataset_error(who, where, "begin with the header of its plan", f"another byte at {at}", remedy)


def most_open() -> int:
    """How many unit files may stay open: a quarter of what the process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 4))


class UnitFiles:
    """The unit files of a dataset; the last used stay open, or mapped."""

    def __init__(self, store: Store, commits: Sequence[Commit], columns: dict[str, Column], mapped: bool) -> None:
        self._store = store
        self._commits = commits
        self._columns = columns
        self.mapped = mapped
        self._kept = most_open()
        self._open: OrderedDict[int, tuple[OpenFile, Array | None, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.stops = np.cumsum([len(commit.unit) for commit in commits], dtype=np.int64)
        self.starts = self.stops - np.array([len(commit.unit) for commit in commits], dtype=np.int64)
        # Blocks lie behind each other, so a column's begins at (bytes of a row before it) * (rows of the unit).
        single = unit_layout(columns, Unit("u000000", 0, 1))
        self._before = {name: block.start - len(single.header) for name, block in single.blocks.items()}

    def __len__(self) -> int:
        return int(self.stops[-1]) if len(self.stops) else 0

    def view(self, k: int, name: str) -> Array:
        """Return the rows of column ``name`` in committed unit ``k``: a read-only view of the file, as integers."""
        _, mapped, payload = self._use(k)
        assert mapped is not None
        column, n_rows = self._columns[name], len(self._commits[k].unit)
        start = payload + n_rows * self._before[name]
        block = mapped[start : start + n_rows * column.row_bytes]
        return block.view(f"<i{column.dtype.itemsize}").reshape(n_rows, *column.row_shape)

    def gather(self, name: str, rows: Array, target: Array) -> None:
        """Copy the rows with these numbers (int64, each within the dataset) into ``target``, in this order."""
        unit_of = np.searchsorted(self.stops, rows, side="right")
        order = np.argsort(unit_of, kind="stable")
        units, firsts = np.unique(unit_of[order], return_index=True)
        parts = list(zip(units.tolist(), np.split(order, firsts[1:]), strict=False))
        if self.mapped:
            for k, where in parts:
                target[where] = self.view(k, name)[rows[where] - self.starts[k]]
            return
        row_bytes, memory = self._columns[name].row_bytes, _memory(target)
        for begin in range(0, len(parts) if row_bytes else 0, self._kept):  # as many files as may be open
            ranges: list[Range] = []
            for k, where in parts[begin : begin + self._kept]:
                file, _, payload = self._use(k)
                offsets = payload + len(self._commits[k].unit) * self._before[name]
                for at, row in zip(where.tolist(), (rows[where] - self.starts[k]).tolist(), strict=True):
                    part = memory[at * row_bytes : (at + 1) * row_bytes]
                    ranges.append((file, offsets + row * row_bytes, part))
            self._store.fill(ranges, _WHO)

    def ranges(self, name: str, start: int, stop: int, target: Array) -> list[Range]:
        """Return what to read for the rows ``start`` to ``stop`` of one unit: pieces of a file, and their memory."""
        k = int(np.searchsorted(self.stops, start, side="right"))
        file, _, payload = self._use(k)
        row_bytes, memory = self._columns[name].row_bytes, _memory(target)
        first = payload + len(self._commits[k].unit) * self._before[name] + (start - int(self.starts[k])) * row_bytes
        n_bytes = (stop - start) * row_bytes
        return [
            (file, first + done, memory[done : min(done + _PIECE_BYTES, n_bytes)])
            for done in range(0, n_bytes, _PIECE_BYTES)
        ]

    def stretch(self, name: str, rows: range, target: Array) -> None:
        """Copy rows at a regular step into ``target``."""
        done = 0
        while done < len(rows):
            k = int(np.searchsorted(self.stops, rows[done], side="right"))
            part = range(rows[done], min(rows.stop, int(self.stops[k])), rows.step)
            into = target[done : done + len(part)]
            if self.mapped:
                start = int(self.starts[k])
                into[...] = self.view(k, name)[part.start - start : part.stop - start : rows.step]
            elif rows.step == 1:
                self._store.fill(self.ranges(name, part.start, part.stop, into), _WHO)
            else:
                self.gather(name, np.arange(part.start, part.stop, rows.step), into)
            done += len(part)

    def _use(self, k: int) -> tuple[OpenFile, Array | None, int]:
        """Return the open file of committed unit ``k``, its mapping, and where its payload begins."""
        with self._lock:
            if k not in self._open:
                unit = self._commits[k].unit
                layout = unit_layout(self._columns, unit)
                file = self._store.open(self._commits[k].files[0].path, _WHO)
                check_header(file, self._store.where(file.name), layout, _WHO)
                mapped = np.frombuffer(file.map(), np.uint8) if self.mapped else None
                self._open[k] = file, mapped, len(layout.header)
                while len(self._open) > self._kept:
                    self._open.popitem(last=False)  # closed, or unmapped, when nothing uses it any more
            self._open.move_to_end(k)
            return self._open[k]


def _memory(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
