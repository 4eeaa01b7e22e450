"""TransformerLens' `JacobianLens.fit`, with the rows of each prompt made by `tlfast.recipes`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..hooks.patches import Patch
from ..recipes.jacobian_rows import JacobianRows

# Whether a backward of a model takes a batch of gradients: tried once.
_together: WeakKeyDictionary[Any, bool | None] = WeakKeyDictionary()


_NAME = "transformer_lens.tools.analysis.jacobian_lens"


def names_estimators() -> bool:
    """Whether the fit of this TransformerLens says by which estimator it was made."""
    with suppress(ImportError):
        return hasattr(import_module(_NAME), "ESTIMATOR_JACOBIAN")
    return False


def jacobian_lens_patches(concern: Callable[[object], bool]) -> Iterator[Patch]:
    """What stands in the place of the loop over a prompt's rows, where theirs is imported, and has one.

    Its fit hands the loop the function that makes the gradients, its plug for other estimators. Where that is the
    ordinary one, the rows are made here; with another it is theirs.
    """
    module = sys.modules.get(_NAME)
    plain: Any = getattr(module, "_ordinary_vjp", None)
    theirs: Any = getattr(module, "_jacobian_for_prompt", None)
    if module is None or plain is None or theirs is None:
        return

    @wraps(theirs)
    def jacobian_for_prompt(
        model: Any,
        tokens: torch.Tensor,
        *,
        source_layers: list[int],
        dim_batch: int,
        skip_first_positions: int,
        backward_provider: Any,
    ) -> dict[int, torch.Tensor]:
        if backward_provider is not plain or not concern(model):
            given = dict(source_layers=source_layers, dim_batch=dim_batch, skip_first_positions=skip_first_positions)
            return dict(theirs(model, tokens, **given, backward_provider=backward_provider))
        points = model.hook_dict
        blocks = [points[f"blocks.{layer}.hook_out"] for layer in (*source_layers, model.cfg.n_layers - 1)]
        rows = JacobianRows(
            model, blocks, dim_batch, skip_first_positions, _together.get(model), "JacobianLens.fit", False
        )
        found = rows.of(lambda given: model(given, return_type=None), tokens)
        _together[model] = rows.together
        return dict(zip(source_layers, found, strict=True))

    yield module, "_jacobian_for_prompt", jacobian_for_prompt
