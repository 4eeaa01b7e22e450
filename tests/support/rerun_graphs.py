"""What stands in for CUDA graphs on the CPU: a recorded step is run again, with its kernels on the cursor; a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tlfast

N, B, P, D = 4, 3, 5, 8  # batches, examples, positions, width


class RerunGraphs:
    """Records a step by running it and undoing what its kernels did; replays it by running it again.

    The kernels of a replay are launched as a graph's are: they find their rows by the cursor on the device, and the
    last of them moves it on. What a graph would not do is kept out of the capture's books: no row is reserved.
    """

    def __init__(self, cap: Any):
        self.cap = cap
        self.n_warmups = self.n_replays = 0
        self.instead: Callable[[], None] | None = None  # what a replay does in place of its work

    def warm_up(self, run: Callable[[], Any]) -> None:
        self.n_warmups += 1
        run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        ledger, columns = self.cap._ledger, self.cap._columns.values()
        written = [t for column in columns for t in (column.rows, column.counters) if t is not None]
        written.append(ledger.cursor)
        before = [t.clone() for t in written]
        out = run()
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)

        def replay() -> None:
            if self.instead is not None:
                self.instead()
                return
            self.n_replays += 1
            ids = list(self.cap._ids)
            ledger.start_recording(torch.device("cpu"))
            try:
                again = run()
            finally:
                ledger.stop_recording()
                self.cap._ids[:] = ids
            if out is not None:
                out.data.copy_(again.data)

        return replay, out


class Model(nn.Module):
    """Two points, one that is called twice, and one that is left out on demand."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.first, self.shared, self.optional = nn.Linear(D, D), nn.Linear(D, D), nn.Identity()
        self.skips = False

    def forward(self, tokens):
        x = self.first(self.embed(tokens)).tanh()
        kept = self.optional(x)
        x = self.shared(self.shared(x if self.skips else kept).tanh())
        return (x * x).sum()


def step_of(model, cap=None):
    def step(tokens, mask=None):
        loss = model(tokens)
        if mask is None:
            loss.backward()
        else:
            with cap.batch(mask=mask):
                loss.backward()
        return loss.detach()

    return step


def eager_rows(model, batches, **options):
    with tlfast.freeze(model), tlfast.capture(model, backend="native", **options) as cap:
        for tokens in batches:
            step_of(model)(tokens)
        return {name: cap[name].clone() for name in cap.names}, cap.counts
