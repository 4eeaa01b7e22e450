"""Preallocated rows, in plain Python: allocated at the first gradient, written in place from then on."""

from __future__ import annotations

import threading

import torch

from ..errors import broken_rule
from .streams import current_stream, read_on


class Rows:
    """``capacity`` rows of one shape, NaN until written."""

    def __init__(self, who: str, capacity: int):
        self.who, self.capacity = who, capacity
        self.tensor: torch.Tensor | None = None
        # Non-finite values, saturated values, writes; on the rows' device, where adding up doesn't make the host wait.
        self.counters = torch.zeros(3, dtype=torch.int64)
        self.n_writes = 0  # as many as were asked for
        self._reshapable = False  # nothing was written since `clear`
        self._used_on: list[torch.cuda.Stream | None] = []  # the streams that the allocator knows of
        self._lock = threading.Lock()  # several backwards may write at once, into rows of their own

    def fitting(self, row_shape: torch.Size, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        """The rows, allocated at the first call; ValueError where a later one asks for another shape."""
        with self._lock:
            reshapable, self._reshapable = self._reshapable, False
            old = self.tensor
            if old is not None and reshapable and (old.shape[1:] != row_shape or old.dtype != dtype):
                self.tensor = None
            if self.tensor is None:
                self.tensor = torch.full((self.capacity, *row_shape), float("nan"), dtype=dtype, device=like.device)
                self._used_on = [current_stream(like.device)]
            held = self.tensor
        if held.shape[1:] != row_shape:
            raise ValueError(
                broken_rule(
                    self.who, "a row", f"have shape {list(held.shape[1:])} in every step", list(row_shape),
                    "Pad the batches to one length, reduce over the dimension that changes, or clear() before it does.",
                )
            )  # fmt: skip
        return held

    def clear(self) -> None:
        """Forget the shape of the rows; the memory stays in use if the next ones fit it."""
        self._reshapable = True

    def fill_nan(self, base: int, n: int) -> None:
        """Mark ``n`` rows from ``base`` on as never written."""
        if self.tensor is not None:
            self.tensor[base : base + n] = float("nan")

    def used_on(self, stream: torch.cuda.Stream | None) -> None:
        """Tell the allocator that a stream of a GPU uses the rows, which are memory of the stream that filled them."""
        with self._lock:
            held = self.tensor
            if stream is None or held is None or stream in self._used_on or stream.device != held.device:
                return
            self._used_on.append(stream)
            read_on(stream, held)

    def count(self, counts: torch.Tensor) -> None:
        """A write is done, with so many non-finite and saturated values."""
        with self._lock:
            self.counters = self.counters.to(counts.device)  # a stack's parts are counted before its rows are there
            self.counters[:2] += counts
            self.counters[2] += 1
            self.n_writes += 1
