"""What people compute of gradients, each study a function: lenses, attributions, pairs for sparse autoencoders."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backward_lens import backward_lens
    from .gradient_pairs import gradient_sae_pairs
    from .integrated_gradients import integrated_gradients
    from .jacobian_lens import fit_jacobian_lens
    from .saliency import saliency

_HOMES = {
    "backward_lens": "backward_lens",
    "fit_jacobian_lens": "jacobian_lens",
    "gradient_sae_pairs": "gradient_pairs",
    "integrated_gradients": "integrated_gradients",
    "saliency": "saliency",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["backward_lens", "fit_jacobian_lens", "gradient_sae_pairs", "integrated_gradients", "saliency"]
