"""How far a collection is: a bar in a terminal, else a plain line every 30 seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from .dataset.errors import extra

_LINE_EVERY_S = 30.0


class Progress:
    """Counts examples, tokens, bytes and non-finite rows, and shows them while it is entered.

    Args:
        n_examples: how many there are.
        n_done: how many of them were there before.
        enabled: False shows nothing.
        file: where to; None is stderr.
    """

    def __init__(self, n_examples: int, n_done: int = 0, enabled: bool = True, file: TextIO | None = None) -> None:
        self.n_examples, self.n_before, self.n_done = n_examples, n_done, n_done
        self.n_tokens = self.n_nonfinite = self.n_saturated = self.n_bytes = 0
        self._file = sys.stderr if file is None else file
        self._enabled = enabled
        self._terminal = enabled and self._file.isatty()
        self._bar: Any = None
        self._start = self._last = time.monotonic()

    @property
    def time_s(self) -> float:
        """Seconds since this began."""
        return time.monotonic() - self._start

    def step(self, n_examples: int, n_tokens: int) -> None:
        """One batch is through."""
        self.n_done += n_examples
        self.n_tokens += n_tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(n_examples)
        elif self._enabled and time.monotonic() - self._last > _LINE_EVERY_S:
            self._last = time.monotonic()
            rate = (self.n_done - self.n_before) / self.time_s
            left_s = (self.n_examples - self.n_done) / rate
            done = f"{self.n_done}/{self.n_examples} examples"
            self._print(f"collect: {done}, {rate:.1f} examples/s, {self._figures()}, {left_s:.0f} s left")

    def _figures(self) -> str:
        rate = self.n_tokens / max(self.time_s, 1e-9)
        saturated = f", {self.n_saturated} saturated values" if self.n_saturated else ""
        return f"{rate:.0f} tokens/s, {self.n_bytes / 1e9:.3f} GB, {self.n_nonfinite} non-finite rows{saturated}"

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)

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
