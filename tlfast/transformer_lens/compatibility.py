"""What the installed TransformerLens does with a backward hook, found by trying it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .library import hook_point_type

REMEDY = "use TransformerLens 2.2.2 or newer, or capture with tlfast.transformer_lens, which is right on every version"


def registered_hooks() -> str:
    """How `HookPoint.add_hook(dir="bwd")` registers: "full", "deprecated" (of 2.0.0 to 2.2.1) or "unknown"."""
    point: Any = hook_point_type()()
    point.add_hook(lambda grad, hook: None, dir="bwd")
    if not point._backward_hooks:
        return "unknown"
    return "full" if point._is_full_backward_hook else "deprecated"


def accepts(returned: str) -> bool:
    """Whether a backward hook may return None, "grad" or "(grad,)" on a point with one gradient."""
    point: Any = hook_point_type()()
    results = {"None": lambda grad: None, "grad": lambda grad: grad, "(grad,)": lambda grad: (grad,)}
    point.add_hook(lambda grad, hook: results[returned](grad), dir="bwd")
    x = torch.ones(2, requires_grad=True)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            point(x * 1).sum().backward()
    except RuntimeError:
        return False
    return True


def check() -> str:
    """One line on the installed TransformerLens: what a backward hook is there, and what it may return.

    Example:
        check()  # 'full backward hooks; a hook may return None, grad, (grad,)'
    """
    kind = registered_hooks()
    allowed = ", ".join(returned for returned in ("None", "grad", "(grad,)") if accepts(returned))
    if kind == "full":
        return f"full backward hooks; a hook may return {allowed or 'nothing'}"
    if kind == "deprecated":
        return f"deprecated backward hooks, which may see the gradient of another operation: {REMEDY}"
    return f"backward hooks of an unknown kind; tlfast doesn't depend on them, but {REMEDY}"


def warn_if_wrong() -> None:
    """Warn, with the remedy, where backward hooks of this TransformerLens don't mean what they say."""
    if registered_hooks() != "full":
        warnings.warn(f"tlfast.transformer_lens: {check()}", stacklevel=3)
