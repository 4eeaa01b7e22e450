"""What is said at the end of a capture that went wrong: an output changed in place, no rows at all."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import broken_rule
from .attachment import anything_compiled


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


def n_backwards() -> int | None:
    """How many backwards this process has begun, as PyTorch numbers them, with the one in here; None if unknown."""
    seen: list[int] = []
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros((), device="cpu", requires_grad=True)
            y = x.view(())
            y.register_hook(lambda grad: seen.append(torch._C._current_graph_task_id()))
            torch.autograd.grad(y, x)
    except RuntimeError:  # inside a transform of torch.func, say
        return None
    return seen[0] if seen else None


def why_no_rows(taps: Sequence[Any], calls_before: int, backward_ran: bool | None) -> str:
    """Why no row came of what was done since the call with this number, and what to do.

    Args:
        taps: all of the capture.
        calls_before: calls of points until then.
        backward_ran: whether any did since; None: it isn't known.
    """
    idle = [tap.name for tap in taps if tap.last_call <= calls_before]
    if idle and anything_compiled():  # which counts no calls
        return "Was backward() called inside the with?"
    if len(idle) == len(taps):
        return "No point was called: call the model inside the with. What its forward doesn't call can't be captured."
    called = f"The points were called{f' (not {_some(idle)})' if idle else ''}"
    if backward_ran is None:
        return f"{called}: call backward() on a loss that is made of their outputs."
    if backward_ran:
        other = next((f", or {tap.others} at {tap.name}" for tap in taps if tap.others), "")
        return (
            f"{called} and a backward ran, but its loss isn't made of their outputs: choose points that it uses{other}."
        )
    return f"{called} and no backward ran: call backward() inside the with."


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def tell_no_rows(compiled_before: bool, called: bool, reason: str) -> None:
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
    text = f"capture: no backward reached the points, so there are no rows. {reason}"
    if anything_compiled():
        text += " Compiled modules of one class share their code, whatever their hooks, unless "
        text += "torch._dynamo.config.skip_nnmodule_hook_guards = False."
    warnings.warn(text, stacklevel=3)
