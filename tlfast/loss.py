"""The loss whose gradients are collected: a sum over examples, so that no row depends on its batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .batches import Batch
from .errors import broken_rule


@lru_cache(maxsize=64)
def _accepted(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of ``model.forward`` that the batch asks for, out of those that it accepts.

    Raises:
        ValueError: for left padding where the model takes neither an ``attention_mask`` nor ``position_ids``.
    """
    accepted = _accepted(type(model).forward)
    wanted: dict[str, Any] = {"use_cache": False}
    if batch.mask is not None:
        wanted |= {"attention_mask": batch.mask.long(), "position_ids": batch.position_ids}
        if batch.padding_side == "left" and "attention_mask" not in accepted:
            remedy = 'Use padding_side="right".'
            got = f"{type(model).__name__} with left padding"
            raise ValueError(broken_rule("collect", "model", "take an attention_mask", got, remedy))
    return {name: value for name, value in wanted.items() if name in accepted and value is not None}


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the next token, summed over the real tokens of each example and over the examples.

    Under a mean, a row would be divided by the number of tokens in its batch.

    Args:
        model: a Hugging Face causal LM, or any module that returns logits [B, P, V], or has them first in a tuple.
        batch: the tokens.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> from tlfast.batches import Batch
        >>> from tlfast.loss import next_token_loss
        >>> model = torch.nn.Embedding(4, 4)  # its output is the logits
        >>> next_token_loss(model, Batch(torch.tensor([[0, 1, 2]]), None)).shape
        torch.Size([])
    """
    output = model(batch.input_ids, **model_inputs(model, batch))
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, torch.Tensor):
        remedy = "Pass loss=, a function of model and batch."
        raise ValueError(broken_rule("collect", "model", "return logits", type(output).__name__, remedy))
    # The labels are shifted, not the logits: a slice of those would be copied.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")
