"""Checkpoints that save no tensor of a forward, and run it again in its backward: what they hear of ours.

A checkpoint with ``use_reentrant=False`` takes the tensors that the second forward saves for those of the first, by
their order. So a call may save there in the second one exactly if it saved in the first.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import broken_rule

_MODULE = "torch.utils.checkpoint"
_FORWARD, _AGAIN = "frame", "target_frame_ref"  # what the functions close over that are given what is saved


class Heard:
    """The forwards, each known by its checkpoint, in which one tap has saved something."""

    def __init__(self) -> None:
        self._frames: weakref.WeakSet[Any] = weakref.WeakSet()

    def hears(self, entered: bool) -> bool:
        """Whether what the tap saves now is for the hooks on saved tensors to hear of.

        Args:
            entered: whether the tap's module was entered outside of a backward.

        Raises:
            RuntimeError: for a checkpoint of a torch that has changed.
        """
        hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack: Any = None if hooks is None else inspect.unwrap(hooks[0])
        if getattr(pack, "__module__", None) != _MODULE:
            return entered  # somebody else's: what it can't know from before is not for it
        code = getattr(pack, "__code__", None)
        held = {} if code is None else dict(zip(code.co_freevars, pack.__closure__ or (), strict=True))
        if _FORWARD in held:
            self._frames.add(held[_FORWARD].cell_contents)
            return True
        if _AGAIN in held:
            return held[_AGAIN].cell_contents() in self._frames
        got, remedy = f"another, of torch {torch.__version__}", "Say checkpoint(..., use_reentrant=True)."
        raise RuntimeError(broken_rule("capture", "a checkpoint", "be one that tlfast knows", got, remedy))


@contextmanager
def unheard() -> Iterator[None]:
    """Hooks on saved tensors hear of nothing that is saved meanwhile, in this thread."""
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)
