"""A Hugging Face model as a TransformerLens model, without a download."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from ..errors import broken_rule
from .library import library


def as_bridge(model: nn.Module, tokenizer: Any = None) -> Any:
    """A `TransformerBridge` around a Hugging Face model that is loaded; the weights are the same tensors.

    Raises:
        ValueError: where this TransformerLens has no bridge (before 3.0), or none for the model's architecture.
    """
    library()
    config: Any = model.config
    try:
        builder = import_module("transformer_lens.model_bridge.sources._bridge_builder")
        return builder.build_bridge_from_module(
            model, config.architectures[0], hf_config=config, tokenizer=tokenizer, model_name=config.model_type
        )
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(
            broken_rule(
                "collect", "lens", "be a model that TransformerLens can bridge", f"{type(model).__name__}: {error}",
                "Use TransformerLens 3.9 or newer, or leave --lens out.",
            )
        ) from error  # fmt: skip
