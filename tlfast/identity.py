"""What a collection says of its rows in dataset.json: two runs make one dataset where this is equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .batches import Batching
from .dataset.plan import Example
from .fingerprint import describe_model, describe_spec, examples_fingerprint
from .loss import next_token_loss
from .spec import Spec


def describe_examples(examples: Sequence[Example], skipped: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What a dataset, or an extension of it, says of its examples and of the bad ones that were left out."""
    return {
        "tokens": sum(example.length for example in examples),
        "sha256": examples_fingerprint(examples),
        "skipped": [list(entry) for entry in skipped],
    }


def describe_collection(
    model: nn.Module,
    specs: Sequence[Spec],
    loss: Any,
    batching: Batching,
    examples: Mapping[str, Any],
    more: Mapping[str, Any] | None,
    **settings: Any,
) -> dict[str, Any]:
    """The header of dataset.json; ``settings`` stand in it by their names, ``more`` is merged into it."""
    identity = {
        "model": describe_model(model),
        "specs": [describe_spec(model, spec) for spec in specs],
        "loss": "next-token cross-entropy, summed over each example's tokens" if loss is next_token_loss
        else f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}",
        "batching": {
            "batch_tokens": batching.batch_tokens, "width": batching.width,
            "padding_side": batching.padding_side, "pad_id": batching.pad_id,
        } | ({} if batching.buckets is None else {"buckets": list(batching.buckets)}),
        "examples": dict(examples),
        **settings,
    }  # fmt: skip
    for key, value in (more or {}).items():
        known = identity.get(key)
        identity[key] = {**known, **value} if isinstance(known, dict) else value
    return identity
