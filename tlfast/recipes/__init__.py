"""What people compute of gradients, each study a function: attributions, edges, lenses, pairs for an SAE."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edges import EdgeScores, eap
    from .gradient_pairs import gradient_sae_pairs
    from .gradient_paths import integrated_gradients
    from .jacobian_lens import fit_jacobian_lens
    from .mlp_factors import backward_lens
    from .pairs import Pairs
    from .patching import Attribution, attribution_patching
    from .products import gather_into, outer_into
    from .token_saliency import saliency

# A module never has the name of a function here: importing it would put it in the function's place.
_HOMES = {
    "Attribution": "patching",
    "EdgeScores": "edges",
    "Pairs": "pairs",
    "attribution_patching": "patching",
    "backward_lens": "mlp_factors",
    "eap": "edges",
    "fit_jacobian_lens": "jacobian_lens",
    "gather_into": "products",
    "gradient_sae_pairs": "gradient_pairs",
    "integrated_gradients": "gradient_paths",
    "outer_into": "products",
    "saliency": "token_saliency",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Attribution",
    "EdgeScores",
    "Pairs",
    "attribution_patching",
    "backward_lens",
    "eap",
    "fit_jacobian_lens",
    "gather_into",
    "gradient_sae_pairs",
    "integrated_gradients",
    "outer_into",
    "saliency",
]
