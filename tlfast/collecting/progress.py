"""How far a collection is: a bar in a terminal, else a plain line every 30 seconds; at the end, a report."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from ..dataset.errors import extra
from ..markup import in_notebook, table

_LINE_EVERY_S = 30.0
_SHOWN_FROM_S = 0.05  # seconds that don't round to 0.0


def whole_line(line: str, file: TextIO) -> None:
    """Print a line in one write, its end included.

    print() makes two, and lines of torchrun's ranks, which share outputs without a buffer, would run together.
    """
    file.write(f"{line}\n")
    file.flush()


class Progress:
    """Counts examples, tokens, bytes, non-finite rows and waiting, and shows them while it is entered.

    Args:
        n_examples: how many there are.
        n_done: how many of them were there before.
        enabled: False shows nothing.
        file: where to; None is stderr.
        waits_for: what the model waits for where it waits.
    """

    def __init__(
        self,
        n_examples: int,
        n_done: int = 0,
        enabled: bool = True,
        file: TextIO | None = None,
        waits_for: str = "the disk",
    ) -> None:
        self.n_examples, self.n_before, self.n_done = n_examples, n_done, n_done
        self.n_elsewhere = 0  # examples that other processes have done meanwhile
        self.n_tokens = self.n_nonfinite = self.n_saturated = self.n_bytes = 0
        self.waited_s = 0.0
        self.full_s = 0.0  # how long the disk has been full now
        self.waits_for = waits_for
        self._file = sys.stderr if file is None else file
        self._enabled = enabled
        self._terminal = enabled and (self._file.isatty() or in_notebook())
        self._bar: Any = None
        self._start = self._last = time.monotonic()

    @property
    def time_s(self) -> float:
        """Seconds since this began."""
        return time.monotonic() - self._start

    def step(self, n_examples: int, n_tokens: int) -> None:
        """One batch is through, or none and only the figures are new."""
        self.n_done += n_examples
        self.n_tokens += n_tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(self.n_done + self.n_elsewhere - self._bar.n)
            if not n_examples:
                self._bar.refresh()
        elif self._enabled and time.monotonic() - self._last > _LINE_EVERY_S:
            self._last = time.monotonic()
            rate = (self.n_done + self.n_elsewhere - self.n_before) / self.time_s
            n_done = self.n_done + self.n_elsewhere
            left_s = (self.n_examples - n_done) / max(rate, 1e-9)
            done = f"{n_done}/{self.n_examples} examples"
            self.say(f"{done}, {rate:.1f} examples/s, {self._figures()}, {left_s:.0f} s left")

    def _figures(self) -> str:
        tokens = f"{self.n_tokens / max(self.time_s, 1e-9):.0f} tokens/s, " if self.n_tokens else ""
        saturated = f", {self.n_saturated} saturated values" if self.n_saturated else ""
        waited = f", waiting for {self.waits_for} {self.waited_s:.1f} s" if self.waited_s >= _SHOWN_FROM_S else ""
        full = f", the disk is full for {self.full_s:.0f} s" if self.full_s else ""
        figures = f"{tokens}{self.n_bytes / 1e9:.3f} GB, {self.n_nonfinite} non-finite rows"
        return f"{figures}{saturated}{waited}{full}"

    def say(self, line: str, always: bool = False) -> None:
        """Print a line of its own; also where nothing is shown, if ``always``. Any thread may call this."""
        if self._bar is not None:
            self._bar.write(f"collect: {line}", file=self._file)
        elif self._enabled or always:
            whole_line(f"collect: {line}", self._file)

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self._terminal:
            self._bar = extra("tqdm", "collect").tqdm(
                total=self.n_examples, initial=self.n_before, unit="ex", file=self._file, dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class NonFinite(NamedTuple):
    """A row that holds a NaN or an infinity: its unit, the number of its example, and the first point where it does."""

    unit: str
    example: int
    point: str

    def __str__(self) -> str:
        return f"example {self.example} of {self.unit} at {self.point or 'the model itself'}"


@dataclass(frozen=True)
class Report:
    """What one call of `collect` did: its rows, units, bytes and seconds, and what was odd in the data.

    ``n_rows_elsewhere`` more rows were made by other processes meanwhile. ``waited_s`` of the ``time_s`` seconds the
    model stood still because what ``waits_for`` says was slower. ``n_skipped`` bad examples belong to the dataset and
    have no row. ``non_finite`` are the first of the rows that are not finite.
    """

    out: Path | str  # a URL is text
    n_rows: int
    n_rows_before: int
    n_units: int
    n_tokens: int
    n_bytes: int
    n_nonfinite_rows: int
    n_saturated: int
    time_s: float
    waited_s: float
    n_rows_elsewhere: int
    n_skipped: int
    non_finite: tuple[NonFinite, ...]
    waits_for: str = "the disk"

    def _repr_html_(self) -> str:
        told = [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "non_finite"]
        lines = [(name, f"{value:.1f}" if isinstance(value, float) else str(value)) for name, value in told]
        lines += [("non_finite", str(row)) for row in self.non_finite]
        return table([], lines, str(self))

    def __str__(self) -> str:
        rate = self.n_rows / max(self.time_s, 1e-9)
        before = f" beside {self.n_rows_before} that were there" if self.n_rows_before else ""
        elsewhere = f", {self.n_rows_elsewhere} by other processes" if self.n_rows_elsewhere else ""
        waited = (
            f", {self.waited_s:.1f} s of them waiting for {self.waits_for}" if self.waited_s >= _SHOWN_FROM_S else ""
        )
        skipped = f", {self.n_skipped} bad example{'s' * (self.n_skipped > 1)} skipped" if self.n_skipped else ""
        return (
            f"{self.n_rows} rows{before} in {self.n_units} units{elsewhere}, {self.n_tokens} tokens,"
            f" {self.n_bytes / 1e6:.1f} MB in {self.time_s:.1f} s{waited} ({rate:.1f} examples/s),"
            f" {self.n_nonfinite_rows} non-finite rows{skipped}"
        )
