"""Integrated gradients: what each token, or each number of an input, does to a metric on the way from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..backends.choice import reduce_product_into
from ..backends.outputs import replace_output, select_output
from ..collecting.batches import Batch
from ..collecting.loop import at_work
from ..errors import broken_rule
from ..hooks.freeze import find_embedding, freeze
from ..hooks.points import find_points
from .attributions import Attributions, token_texts
from .metric import Examples, Metric, checked_values, device_of, values_of

_WHO = "integrated_gradients"
# Runs the model where the point of the path is put in: (points [n * B, ...], n copies) -> the metric [n * B].
_Run = Callable[[torch.Tensor, int], torch.Tensor]


def integrated_gradients(
    model: nn.Module,
    inputs: Any,
    metric: Metric,
    baseline: torch.Tensor | int | None = None,
    steps: int = 32,
    *,
    tokenizer: Any = None,
    embedding: str | nn.Module | None = None,
    batch_examples: int = 16,
    padding_side: str = "right",
    pad_id: int = 0,
) -> Attributions:
    """Share out what a metric changes by from a baseline to the input (Sundararajan et al., 2017).

    The score of each number x_i is ``(x_i - x'_i) * integral over a in [0, 1] of d metric(x' + a (x - x')) / d x_i``,
    the integral by Gauss-Legendre at ``steps`` points. Tokens are embedded first: x is the output of the embedding, and
    a token's score the sum over its width. The scores of an example add up to ``metric(x) - metric(x')``
    (completeness); ``delta`` of the result says how nearly.

    Args:
        model: any module; in eval mode and frozen meanwhile.
        inputs: token sequences, a tensor of tokens [B, P], texts, or mappings with fields, as `saliency` takes them; or a
            floating-point tensor [B, ...] that the model takes as it is.
        metric: (logits, the padded batch) -> [B], as for `saliency`. For a floating-point input it gets what the model
            returns (its logits, where it has some) and the input [B, ...] of that batch.
        baseline: x'. None: zeros. A tensor that broadcasts to x; or, for tokens, the number of a token, whose embedding
            stands at every position.
        steps: points on the path, each a forward and a backward.
        tokenizer: makes tokens of texts, and names tokens where scores are drawn.
        embedding: the module whose output is x; None: the model's embedding of tokens. It is called once in a forward.
        batch_examples: examples in a batch, or points on the path where there are fewer examples.
        padding_side, pad_id: how sequences are padded.

    Returns:
        `Attributions`: ``scores`` [P] of the real tokens by example, or of the input's shape; ``values``,
        ``baseline_values``, ``delta``.

    Raises:
        ValueError, TypeError: for bad arguments, and for a metric that isn't a number for each example.

    Example:
        >>> import torch, tlfast
        >>> model, x = torch.nn.Linear(3, 1, bias=False), torch.randn(2, 3)
        >>> found = tlfast.recipes.integrated_gradients(model, x, lambda y, given: y[:, 0].square())
        >>> torch.allclose(torch.stack(found.scores), x * model.weight[0] * (x @ model.weight[0])[:, None], atol=1e-5)
        True
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(broken_rule(_WHO, "steps", "be a positive number", repr(steps), "Give 32."))
    path = _Path.of(steps, batch_examples)
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        for name, value in (("embedding", embedding), ("tokenizer", tokenizer)):
            if value is not None:
                rule, got = "be left out for a floating-point input", type(value).__name__
                raise ValueError(broken_rule(_WHO, name, rule, got, "Give tokens or texts, if those are meant."))
        return _of_input(model, inputs, metric, baseline, path)
    module = find_embedding(model) if embedding is None else embedding
    ((name, point),) = find_points(_WHO, model, module).items()
    examples = Examples(_WHO, inputs, tokenizer, batch_examples, padding_side, pad_id)
    scores: dict[int, torch.Tensor] = {}
    ends = torch.empty(2, len(examples.all), dtype=torch.float64)
    with at_work(model, name), _Put(point, name) as put:
        for places, batch in examples.batches(device_of(model)):
            x, run = put.prepared(model, metric, batch)
            grads, ends[:, places] = path.integrate(run, x, put.start(x, baseline, model), len(batch))
            rows = grads.new_empty(x.shape[:-1])
            reduce_product_into(rows, grads, x - put.start(x, baseline, model), "sum", over=-1)
            for k, place in enumerate(places):
                scores[place] = examples.real(rows, batch, k).float().cpu()
    tokens = token_texts(tokenizer, [each.input_ids for each in examples.all]) if examples.all[0].length else None
    return Attributions([scores[k] for k in range(len(scores))], ends[1], ends[0], tokens)
