"""What stands in for CUDA graphs on the CPU, op by op: a tape of what a run dispatched, played into the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Taking(TorchDispatchMode):
    def __init__(self, tape: list[tuple[Any, Any, Any, Any]]):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, out))
        return out


class OpTapes:
    """Records what a run does, and does it again into the tensors of then: no Python of the run is called in a replay.

    As of a CUDA graph, what the host decided stays decided, and values outside of recorded memory stay as they were.
    """

    def __init__(self) -> None:
        self.n_warmups = self.n_recorded = self.n_replays = 0

    def warm_up(self, run: Callable[[], Any]) -> None:
        self.n_warmups += 1
        run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape: list[tuple[Any, Any, Any, Any]] = []
        self.n_recorded += 1
        with _Taking(tape):
            kept = run()

        def replay() -> None:
            self.n_replays += 1
            with torch.no_grad():
                for func, args, kwargs, out in tape:
                    again = func(*args, **kwargs)
                    for then, now in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(then, torch.Tensor) and then.data_ptr() != now.data_ptr():
                            then.detach().copy_(now)

        return replay, kept
