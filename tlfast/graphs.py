"""A step as a CUDA graph: captured once, replayed over inputs of the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .errors import broken_rule
from .hooks import Capture


def graph_step(
    cap: Capture, step: Callable[..., Any], *example_inputs: torch.Tensor, warmup: int = 2
) -> Callable[..., None]:
    """Capture ``step``, one forward and backward, and return a function that replays it over new inputs.

    Raises:
        RuntimeError: always, as yet.
    """
    raise RuntimeError(broken_rule("graph_step", "cap", "be on a device with graphs", cap.backend, "Run the step."))
