"""Calls: one forward of one point, in plain Python, as csrc/autograd/tap.h has them."""

from __future__ import annotations

from typing import Any

import torch


class Call:
    """One forward of one point. Its autograd node owns it; it is gone when that is.

    Args:
        tap: the point's; it counts the calls whose gradients may still come.
        of: "node"; "full_hook" or "compiled" for one that stands for a call that nobody holds.
    """

    __slots__ = ("of", "recomputed", "run", "tap")

    def __init__(self, tap: Any, of: str = "node"):
        self.tap, self.of = tap, of
        self.run = tap.backwards.run  # in a later one it fires nothing
        # Made inside a backward: of a checkpoint, whose other calls may still come.
        here = torch._C._current_graph_task_id() != -1
        self.recomputed = of == "compiled" or (tap.recomputed if of == "full_hook" else here)
        if of == "node":
            tap.n_in_flight += 1

    def __del__(self) -> None:
        if self.of == "node" and self.run == self.tap.run:
            self.tap.n_in_flight -= 1

    @property
    def alone(self) -> bool:
        """Whether no other call of the point is known that may fire in the backward in which this one fires first: else
        the gradients of all of them have to be added up. Where another one comes nevertheless, that is an error.
        """
        return not self.recomputed and not self.tap.unseen and bool(self.tap.n_in_flight <= 1)
