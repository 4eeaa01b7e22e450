"""What is asked of a collection, checked before any work starts: its specs, its numbers, the width of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule
from ..hooks.freeze import Embedding
from ..hooks.points import find_points, named_points
from ..spec import Over, Reduction, Spec, as_specs


def wanted_specs(
    model: nn.Module, points: Any, reduce: Reduction, over: Over, dtype: torch.dtype | str | None,
    output: int | str | None, lens: bool, embedding: Embedding | None,
) -> list[Spec]:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(broken_rule("collect", "model", "be an nn.Module", type(model).__name__, "Pass the model."))
    specs = as_specs("collect", points, reduce, over, dtype, output)
    if embedding is not None:
        find_points("collect", model, embedding, "embedding")
    find: Any = find_points
    if lens:
        from ..transformer_lens.names import find_names as find

        # The names that a filter means: a dataset says them.
        specs = [replace(spec, points=list(find("collect", model, spec.points))) for spec in specs]
    else:
        specs = [replace(spec, points=named_points("collect", model, spec.points)) for spec in specs]
    for spec in specs:
        find("collect", model, spec.points)
        if 0 in spec.dims:
            remedy = "Reduce the batch when reading, or use capture."
            raise ValueError(broken_rule("collect", "over", "keep the batch: a row is an example", spec.over, remedy))
    return specs


def check_peaceful(overwrite: bool, resume: str) -> None:
    """ValueError for what one of several processes would do to the work of the others."""
    if overwrite:
        remedy = "Remove the dataset before they start."
        raise ValueError(broken_rule("collect", "overwrite", "be off where several processes collect", "on", remedy))
    if resume == "never":
        rule = 'be "auto" or "must" where several processes collect'
        remedy = "All but the first find a dataset there."
        raise ValueError(broken_rule("collect", "resume", rule, '"never"', remedy))


def check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(broken_rule("collect", name, "be a positive number", repr(value), "Give a whole number."))


def positions_of(model: nn.Module) -> int | None:
    """How many positions a Hugging Face model has; None where nobody says."""
    n_positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return n_positions if isinstance(n_positions, int) else None


def width_of(specs: Sequence[Spec], longest: int, seq_len: int | None) -> int | None:
    """The positions of every batch where a row keeps them; None where batches can be as long as their examples."""
    return None if all(1 in spec.dims for spec in specs) else seq_len or longest
