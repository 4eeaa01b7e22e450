"""The preallocated rows of one column: allocated at the first gradient, written in place from then on."""

from __future__ import annotations

import threading

import torch

from ..errors import broken_rule
from .reference import capture, normal_dims, reduced_shape
from .streams import current_stream, read_on


class Ring:
    """Rows of one column: ``capacity`` rows of one shape, NaN until written.

    A row is one example when the reduction keeps the batch dimension, else one backward.
    """

    def __init__(self, column: str, reduce: str, dims: tuple[int, ...], dtype: torch.dtype | None, capacity: int):
        self.column, self.who = column, f"capture at {column}"
        self.reduce = reduce
        self.dims = dims
        self.dtype = dtype
        self.capacity = capacity
        self.masked = True  # False: the gradients have no positions, and a step's mask is not about them
        self.rows: torch.Tensor | None = None
        self._reshapable = False  # nothing was written since `clear`
        self._used_on: list[torch.cuda.Stream | None] = []  # the streams that the allocator knows of
        self._lock = threading.Lock()  # several backwards may write at once, into rows of their own
        # Non-finite values, saturated values, writes; on the rows' device, where adding up doesn't make the host wait.
        self.counters = torch.zeros(3, dtype=torch.int64)
        self.n_writes = 0  # as many as were asked for

    @property
    def counted(self) -> tuple[int, int]:
        """How many stored values are NaN or infinite, and how many of them only through the cast; waits for a GPU."""
        n_nonfinite, n_saturated, _ = self.counters.tolist()
        return n_nonfinite, n_saturated

    def n_rows(self, shape: torch.Size) -> int:
        """How many rows a gradient of ``shape`` makes."""
        return shape[0] if self._keeps_batch(shape) else 1

    def _keeps_batch(self, shape: torch.Size) -> bool:
        return len(shape) > 0 and 0 not in normal_dims(self.who, self.dims, len(shape))

    def check(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the rows, allocated at the first gradient; ValueError when a later one doesn't fit them."""
        shape = reduced_shape(grad.shape, normal_dims(self.who, self.dims, grad.dim()))
        return self._fitting(shape[1:] if self._keeps_batch(grad.shape) else shape, grad)

    def used_on(self, stream: torch.cuda.Stream | None) -> None:
        """Tell the allocator that a stream of a GPU uses the rows, which are memory of the stream that filled them."""
        with self._lock:
            if stream is None or self.rows is None or stream in self._used_on or stream.device != self.rows.device:
                return
            self._used_on.append(stream)
            read_on(stream, self.rows)

    def clear(self) -> None:
        """Forget the shape of the rows; the memory stays in use if the next ones fit it."""
        self._reshapable = True

    def _fitting(self, row_shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        with self._lock:
            dtype = self.dtype or like.dtype
            reshapable, self._reshapable = self._reshapable, False
            if self.rows is not None and reshapable and (self.rows.shape[1:] != row_shape or self.rows.dtype != dtype):
                self.rows = None
            if self.rows is None:
                self.rows = torch.full((self.capacity, *row_shape), float("nan"), dtype=dtype, device=like.device)
                self._used_on = [current_stream(like.device)]
        if self.rows.shape[1:] != row_shape:
            raise ValueError(
                broken_rule(
                    self.who, "a row", f"have shape {list(self.rows.shape[1:])} in every step", list(row_shape),
                    "Pad the batches to one length, reduce over the dimension that changes, or clear() before it does.",
                )
            )  # fmt: skip
        return self.rows

    def _capture(self, out: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
        counts = capture(out, grad, self.reduce, self.dims, mask if self.masked else None, scale, self.who)
        with self._lock:
            self.counters = self.counters.to(counts.device)  # a stack's parts are counted before its rows are there
            self.counters[:2] += counts
            self.counters[2] += 1
            self.n_writes += 1

    def write(self, base: int, grad: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
        """Reduce, cast and copy ``grad`` into the rows from ``base`` on."""
        rows = self.check(grad)
        self.used_on(current_stream(grad.device))
        out = rows[base : base + grad.shape[0]] if self._keeps_batch(grad.shape) else rows[base]
        self._capture(out, grad, mask, scale)

    def part(self, grad: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Reduce and cast one call's gradient into rows of its own."""
        shape = reduced_shape(grad.shape, normal_dims(self.who, self.dims, grad.dim()))
        out = grad.new_empty(shape, dtype=self.dtype or grad.dtype)
        self._capture(out, grad, mask, scale)
        return out if self._keeps_batch(grad.shape) else out.unsqueeze(0)

    def put_stack(self, base: int, n: int, parts: list[torch.Tensor]) -> None:
        """Write the parts of several calls; they become the first dimension of a row."""
        stacked = torch.stack(parts, dim=1)
        self._fitting(stacked.shape[1:], stacked)[base : base + n] = stacked

    def fill_nan(self, base: int, n: int) -> None:
        """Mark ``n`` rows from ``base`` on as never written."""
        if self.rows is not None:
            self.rows[base : base + n] = float("nan")
