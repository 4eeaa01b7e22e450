"""Integrated gradients: what each token, or each number of an input, does to a metric on the way from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..backends.choice import reduce_product_into
from ..backends.outputs import replace_output, select_output
from ..collecting.batches import Batch
from ..errors import broken_rule
from ..hooks.freeze import at_work
from .attributions import Attributions, token_texts
from .metric import Examples, Metric, checked_values, device_of, embedding_of, values_of
from .pairs import check_model

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
        inputs: token sequences, a tensor of tokens [B, P], texts, or mappings with fields, as `saliency` takes them; or
            a floating-point tensor [B, ...] that the model takes as it is.
        metric: (logits, the padded batch) -> [B], as for `saliency`. For a floating-point input it gets what the model
            returns (its logits, where it has some) and the input [B, ...] of that batch.
        baseline: x'. None: zeros. A tensor that broadcasts to x, for tokens [D], or [P, D] of one length; or, for
            tokens, the number of a token, whose embedding stands at every position. Where a model begins with a norm
            (Llama's kin), zeros are a point at which it jumps, and completeness fails there: take a token.
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
    check_model(_WHO, model)
    if type(steps) is not int or steps < 1:
        raise ValueError(broken_rule(_WHO, "steps", "be a positive number", repr(steps), "Give 32."))
    if type(batch_examples) is not int or batch_examples < 1:
        raise ValueError(broken_rule(_WHO, "batch_examples", "be a positive number", repr(batch_examples), "Say 1."))
    path = _Path(steps, batch_examples)
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        for name, value in (("embedding", embedding), ("tokenizer", tokenizer)):
            if value is not None:
                rule, got = "be left out for a floating-point input", type(value).__name__
                raise ValueError(broken_rule(_WHO, name, rule, got, "Give tokens or texts, if those are meant."))
        return _of_input(model, inputs, metric, baseline, path)
    name, point = embedding_of(_WHO, model, embedding)
    examples = Examples(_WHO, inputs, tokenizer, batch_examples, padding_side, pad_id)
    scores: dict[int, torch.Tensor] = {}
    ends = torch.empty(2, len(examples.all), dtype=torch.float64)
    with at_work(model, name), _Put(point, name) as put:
        for places, batch in examples.batches(device_of(model)):
            x = put.embedded(metric, model, batch)
            _check_baseline(baseline, x, batch)
            start = _baseline(baseline, x, partial(put.of_token, device=x.device) if x.dim() == 3 else None)

            def run(points: torch.Tensor, copies: int, batch: Batch = batch) -> torch.Tensor:
                return put.values(metric, model, _repeated(batch, copies), points)

            grads, ends[:, places] = path.integrate(run, x, start, None if _repeats(batch) else 1)
            rows = grads.new_empty(grads.shape[:-1])
            reduce_product_into(rows, grads, (x - start).to(grads.dtype), "sum", over=-1)
            for k, place in enumerate(places):
                scores[place] = examples.real(rows, batch, k).float().cpu()
    tokens = token_texts(tokenizer, [each.input_ids for each in examples.all]) if examples.all[0].length else None
    return Attributions([scores[k] for k in range(len(scores))], ends[1], ends[0], tokens)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, with gradients on; as before afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _of_input(
    model: nn.Module, inputs: torch.Tensor, metric: Metric, baseline: torch.Tensor | int | None, path: _Path
) -> Attributions:
    """The scores of a floating-point input [N, ...]."""
    if inputs.dim() < 2 or not len(inputs):
        remedy = "Add the dimension of the examples."
        raise ValueError(broken_rule(_WHO, "inputs", "be a batch [B, ...]", list(inputs.shape), remedy))
    inputs = inputs.detach()
    start = _baseline(baseline, inputs, None)
    scores: list[torch.Tensor] = []
    ends = torch.empty(2, len(inputs), dtype=torch.float64)
    with _evaluated(model):
        for first in range(0, len(inputs), path.most):
            part = slice(first, first + path.most)
            given = inputs[part]

            def run(points: torch.Tensor, copies: int, given: torch.Tensor = given) -> torch.Tensor:
                output: Any = model(points)
                logits = getattr(output, "logits", output)
                return checked_values(_WHO, metric(logits, torch.cat([given] * copies)), len(points))

            grads, ends[:, part] = path.integrate(run, given, start[part])
            scores += list((grads * (given - start[part])).float().cpu())
    return Attributions(scores, ends[1], ends[0])


def _baseline(
    given: torch.Tensor | int | None, x: torch.Tensor, embedded: Callable[[int], torch.Tensor] | None
) -> torch.Tensor:
    """The baseline in the shape of x. ``embedded`` makes the value of a token; None where x isn't made of tokens."""
    if given is None:
        return torch.zeros_like(x)
    if isinstance(given, int) and not isinstance(given, bool) and embedded is not None:
        given = embedded(given)
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        rule = "be a tensor, the number of a token, or None" if embedded else "be a tensor, or None"
        raise TypeError(broken_rule(_WHO, "baseline", rule, repr(given), "Leave it out for zeros."))
    try:
        return given.detach().to(x).expand(x.shape)
    except RuntimeError:
        rule, remedy = f"broadcast to {list(x.shape)}", "Give one for each number, or one for all."
        raise ValueError(broken_rule(_WHO, "baseline", rule, list(given.shape), remedy)) from None


def _check_baseline(given: object, x: torch.Tensor, batch: Batch) -> None:
    """ValueError for a baseline that would meet examples, or positions, that it isn't of: batches are sorted."""
    if not isinstance(given, torch.Tensor) or x.dim() != 3:
        return
    by_example, by_position = given.dim() == 3 and len(given) > 1, given.dim() > 1 and given.shape[-2] > 1
    if by_example or (by_position and batch.mask is not None and not bool(batch.mask.all())):
        got = f"{list(given.shape)} for {'several examples' if by_example else 'examples of several lengths'}"
        remedy = "Call once for each example, or give one for all positions."
        raise ValueError(broken_rule(_WHO, "baseline", "be [D], or [P, D] where all have one length", got, remedy))


class _Path:
    """Points on the straight way from the baseline to the input, and their weights.

    Args:
        steps: how many points.
        most: rows of a forward: so many points at once where there are fewer examples.
    """

    def __init__(self, steps: int, most: int) -> None:
        places, weights = np.polynomial.legendre.leggauss(steps)
        self.points = list(zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))
        self.most = most

    def integrate(
        self, run: _Run, x: torch.Tensor, start: torch.Tensor, copies: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The integral of the gradient, of x's shape, float32 or wider; and the metric at both ends, float64 [2, B].

        ``copies`` are how many points may be run at once; None: as many as `most` allows.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(x.shape, dtype=wide, device=x.device)
        with torch.no_grad():
            ends = torch.stack([run(end, 1).double().cpu() for end in (start, x)])
        copies = max(1, self.most // len(x)) if copies is None else copies
        for first in range(0, len(self.points), copies):
            part = self.points[first : first + copies]
            at = torch.cat([start + place * (x - start) for place, _ in part]).requires_grad_()
            (grad,) = torch.autograd.grad(run(at, len(part)).sum(), at)
            for share, (_, weight) in zip(grad.to(wide).split(len(x)), part, strict=True):
                total.add_(share, alpha=weight)
        return total, ends


class _Put:
    """Puts points of a path in the place of what a module puts out; a context manager around its hook."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name
        self._point: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        self._n_calls = 0

    def __enter__(self) -> _Put:
        self._handle = self._module.register_forward_hook(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        tensor, key = select_output(output, None)
        if tensor is None or not tensor.is_floating_point():
            remedy = "Name the module whose output the model goes on with: embedding=."
            got = type(output).__name__
            raise TypeError(broken_rule(_WHO, f"the output of {self._name}", "be a tensor", got, remedy))
        self._n_calls += 1
        self._seen = tensor.detach()
        return None if self._point is None else replace_output(output, key, self._point)

    def values(self, metric: Metric, model: nn.Module, batch: Batch, point: torch.Tensor | None) -> torch.Tensor:
        """The metric of a batch [B], with ``point`` in that place."""
        self._point, self._n_calls = point, 0
        try:
            found = values_of(_WHO, metric, model, batch)
        finally:
            self._point = None
        if self._n_calls != 1:
            rule, got = "be called once in a forward", f"{self._n_calls} calls"
            remedy = "Name the one that the model starts at: embedding=."
            raise ValueError(broken_rule(_WHO, self._name, rule, got, remedy))
        return found

    def embedded(self, metric: Metric, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the module makes of a batch [B, P, D]."""
        with torch.no_grad():
            self.values(metric, model, batch, None)
        assert self._seen is not None
        return self._seen

    def of_token(self, token: int, device: torch.device) -> torch.Tensor:
        """What the module makes of one token [D]."""
        most = getattr(self._module, "num_embeddings", None)
        if token < 0 or (most is not None and token >= most):
            rule = "be a token from 0 on" if most is None else f"be a token of the {most}"
            raise ValueError(broken_rule(_WHO, "baseline", rule, token, "Check the tokenizer."))
        with torch.no_grad():
            self._module(torch.tensor([[token]], device=device))
        assert self._seen is not None
        return self._seen.reshape(-1)


def _repeats(batch: Batch) -> bool:
    """Whether several points can be run at once: texts among the fields aren't repeated."""
    return all(isinstance(value, torch.Tensor) for value in batch.fields.peek().values())


def _repeated(batch: Batch, copies: int) -> Batch:
    """The batch so many times behind itself."""

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor] * copies)

    mask, decoded = (None if part is None else repeat(part) for part in (batch.mask, batch.decoder_mask))
    return Batch(repeat(batch.input_ids), mask, batch.padding_side, batch.fields.moved(repeat), decoded)
