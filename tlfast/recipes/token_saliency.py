"""Saliency of tokens: gradient times input at the embedding, a number for each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..hooks.capture import capture
from ..hooks.freeze import at_work
from .attributions import Attributions, token_texts
from .metric import Examples, Metric, device_of, embedding_of, values_of
from .pairs import check_model

_WHO = "saliency"


def saliency(
    model: nn.Module,
    batch: Any,
    metric: Metric,
    *,
    tokenizer: Any = None,
    embedding: str | nn.Module | None = None,
    batch_examples: int = 16,
    padding_side: str = "right",
    pad_id: int = 0,
) -> Attributions:
    """Say how much each token does to a metric: gradient times input (Shrikumar et al., 2016; Denil et al., 2014).

    The score of token t is ``sum over d of e[t, d] * d metric / d e[t, d]``, where e is the output of the embedding. It
    is the first-order estimate of what the metric loses if the token's embedding becomes zero, and added up where
    backward makes the gradient, in float32. One forward and one backward for each batch.

    Args:
        model: any model of tokens; in eval mode and frozen meanwhile.
        batch: token sequences, a tensor [B, P], texts, mappings with ``input_ids`` and other fields, or several
            of them: what `collect` takes, and texts.
        metric: (logits [B, P, V], the padded batch) -> [B], what is asked about each example. ``batch.mask`` is True at
            real tokens, or None where all are; ``batch["answer"]`` is a field of the examples.
        tokenizer: makes tokens of texts, and names tokens where scores are drawn.
        embedding: the module at whose output; None: the model's embedding of tokens. Where it isn't one of
            tokens, as the patches of an image, a score is of one of its positions.
        batch_examples: examples in a batch.
        padding_side, pad_id: how they are padded.

    Returns:
        `Attributions`: ``scores`` of the real tokens, by example; a notebook draws them over the text, ``print`` and
        ``terminal()`` write them.

    Raises:
        ValueError, TypeError: for bad arguments, and for a metric that isn't a number for each example.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False))
        >>> found = tlfast.recipes.saliency(model, [[1, 2, 3], [4]], lambda logits, batch: logits[:, 0, 5])
        >>> torch.allclose(found.scores[0], torch.stack([found.values[0].float(), *torch.zeros(2)]))
        True
    """
    check_model(_WHO, model)
    name, _ = embedding_of(_WHO, model, embedding)
    examples = Examples(_WHO, batch, tokenizer, batch_examples, padding_side, pad_id)
    scores: dict[int, torch.Tensor] = {}
    values = torch.empty(len(examples.all), dtype=torch.float64)
    options: Any = dict(of="grad*act", reduce="sum", over=2, dtype=torch.float32, rows=batch_examples)
    with at_work(model, name), capture(model, name, **options) as cap:
        for places, given in examples.batches(device_of(model)):
            cap.clear()
            with cap.batch(given.mask):
                found = values_of(_WHO, metric, model, given)
                found.sum().backward()
            values[places] = found.detach().double().cpu()
            rows = cap[f"{name}:grad*act"]
            for k, place in enumerate(places):
                scores[place] = examples.real(rows, given, k).cpu().clone()
    tokens = token_texts(tokenizer, [each.input_ids for each in examples.all]) if examples.all[0].length else None
    return Attributions([scores[k] for k in range(len(scores))], values, None, tokens)
