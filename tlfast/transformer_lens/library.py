"""TransformerLens itself: found by what it has, not by its version."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from ..errors import broken_rule


def library() -> ModuleType:
    """The package `transformer_lens`.

    Raises:
        ImportError: where it isn't installed, or can't be imported; it names the extra.
    """
    try:
        return import_module("transformer_lens")
    except ImportError as error:
        raise ImportError(
            broken_rule(
                "tlfast.transformer_lens", "transformer_lens", "be importable", str(error),
                'Run pip install "tlfast[transformer-lens]".',
            )
        ) from error  # fmt: skip


@cache
def _found(name: str, *modules: str) -> Any:
    """A name of TransformerLens, which lies in one module or another: `utils` became `utilities`."""
    library()
    for module in modules:
        with suppress(ImportError, AttributeError):
            return getattr(import_module(f"transformer_lens.{module}"), name)
    raise ImportError(
        broken_rule(
            "tlfast.transformer_lens", name, f"be in one of transformer_lens.{', .'.join(modules)}", "neither",
            "Use a TransformerLens that tlfast is tested with: see docs/transformer_lens.md.",
        )
    )  # fmt: skip


def hook_point_type() -> type:
    """`HookPoint`."""
    found: type = _found("HookPoint", "hook_points")
    return found


def root_module_type() -> type:
    """`HookedRootModule`, at the top level or with the hook points."""
    module = library()
    found: type = getattr(module, "HookedRootModule", None) or _found("HookedRootModule", "hook_points")
    return found


def bridge_type() -> type | None:
    """`TransformerBridge`, at the top level or, up to 3.2, in its package alone; None before 3.0."""
    with suppress(ImportError):
        found: type = _found("TransformerBridge", "model_bridge")
        return found
    return None


def lens_handle(hook: Any, permanent: bool, level: int | None) -> Any:
    """A `LensHandle`: how a hook stands in `HookPoint.fwd_hooks` and `bwd_hooks`."""
    return _found("LensHandle", "hook_points")(hook, is_permanent=permanent, context_level=level)


def full_name(parts: tuple[Any, ...]) -> str:
    """The name of a point from its short form: ("resid_post", 3), ("k6",), ("normalized", 3, "ln1")."""
    name: str = _found("get_act_name", "utilities", "utils")(*parts)
    return name


def position_slice(given: Any) -> Any:
    """A `Slice` made of what `pos_slice` takes; a number keeps its dimension."""
    return _found("Slice", "utilities", "utils").unwrap(given)


def activation_cache(tensors: dict[str, Any], model: Any, has_batch_dim: bool = True) -> Any:
    """An `ActivationCache`."""
    return library().ActivationCache(tensors, model, has_batch_dim=has_batch_dim)
