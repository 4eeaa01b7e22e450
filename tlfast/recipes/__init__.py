"""What people compute of gradients, each study a function: lenses, attributions, pairs for sparse autoencoders."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gradient_pairs import gradient_sae_pairs
    from .gradient_paths import integrated_gradients
    from .jacobian_lens import fit_jacobian_lens
    from .mlp_factors import backward_lens
    from .token_saliency import saliency

# A module never has the name of a function here: importing it would put it in the function's place.
_HOMES = {
    "backward_lens": "mlp_factors",
    "fit_jacobian_lens": "jacobian_lens",
    "gradient_sae_pairs": "gradient_pairs",
    "integrated_gradients": "gradient_paths",
    "saliency": "token_saliency",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["backward_lens", "fit_jacobian_lens", "gradient_sae_pairs", "integrated_gradients", "saliency"]
