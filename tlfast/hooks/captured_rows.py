"""The rows of a capture: those of its columns that are committed, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..backends.interface import Column
from ..errors import broken_rule
from ..markup import table
from ..spec import Spec
from .tokens import Tokens, positions_within, token_rows


def _spans(tokens: Tokens | None, n_rows: int) -> list[tuple[int, int] | None]:
    """The first token and the number of them for each of so many rows: those of a batch, as often as it ran."""
    if tokens is None or not tokens.lengths:
        return [None] * n_rows
    firsts = tokens.firsts or [0] * len(tokens.lengths)
    return [*zip(firsts, tokens.lengths, strict=True)] * (n_rows // len(tokens.lengths))


class CapturedRows:
    """One row an example at every column, as a mapping; what a ledger has committed of them, and the id of each."""

    def __init__(self, ledger: Any, capacity: int, backend: str):
        self._ledger, self.capacity, self.backend = ledger, capacity, backend
        self._columns: dict[str, Column] = {}
        self._columns_of: list[list[str]] = []  # of each tap
        self.wanted: dict[str, tuple[str, Spec]] = {}  # column -> its point and what is kept there
        self.names: list[str] = []
        self._per_token: set[str] = set()
        self._ids: list[Any] = []
        self._spans: list[tuple[int, int] | None] = []  # of each row the first token and how many; None: all positions
        self.n_cleared = 0  # how often all rows were forgotten

    @property
    def squeezes(self) -> bool:
        """Whether some column has a row for each token, by the masks of `batch`."""
        return bool(self._per_token)

    @property
    def rows(self) -> int:
        """The number of committed rows, the same at every point."""
        n_rows: int = self._ledger.extent[0]
        return n_rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def keys(self) -> list[str]:
        """The same as `names`, so that ``dict(cap)`` has the rows of each column."""
        return list(self.names)

    def __repr__(self) -> str:
        return f"<tlfast.Capture of {', '.join(self.names)}: {self.rows} of {self.capacity} rows, {self.backend}>"

    def _repr_html_(self) -> str:
        lines = []
        for name, (point, spec) in self.wanted.items():
            rows = self._columns[name].rows
            kind = "no gradient yet" if rows is None else str(rows.dtype).removeprefix("torch.")
            lines.append(
                [
                    name,
                    point,
                    spec.side,
                    spec.of,
                    str(spec.reduce),
                    kind,
                    "" if rows is None else str(list(rows.shape[1:])),
                ]
            )
        head = ["column", "point", "side", "of", "reduce", "dtype", "shape of a row"]
        return table(head, lines, f"{self.rows} of {self.capacity} rows, {self.backend}")

    def __bool__(self) -> bool:
        return True  # also without a row: it is asked whether there is a capture

    def __getitem__(self, name: str) -> torch.Tensor:
        """The committed rows of one column: Tensor[rows, ...], a view of memory that `clear` lets go.

        Of a column per token they are a copy, Tensor[tokens, ...], without padding; `where` says whose they are.

        Raises:
            KeyError: for a name that isn't in `names`.
            RuntimeError: if nothing was ever written there, or its rows are to be encoded.
        """
        rows = self.ring(name)
        encoding = self.wanted[name][1].encoding
        if encoding is not None:
            rule = f"go into a dataset, which stores them as {encoding}"
            remedy = "Use cap.into, or leave encoding= out to read them here."
            raise RuntimeError(broken_rule("capture", f"rows of the column {name}", rule, "a look at them", remedy))
        if name not in self._per_token:
            return rows
        chosen, width = self._tokens(name, rows)
        return rows.flatten(0, 1).index_select(0, token_rows("capture", *chosen, width).to(rows.device))

    def where(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row ``cap[name]`` of a column per token the example, as a row of other columns, and the position
        among its real tokens, counted from 0: int64 [tokens] each.

        Raises:
            KeyError: for a name that isn't in `names`.
            ValueError: for a column with a row for each example.
        """
        rows = self.ring(name)
        if name not in self._per_token:
            rule = "have a row for each token to be asked whose they are"
            raise ValueError(broken_rule("capture", f"the column {name}", rule, "a row an example", "See cap.ids."))
        lengths = np.asarray(self._tokens(name, rows)[0][1].lengths, np.int64)
        examples = np.repeat(np.arange(len(lengths)), lengths)
        return torch.from_numpy(examples), torch.from_numpy(positions_within(lengths))

    def _tokens(self, name: str, rows: torch.Tensor) -> tuple[tuple[torch.Tensor, Tokens], int]:
        """(all rows, the tokens of each), and how many positions they have."""
        if rows.dim() < 2:
            rule, remedy = 'have the positions as dimension 1 with per="token"', 'Use per="example" there.'
            got = f"rows {list(rows.shape[1:])}"
            raise ValueError(broken_rule(f"capture at {name}", "a gradient", rule, got, remedy))
        return (torch.arange(len(rows)), self.tokens(0, rows.shape[1])), rows.shape[1]

    def tokens(self, first_row: int, width: int) -> Tokens:
        """Which positions of the rows from ``first_row`` on are real, by their masks; ``width`` of those without."""
        n_more = self.rows - len(self._spans)
        spans = [(0, width) if span is None else span for span in [*self._spans[first_row:], *[None] * n_more]]
        return Tokens([length for _, length in spans], [first for first, _ in spans])

    def ring(self, name: str) -> torch.Tensor:
        """The committed rows of one column as they were written: with the padding, and not encoded.

        Raises:
            KeyError, RuntimeError: as for ``cap[name]``.
        """
        if name not in self._columns:
            raise KeyError(
                broken_rule("capture", "a name", f"be one of {', '.join(self.names[:8])}", repr(name), "See cap.names.")
            )
        rows = self._columns[name].rows
        if rows is None:
            raise RuntimeError(
                broken_rule("capture", f"the column {name}", "have been written", "no row", "Run a backward first.")
            )
        n_rows, end = self._ledger.extent
        if n_rows < end:  # a failed backward left a hole between two others that ran beside it
            return torch.cat([rows[base : base + n] for base, n, _ in self._ledger.committed()])
        view: torch.Tensor = rows[:end]
        return view

    def is_known(self, name: str) -> bool:
        """Whether the point of a column has fired, so that the shape of its rows is known."""
        return self._columns[name].rows is not None

    @property
    def ids(self) -> list[Any]:
        """The example id of each row, as given to `batch`; None where none was given."""
        return self._ids + [None] * (self.rows - len(self._ids))

    @property
    def missing(self) -> dict[str, torch.Tensor]:
        """For each column Bool[rows]: True where the point did not fire and the row is NaN (``missing="nan"``)."""
        out = {name: torch.zeros(self.rows, dtype=torch.bool) for name in self.names}
        start = 0
        for _, n, absent in self._ledger.committed():
            for index in absent:
                for column in self._columns_of[index]:
                    out[column][start : start + n] = True
            start += n
        return out

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each column how many stored values were non-finite, and how many of them only through the cast."""
        kinds = ("nonfinite", "saturated")
        self._ledger.settle()
        return {name: dict(zip(kinds, column.counted, strict=True)) for name, column in self._columns.items()}

    @property
    def counters(self) -> list[torch.Tensor]:
        """What `counts` reads and how often rows were written: for each column int64 [3] on the device of its rows."""
        self._ledger.settle()
        return [column.counters for column in self._columns.values()]

    @property
    def n_writes(self) -> list[int]:
        """How often the rows of each column were, or are still to be, written by what was launched until now."""
        return [column.n_writes for column in self._columns.values()]

    def clear(self) -> None:
        """Forget all rows; the next may have other shapes. RuntimeError while a backward is running.

        The memory stays in use where the shape stays; where it doesn't, a CUDA graph that was recorded before is an
        error when it is replayed.
        """
        self._ledger.clear()
        self._ids.clear()
        self._spans.clear()
        self.n_cleared += 1

    def _say_nothing_of_earlier(self) -> None:
        """Rows until now, of which nothing was said, have no ids, and all their positions."""
        self._ids += [None] * (self.rows - len(self._ids))
        self._spans += [None] * (self.rows - len(self._spans))

    def _say(self, ids: Sequence[Any] | None, tokens: Tokens | None) -> None:
        """The rows since are of these examples, as often as these ran."""
        written = self.rows - len(self._ids)  # clear() before this empties both
        if ids is not None and len(ids):
            self._ids += list(ids) * (written // len(ids))
        else:
            self._ids += [None] * written
        self._spans += _spans(tokens, self.rows - len(self._spans))
