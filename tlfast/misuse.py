"""What is said at the end of a capture that went wrong: an output changed in place, no rows at all."""

from __future__ import annotations

import warnings

from .attachment import anything_compiled
from .errors import broken_rule


def changed_in_place(error: RuntimeError) -> bool:
    """Whether this is PyTorch's error for an in-place operation on the output of a full backward hook."""
    return "BackwardHookFunction" in str(error) and "is a view and is being modified inplace" in str(error)


def in_place_error(name: str) -> RuntimeError:
    """The same in our words; ``name`` is the point that was called last."""
    return RuntimeError(
        broken_rule(
            f"capture at {name}", "an output", 'stay unmodified in place with attach="full"',
            "an in-place operation after it (the point called last)", 'Use attach="tensor".',
        )
    )  # fmt: skip


def tell_no_rows(compiled_before: bool, called: bool) -> None:
    """Warn that a capture ends without a row; RuntimeError where compiled code is the reason."""
    if compiled_before and not called:
        # The model may lie inside a compiled function or wrapper that `check_not_compiled` can't see.
        raise RuntimeError(
            broken_rule(
                "capture", "a compiled model", "be captured before its first call",
                "no call of any point, and code compiled before the capture",
                "Call the model inside the with; if it is compiled, enter the capture first, or call "
                "torch._dynamo.reset().",
            )
        )  # fmt: skip
    text = "capture: no backward reached the points, so there are no rows; was backward() called inside the with?"
    if anything_compiled():
        text += " Compiled modules of one class share their code, whatever their hooks, unless "
        text += "torch._dynamo.config.skip_nnmodule_hook_guards = False."
    warnings.warn(text, stacklevel=3)
