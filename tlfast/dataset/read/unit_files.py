"""The unit files of a dataset, opened when they are first used: rows out of mappings, or by many reads at once."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..format.commits import Commit
from ..format.layout import Column, Field, check_header, fields_of, payload_spans, unit_layout
from ..places.store import OpenFile, Range, Store

_WHO = "GradientDataset"
_PIECE_BYTES = 4 << 20  # a longer stretch is cut, so that its pieces are read at once
_WINDOW_BYTES = 32 << 10  # longer rows are copied unit by unit: their windows could exceed numpy's 2**63 bytes
_GAP_BYTES = 32 << 10  # reading so much more takes a disk less time than another request
_FETCHED_ROWS = 16384  # asked of the disk before the first of them is copied

Array = np.ndarray[Any, Any]


def most_open() -> int:
    """How many units may stay open: each has up to two descriptors, together at most half of what there are."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if soft == resource.RLIM_INFINITY else max(16, min(4096, soft // 4))


class _OpenUnits(NamedTuple):
    """Units that are open. Never changed but by adding: whoever holds it may read while others are closed."""

    files: dict[int, OpenFile]
    maps: dict[int, Array]  # the whole file, uint8
    payloads: Array  # int64 per unit: where its rows begin in the file; 0 where it isn't open
    addresses: Array  # int64 per unit: where its rows begin in memory; 0 where it isn't mapped


class Axis:
    """The rows of one kind, of the examples or of their tokens, across the units that are there: int64 per unit."""

    def __init__(self, lengths: Array) -> None:
        self.lengths = lengths
        self.stops = np.cumsum(lengths)
        self.starts = self.stops - lengths
        # Rows per unit where all but the last have as many: dividing is far faster than searching.
        longest = int(lengths.max(initial=0))
        self._every = longest if (lengths[:-1] == longest).all() else 0

    def __len__(self) -> int:
        return int(self.stops[-1]) if len(self.stops) else 0

    def unit_of(self, rows: Array) -> Array:
        """Return in which committed unit each row is."""
        return rows // self._every if self._every else np.searchsorted(self.stops, rows, side="right")


class UnitFiles:
    """The unit files of a dataset, whose fields are read by number of a row; the last used stay open."""

    def __init__(self, store: Store, commits: Sequence[Commit], columns: dict[str, Column], mapped: bool) -> None:
        self.mapped = mapped
        self._store = store
        self._commits = commits
        self._columns = columns
        self._fields = fields_of(columns)
        self._kept = most_open()
        self._lock = threading.Lock()
        n_units = len(commits)
        self.examples = Axis(np.fromiter((len(commit.unit) for commit in commits), np.int64, n_units))
        self.tokens = Axis(np.fromiter((commit.tokens or 0 for commit in commits), np.int64, n_units))
        self.firsts = np.fromiter((commit.unit.start for commit in commits), np.int64, n_units)  # ids
        self._used = np.zeros(n_units, np.int64)  # when, counted in requests
        self._now = 0
        self._open = _OpenUnits({}, {}, np.zeros(n_units, np.int64), np.zeros(n_units, np.int64))
        # Blocks lie behind each other: a field's begins behind the bytes before it of one example, and of one token,
        # times how many the unit has.
        of_example, of_token = payload_spans(columns, 1), payload_spans(columns, 0, 1)
        self._before = {name: (start, of_token[name][0]) for name, (start, _) in of_example.items()}

    def __len__(self) -> int:
        return len(self.examples)

    def axis(self, field: Field) -> Axis:
        """Return which rows a field has."""
        return self.tokens if field.per == "token" else self.examples

    def _block_starts(self, name: str, units: Array) -> Array:
        """Where the field's rows begin in the payloads of these units."""
        of_example, of_token = self._before[name]
        starts: Array = self.examples.lengths[units] * of_example
        return starts + self.tokens.lengths[units] * of_token if of_token else starts

    def view(self, k: int, name: str) -> Array:
        """Return the rows of field ``name`` in unit ``k``, as integers: read-only, a view of the file if mapped."""
        field = self._fields[name]
        axis = self.axis(field)
        n_rows = int(axis.lengths[k])
        if not self.mapped:
            rows = np.empty((n_rows, *field.row_shape), f"<i{field.dtype.itemsize}")
            self.read(self.ranges(name, int(axis.starts[k]), int(axis.stops[k]), rows))
            rows.setflags(write=False)
            return rows
        units = self._use(np.array([k]))
        start = int(units.payloads[k] + self._block_starts(name, np.array(k)))
        block = units.maps[k][start : start + n_rows * field.row_bytes]
        return block.view(f"<i{field.dtype.itemsize}").reshape(n_rows, *field.row_shape)

    def gather(self, name: str, rows: Array) -> Array:
        """Return a copy of the rows with these numbers (int64 [n], each within the dataset), as integers."""
        field = self._fields[name]
        axis = self.axis(field)
        if not (field.row_bytes and rows.size):
            return np.empty((len(rows), *field.row_shape), f"<i{field.dtype.itemsize}")
        unit_of = axis.unit_of(rows)
        if len(axis.stops) <= self._kept or len(np.unique(unit_of)) <= self._kept:
            return self._gather(name, rows, unit_of)
        out = np.empty((len(rows), *field.row_shape), f"<i{field.dtype.itemsize}")
        for where in self._affordable(unit_of):
            out[where] = self._gather(name, rows[where], unit_of[where])
        return out

    def _affordable(self, unit_of: Array) -> Iterator[Array]:
        """Yield positions that together need no more units than may be open."""
        order = np.argsort(unit_of, kind="stable")
        _, firsts = np.unique(unit_of[order], return_index=True)
        yield from np.split(order, firsts[self._kept :: self._kept])

    def _gather(self, name: str, rows: Array, unit_of: Array) -> Array:
        field, units = self._fields[name], self._use(unit_of)
        within = (rows - self.axis(field).starts[unit_of]) * field.row_bytes + self._block_starts(name, unit_of)
        offsets = units.payloads[unit_of] + within
        if not self.mapped:
            out = np.empty((len(rows), *field.row_shape), f"<i{field.dtype.itemsize}")
            self.read(self._runs(units, field.row_bytes, unit_of, offsets, out))
            return out
        if self._lacks_pages(units, unit_of, offsets):
            out = np.empty((len(rows), *field.row_shape), f"<i{field.dtype.itemsize}")
            for first in range(0, len(rows), _FETCHED_ROWS):
                part = slice(first, first + _FETCHED_ROWS)
                _ask_for(units, field.row_bytes, unit_of[part], offsets[part])
                out[part] = self._copy(units, field, unit_of[part], offsets[part])
            return out
        return self._copy(units, field, unit_of, offsets)

    def _lacks_pages(self, units: _OpenUnits, unit_of: Array, offsets: Array) -> bool:
        """Whether a few of the rows, at even distances, are not all in memory: faults would fetch them one by one."""
        n = min(32, max(2, len(offsets) // 256))  # few enough to be lost in the time of copying rows that are there
        some = range(0, len(offsets), max(1, len(offsets) // n))
        return not all(units.files[unit_of[k]].cached(int(offsets[k])) for k in some)

    def _copy(self, units: _OpenUnits, field: Field, unit_of: Array, offsets: Array) -> Array:
        """Copy rows out of the mappings."""
        size, shape = field.dtype.itemsize, (len(offsets), *field.row_shape)
        if field.row_bytes > _WINDOW_BYTES:
            out = np.empty((len(offsets), field.row_bytes), np.uint8)
            for at, (k, offset) in enumerate(zip(unit_of.tolist(), offsets.tolist(), strict=True)):
                out[at] = units.maps[k][offset : offset + field.row_bytes]
            return out.view(f"<i{size}").reshape(shape)
        # One gather for all units, however few rows each has: a row is a window into the address space, and the first
        # window begins at the lowest row. Every row lies whole within a mapping that ``units`` keeps.
        addresses = units.addresses[unit_of] + offsets
        lowest = int(addresses.argmin())
        first = units.maps[unit_of[lowest]][offsets[lowest] :][: field.row_bytes].view(f"V{field.row_bytes}")
        steps = (addresses - addresses[lowest]) // size
        windows = as_strided(first, (int(steps.max()) + 1,), (size,))
        rows: Array = windows[steps].view(f"<i{size}")
        return rows.reshape(shape)

    def _runs(self, units: _OpenUnits, row_bytes: int, unit_of: Array, offsets: Array, out: Array) -> Iterator[Range]:
        """Yield what to read: rows that follow each other, in the file and in ``out``, are one range."""
        memory = _memory(out)
        breaks = np.flatnonzero((np.diff(unit_of) != 0) | (np.diff(offsets) != row_bytes)) + 1
        ends = [*breaks.tolist(), len(offsets)]
        for first, end in zip([0, *ends], ends, strict=False):
            file = units.files[unit_of[first]]
            yield from _pieces(file, int(offsets[first]), memory[first * row_bytes : end * row_bytes])

    def ranges(self, name: str, start: int, stop: int, out: Array) -> Iterator[Range]:
        """Yield what to read to fill ``out`` with the rows from ``start`` to ``stop``."""
        field, memory = self._fields[name], _memory(out)
        axis, row_bytes = self.axis(field), field.row_bytes
        at = start
        while at < stop and row_bytes:
            k = int(axis.unit_of(np.array(at)))
            end = min(stop, int(axis.stops[k]))
            units = self._use(np.array([k]))
            block = int(units.payloads[k] + self._block_starts(name, np.array(k)))
            part = memory[(at - start) * row_bytes : (end - start) * row_bytes]
            yield from _pieces(units.files[k], block + (at - int(axis.starts[k])) * row_bytes, part)
            at = end

    def read(self, ranges: Iterable[Range]) -> None:
        """Read what `ranges` yielded, many at once."""
        waiting = iter(ranges)
        while some := list(islice(waiting, self._kept)):  # each may hold a file open
            self._store.fill(some, _WHO)

    def _use(self, unit_of: Array) -> _OpenUnits:
        """Open these units, at most as many as may be open; return all that are open now."""
        with self._lock:
            self._now += 1
            self._used[unit_of] = self._now
            closed = unit_of[self._open.payloads[unit_of] == 0]
            for k in set(closed.tolist()):
                self._open_unit(k)
            units = self._open
            if len(units.files) > self._kept:
                self._close_oldest()
            return units

    def _open_unit(self, k: int) -> None:
        commit = self._commits[k]
        layout = unit_layout(self._columns, commit.unit, commit.tokens or 0)
        file = self._store.open(commit.files[0].path, _WHO)
        check_header(file, self._store.where(file.name), layout, _WHO)
        if self.mapped:
            self._open.maps[k] = mapped = np.frombuffer(file.map(), np.uint8)
            self._open.addresses[k] = mapped.ctypes.data
        self._open.files[k] = file
        self._open.payloads[k] = len(layout.header)

    def _close_oldest(self) -> None:
        old = self._open
        kept = sorted(old.files, key=self._used.__getitem__)[-self._kept * 3 // 4 :]
        is_kept = np.zeros(len(self._commits), bool)
        is_kept[kept] = True
        self._open = _OpenUnits(
            {k: old.files[k] for k in kept},
            {k: old.maps[k] for k in kept if k in old.maps},
            np.where(is_kept, old.payloads, 0),
            np.where(is_kept, old.addresses, 0),
        )


def _ask_for(units: _OpenUnits, row_bytes: int, unit_of: Array, offsets: Array) -> None:
    """Let the system begin to read rows, in the order of the disk; rows that lie close are asked for together."""
    order = np.lexsort((offsets, unit_of))
    unit_of, offsets = unit_of[order], offsets[order]
    apart = (np.diff(unit_of) != 0) | (np.diff(offsets) > row_bytes + _GAP_BYTES)
    firsts = np.flatnonzero(np.concatenate([[True], apart]))
    ends = np.append(offsets[firsts[1:] - 1], offsets[-1]) + row_bytes
    for k, start, end in zip(unit_of[firsts].tolist(), offsets[firsts].tolist(), ends.tolist(), strict=True):
        units.files[k].will_need(start, end - start)


def _pieces(file: OpenFile, offset: int, memory: memoryview) -> Iterator[Range]:
    for done in range(0, len(memory), _PIECE_BYTES):
        part = memory[done : done + _PIECE_BYTES]
        yield file, offset + done, part


def _memory(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
