"""Which rows of which datasets the rows of a view are, and the view's columns and examples, which read those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch

from ...errors import broken_rule
from ..errors import dataset_error, extra
from ..format.row_table import NORM, as_examples
from .columns import GradientColumn, Piece, row_numbers
from .token_columns import TokenColumn, TokenSpans

Array = np.ndarray[Any, Any]
_SPARSE = 8  # rows of a run from which on reading it as a stretch is faster than gathering its rows


class Selection:
    """The rows of a view: all rows of some datasets behind each other, or those of them that ``rows`` names.

    ``rows`` is int64 [rows of the view], numbers among all rows of all datasets behind each other.
    """

    def __init__(self, lengths: Sequence[int], rows: Array | None = None) -> None:
        self.stops = np.cumsum(np.asarray(lengths, np.int64))
        self.starts = self.stops - np.asarray(lengths, np.int64)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) if self.rows is not None else int(self.stops[-1]) if len(self.stops) else 0

    def among_all(self, rows: Array) -> Array:
        """Return the numbers of rows of the view among all rows of all datasets."""
        return rows if self.rows is None else self.rows[rows]

    def locate(self, rows: Array) -> tuple[Array, Array]:
        """Return which dataset each row is of, and which row of it: int64 each, of the shape of ``rows``."""
        among_all = self.among_all(rows)
        which = np.searchsorted(self.stops, among_all, side="right")
        return which, among_all - self.starts[which] if len(self.starts) else among_all

    def by_dataset(self, rows: Array) -> Iterator[tuple[int, Any, Array]]:
        """Yield of each dataset that has some: its number, which of ``rows`` ([n]) they are, and its own rows."""
        which, local = self.locate(rows)
        for k in np.unique(which).tolist():
            where = slice(None) if (which == k).all() else np.flatnonzero(which == k)
            yield k, where, local[where]

    def runs(self, rows: Array) -> list[tuple[int, int, int, int]]:
        """Return the runs in which ``rows`` lie: dataset, its first row, and the run's bounds in ``rows``."""
        which, local = self.locate(rows)
        breaks = np.flatnonzero((np.diff(which) != 0) | (np.diff(local) != 1)) + 1
        begins = np.concatenate([np.zeros(min(1, len(rows)), np.int64), breaks])
        ends = np.append(begins[1:], len(rows)) if len(begins) else begins
        return list(zip(which[begins].tolist(), local[begins].tolist(), begins.tolist(), ends.tolist(), strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether it is all rows of all datasets, in their order."""
        return self.rows is None

    def unit_bounds(self, parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
        """Return where stretches that lie behind each other start and stop: int64 [stretches] each.

        They are the units of the datasets, whose bounds are ``parts``; selected rows are one stretch.
        """
        if not self.is_whole:
            return np.zeros(min(1, len(self)), np.int64), np.full(min(1, len(self)), len(self), np.int64)
        starts, stops = ([part[i] + at for part, at in zip(parts, self.starts, strict=True)] for i in (0, 1))
        return np.concatenate(starts), np.concatenate(stops)


class TokenSelection(Selection):
    """The tokens of a view's examples, behind each other: numbers of tokens in place of those of rows.

    It takes 24 bytes for each example, once it is asked.
    """

    def __init__(self, spans: Sequence[TokenSpans], examples: Selection) -> None:
        super().__init__([part.n_tokens for part in spans])
        self._spans, self._examples = spans, examples

    @cached_property
    def _bounds(self) -> tuple[Array, Array, Array]:
        """Of each example of the view where its tokens begin among those of all datasets, and begin and end here."""
        n = len(self._examples)
        firsts, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
        for k, where, local in self._examples.by_dataset(np.arange(n)):
            starts, stops = self._spans[k].bounds(local)
            firsts[where], lengths[where] = starts + self.starts[k], stops - starts
        ends = np.cumsum(lengths)
        return firsts, ends - lengths, ends

    def __len__(self) -> int:
        ends = self._bounds[2]
        return int(ends[-1]) if len(ends) else 0

    @property
    def is_whole(self) -> bool:
        """Whether it is all tokens of all datasets, in their order."""
        return self._examples.is_whole

    @property
    def lengths(self) -> Array:
        """How many tokens each example of the view has: int64 [examples]."""
        _, begins, ends = self._bounds
        return ends - begins

    def whose(self, tokens: Array) -> tuple[Array, Array]:
        """Return the example of each token, a row of the view, and its position there: int64, as ``tokens``."""
        _, begins, ends = self._bounds
        owners = np.searchsorted(ends, tokens, side="right")
        return owners, tokens - begins[owners] if tokens.size else tokens

    def among_all(self, tokens: Array) -> Array:
        """Return the numbers of tokens of the view among all tokens of all datasets."""
        owners, positions = self.whose(tokens)
        return self._bounds[0][owners] + positions if tokens.size else tokens


class ViewColumn:
    """One point's rows in a view: indexed, and read in stretches, as a GradientColumn is."""

    def __init__(self, columns: Sequence[GradientColumn], selection: Selection) -> None:
        self._columns = columns
        self._selection = selection
        self.name, self.dtype = columns[0].name, columns[0].dtype

    @property
    def fields(self) -> tuple[ViewColumn, ...]:
        """The columns that are read to have these rows."""
        fields = zip(*(column.fields for column in self._columns), strict=True)
        return tuple(ViewColumn(columns, self._selection) for columns in fields)

    def decoded(self, *stored: torch.Tensor) -> torch.Tensor:
        """Return the rows, of what was read of each of `fields`."""
        return self._columns[0].decoded(*stored)

    def __len__(self) -> int:
        return len(self._selection)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, *shape of a row)``."""
        return (len(self), *self._columns[0].shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._columns[0].row_bytes

    @property
    def unit_bounds(self) -> tuple[Array, Array]:
        """Where stretches that lie behind each other start, and where they stop; int64 [stretches] each."""
        return self._selection.unit_bounds([column.unit_bounds for column in self._columns])

    def __repr__(self) -> str:
        return f"ViewColumn({self.name!r}, {str(self.dtype).removeprefix('torch.')}, {list(self.shape)})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the indexed rows, [*index shape, *row shape]."""
        rows = _indexed(index, len(self))
        flat = rows.reshape(-1)
        out = torch.empty((len(flat), *self.shape[1:]), dtype=self.dtype)
        for k, where, local in self._selection.by_dataset(flat):
            found = self._columns[k][_stretch(local)]
            if isinstance(where, slice):
                out = found
            else:
                out[torch.from_numpy(where)] = found
        return out.reshape((*rows.shape, *self.shape[1:]))

    def numpy(self, k: int) -> NoReturn:
        """TypeError: the rows of a unit are those of a dataset."""
        remedy = f"Read view[{self.name!r}][rows], or numpy(k) of a dataset in view.sources."
        raise TypeError(broken_rule("DatasetView", "numpy", "be asked of a dataset's own column", self.name, remedy))

    def pieces(self, start: int, stop: int, memory: torch.Tensor) -> list[Piece]:
        """Return what to read to fill ``memory`` with the rows from ``start`` to ``stop``, as far as it isn't yet."""
        rows = np.arange(start, stop)
        runs = self._selection.runs(rows)
        if len(runs) * _SPARSE > len(rows):
            memory.copy_(self[start:stop])
            return []
        found: list[Piece] = []
        for k, first, begin, end in runs:
            found += self._columns[k].pieces(first, first + end - begin, memory[begin:end])
        return found


class ViewTokenColumn:
    """The rows of one point per token in a view: ``column[example]``, as of a TokenColumn."""

    def __init__(self, columns: Sequence[TokenColumn], selection: Selection, tokens: TokenSelection) -> None:
        self._columns = columns
        self._selection = selection
        self._tokens = tokens
        self.name, self.dtype = columns[0].name, columns[0].dtype

    @property
    def shape(self) -> NoReturn:
        """AttributeError: examples differ in length."""
        rule, remedy = "be asked of a column per example", "See column.flat.shape and column.lengths()."
        raise AttributeError(broken_rule("DatasetView", "shape", rule, f"{self.name!r}, per token", remedy))

    @property
    def flat(self) -> ViewColumn:
        """The rows of all tokens of the view's examples, behind each other; nothing is copied."""
        return ViewColumn([column.flat for column in self._columns], self._tokens)

    def where(self, index: Any = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the example and the position of each of the rows ``flat[index]``: int64, of the index's shape.

        ``example`` is a row of the view (``view.examples[example]``), ``position`` counts its real tokens from 0.
        """
        tokens = _indexed(index, len(self._tokens))
        rows, positions = self._tokens.whose(tokens)
        return torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(positions))

    def __len__(self) -> int:
        return len(self._selection)

    def __repr__(self) -> str:
        return f"ViewTokenColumn({self.name!r}, {str(self.dtype).removeprefix('torch.')}, {len(self)} examples)"

    def __getitem__(self, index: Any) -> Any:
        """Return the rows of an example, [length, *row shape], or a list of those of several."""
        rows = _indexed(index, len(self))
        values, lengths = self.joined(rows.reshape(-1))
        return values if rows.ndim == 0 else list(values.split(lengths.tolist()))

    def joined(self, rows: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of some examples behind each other, and how many each has: int64 [examples]."""
        parts: list[Any] = [None] * len(rows)
        for k, where, local in self._selection.by_dataset(rows):
            values, lengths = self._columns[k].joined(local)
            if isinstance(where, slice):
                return values, lengths
            for at, part in zip(where.tolist(), values.split(lengths.tolist()), strict=True):
                parts[at] = part
        none = self._columns[0].joined(rows[:0])[0]
        return torch.cat([none, *parts]), torch.tensor([len(part) for part in parts], dtype=torch.int64)

    def lengths(self) -> torch.Tensor:
        """Return how many tokens each example has: int64 [examples]."""
        return torch.from_numpy(self._tokens.lengths)


class ViewExamples(Sequence[dict[str, Any]]):
    """The examples of a view: ``view.examples[i]`` is a dict, as of a dataset."""

    def __init__(self, tables: Sequence[Any], selection: Selection, points: Sequence[str], offsets: Sequence[int]):
        self._tables = tables
        self._selection = selection
        self._points = list(points)
        self._offsets = offsets  # what is added to the ids of each dataset

    def __len__(self) -> int:
        return len(self._selection)

    def __getitem__(self, index: Any) -> Any:
        """Return an example as a dict; for a slice a list."""
        if isinstance(index, slice):
            return as_examples(self.arrow(np.arange(len(self))[index]), self._points)
        i = int(index.__index__())
        row = i + len(self) if i < 0 else i
        if not 0 <= row < len(self):
            raise IndexError(f"DatasetView: example must be in 0..{len(self) - 1}, got {i}. See len(view).")
        return as_examples(self.arrow(np.array([row])), self._points)[0]

    @property
    def names(self) -> list[str]:
        """What is known of every example beside its norms."""
        names = [table.names for table in self._tables]
        return [name for name in names[0] if all(name in other for other in names[1:])]

    def arrow(self, rows: Array, names: Sequence[str] | None = None) -> Any:
        """Return columns of the row tables, all by default, for these rows of the view: a pyarrow Table."""
        pa = extra("pyarrow", "DatasetView")
        names = [*self.names, *(NORM + point for point in self._points)] if names is None else list(names)
        parts, order = [], []
        for k, where, local in self._selection.by_dataset(rows):
            table = self._tables[k].arrow(local, names)
            if self._offsets[k] and "id" in names:
                ids = pa.array(table.column("id").to_numpy() + self._offsets[k])
                table = table.set_column(names.index("id"), table.schema.field("id"), ids)
            if isinstance(where, slice):
                return table
            parts.append(table)
            order.append(where)
        if not parts:
            return self._tables[0].arrow(rows[:0], names)
        try:
            found = pa.concat_tables(parts)
        except pa.ArrowException as error:
            rule, remedy = "be of one type in all datasets", "Leave it out by with_fields, or take one dataset."
            raise dataset_error("DatasetView", "what rows hold", rule, str(error)[:200], remedy) from error
        back = np.empty(len(rows), np.int64)
        back[np.concatenate(order)] = np.arange(len(rows))
        return found.take(pa.array(back))

    def norms(self, point: str) -> torch.Tensor:
        """Return the float32 L2 norm of every row of ``point``: shape [rows]."""
        found = torch.cat([torch.empty(0), *(table.norms(point) for table in self._tables)])
        return found[torch.from_numpy(self._selection.among_all(np.arange(len(self))))]

    def tokens(self, start: int, stop: int) -> list[torch.Tensor]:
        """Return the input_ids of the rows ``start`` to ``stop``: int64, each of its own length."""
        lists = self.arrow(np.arange(start, stop), ["input_ids"]).column("input_ids")
        return [torch.tensor(tokens, dtype=torch.int64) for tokens in lists.to_pylist()]


def _indexed(index: Any, n: int) -> Array:
    return np.arange(n)[index] if isinstance(index, slice) else row_numbers(index, n)


def _stretch(rows: Array) -> Any:
    """Rows that lie behind each other as a slice, which is read without a gather."""
    behind = len(rows) > 1 and int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if behind else rows
