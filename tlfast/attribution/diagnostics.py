"""What gradient norms of examples tell in a training loop: the gradient noise scale, and which examples are hard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule
from ..hooks.captured import Capture
from ..hooks.experts import ExpertLayer, submodule
from ..spec import Per, Spec, one_of


def gradient_norms(cap: Capture, per: Per = "example") -> torch.Tensor:
    """The norm of the gradient of each example, or real token, over all weights that a capture has norms of.

    The root of the sum of the squares of its columns with ``of="weight", reduce="norm"``; float64, on their device.
    A training loop's loss is a mean over its batch: say ``cap.batch(grad_scale=1 / len(x))`` for the norms of each
    example's own loss.

    Args:
        cap: a capture with rows.
        per: "example": float64 [rows]; "token": [tokens], of the specs with ``per="token"``; ``cap.where`` says whose.

    Raises:
        ValueError: for a capture without such columns.

    Example:
        >>> import torch, tlfast
        >>> from tlfast.attribution import gradient_norms
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> with tlfast.capture(model, "*", rows=4, of="weight", reduce="norm", bias=True) as cap:
        ...     with cap.batch(grad_scale=1 / 4):
        ...         model(torch.randn(4, 2)).square().mean().backward()
        >>> gradient_norms(cap).shape
        torch.Size([4])
    """
    one_of("gradient_norms", "per", per, ("example", "token"))
    columns = [name for name, _, _ in _norms("gradient_norms", cap, per)]
    total = torch.stack([cap[name].double().square().to(cap[columns[0]].device) for name in columns]).sum(0)
    return total.sqrt()


def mean_gradient_norm(model: nn.Module, cap: Capture) -> float:
    """The norm of the ``.grad`` of all weights that a capture has norms of, and of their biases where it has theirs.

    Behind the backward of a loss that is a mean over the batch, and before ``zero_grad()``, it is the norm of the mean
    of the examples' gradients.

    Raises:
        ValueError: for a capture without norms of weight gradients, or with projected ones.
        RuntimeError: for a weight without ``.grad``.

    Example:
        >>> import torch, tlfast
        >>> from tlfast.attribution import mean_gradient_norm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with tlfast.capture(model, "", rows=4, of="weight", reduce="norm") as cap:
        ...     model(torch.ones(4, 2)).mean().backward()
        >>> round(mean_gradient_norm(model, cap), 4)
        1.4142
    """
    who = "mean_gradient_norm"
    total, seen = 0.0, set[int]()
    for _, point, spec in _norms(who, cap, None):
        if spec.project is not None:
            rule, remedy = "have norms of whole gradients", "Leave project= out."
            raise ValueError(broken_rule(who, "cap", rule, f"projected ones at {point!r}", remedy))
        module: Any = submodule(model, point)
        if isinstance(module, ExpertLayer):
            rule, remedy = "be of layers that have a weight of their own", "Leave experts out."
            raise ValueError(broken_rule(who, "cap", rule, repr(point), remedy))
        bias = getattr(module, "bias", None) if spec.bias else None
        for parameter in [module.weight, *([] if bias is None else [bias])]:
            if parameter.grad is None:
                remedy = "Ask behind the backward, and train the weights that are captured."
                raise RuntimeError(broken_rule(who, f"the weight of {point!r}", "have a .grad", "none", remedy))
            if id(parameter) not in seen:
                total += parameter.grad.double().square().sum().item()
                seen.add(id(parameter))
    return math.sqrt(total)


def _norms(who: str, cap: Capture, per: str | None) -> Iterator[tuple[str, str, Spec]]:
    """The columns, their points and specs, that are norms of weight gradients."""
    found = [
        (name, point, spec)
        for name, (point, spec) in cap.wanted.items()
        if spec.of == "weight" and spec.reduce == "norm" and per in (None, spec.per)
    ]
    if not found:
        rule = 'have columns with of="weight", reduce="norm"' + ("" if per is None else f', per="{per}"')
        raise ValueError(broken_rule(who, "cap", rule, ", ".join(cap.names), "Say so in capture, or in a Spec."))
    return iter(found)


class NoiseScale:
    """The gradient noise scale of training, from the gradient norms of its examples.

    The simple noise scale tr(Sigma) / |G|^2 is about the batch size beyond which larger batches save few steps
    (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, equation 2.9): Sigma is the covariance of the examples'
    gradients, G the true gradient. A batch of B examples, whose gradients g_i have the mean g, gives unbiased
    estimates of both (appendix A.1, with batches of 1 and of B): ``(B |g|^2 - mean |g_i|^2) / (B - 1)`` of |G|^2, and
    ``(mean |g_i|^2 - |g|^2) / (1 - 1/B)`` of tr(Sigma). These are averaged over batches, and then divided.

    Args:
        decay: from 0 to below 1: how much of the average stays when a batch comes; None: all batches count alike.

    Raises:
        ValueError: for another decay.

    Example:
        >>> import torch, tlfast
        >>> from tlfast.attribution import NoiseScale, gradient_norms, mean_gradient_norm
        >>> _ = torch.manual_seed(0)
        >>> model, noise = torch.nn.Linear(3, 1), NoiseScale()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> with tlfast.capture(model, "", rows=16, of="weight", reduce="norm", bias=True) as cap:
        ...     for x in torch.randn(5, 16, 3):
        ...         cap.clear()
        ...         optimizer.zero_grad()
        ...         with cap.batch(grad_scale=1 / len(x)):  # norms of each example's own loss, which are averaged
        ...             (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        ...         noise.add(gradient_norms(cap), mean_gradient_norm(model, cap))
        ...         optimizer.step()
        >>> noise.value > 0
        True
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            rule, remedy = "be from 0 to below 1, or None", "0.99 averages over about 100 batches."
            raise ValueError(broken_rule("NoiseScale", "decay", rule, repr(decay), remedy))
        self._decay, self._weight, self._signal, self._noise = decay, 0.0, 0.0, 0.0
        self.n_batches = 0

    def add(self, norms: torch.Tensor, mean_norm: float | torch.Tensor) -> None:
        """Take a batch: the norms of its examples' gradients, [B], and that of their mean.

        Raises:
            ValueError: for less than two examples, and for numbers that aren't finite.
        """
        n, mean = norms.numel(), float(mean_norm)
        if norms.dim() != 1 or n < 2:
            rule, remedy = "be those of two examples at least, [B]", "Skip such a batch."
            raise ValueError(broken_rule("NoiseScale", "norms", rule, list(norms.shape), remedy))
        of_one, of_all = norms.double().square().mean().item(), mean * mean
        if not math.isfinite(of_one + of_all):
            raise ValueError(broken_rule("NoiseScale", "norms", "be finite", "NaN or infinity", "Skip such a batch."))
        keep = 1.0 if self._decay is None else self._decay
        take = 1.0 if self._decay is None else 1 - self._decay
        self._weight = keep * self._weight + take
        self._signal = keep * self._signal + take * (n * of_all - of_one) / (n - 1)
        self._noise = keep * self._noise + take * (of_one - of_all) / (1 - 1 / n)
        self.n_batches += 1

    @property
    def signal(self) -> float:
        """The estimate of |G|^2; NaN without a batch. That of few batches may be negative."""
        return self._signal / self._weight if self.n_batches else math.nan

    @property
    def noise(self) -> float:
        """The estimate of tr(Sigma); NaN without a batch."""
        return self._noise / self._weight if self.n_batches else math.nan

    @property
    def value(self) -> float:
        """The noise scale, in examples; infinite while the estimate of |G|^2 isn't above 0, NaN without a batch."""
        if not self.n_batches:
            return math.nan
        return self.noise / self.signal if self.signal > 0 else math.inf


def el2n(logits: torch.Tensor, labels: torch.Tensor, *, ignore_index: int = -100, per: Per = "example") -> torch.Tensor:
    """EL2N scores: the norm of softmax(logits) - one_hot(label) (Paul et al. 2021, https://arxiv.org/abs/2107.07075).

    It approximates the gradient's norm, `gradient_norms`, which that paper calls GraNd where it is averaged over models
    early in training, as both should be: ``torch.stack(scores).mean(0)``.

    Args:
        logits: [B, C], or of positions [B, P, C]; those of a causal model belong to the next token: logits[:, :-1].
        labels: int64 [B], or [B, P].
        ignore_index: the label of positions that count for nothing.
        per: of positions: "example", the mean over those that count; "token", each, [B, P], NaN where it doesn't.

    Returns:
        float32 (float64 of float64 logits) [B], or [B, P]; NaN where nothing counts.

    Raises:
        ValueError: for shapes that don't fit, and labels that are no classes.

    Example:
        >>> import torch
        >>> from tlfast.attribution import el2n
        >>> el2n(torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([0, 0])).round(decimals=4)
        tensor([0.7071, 0.0000])
    """
    who = "el2n"
    one_of(who, "per", per, ("example", "token"))
    if logits.dim() not in (2, 3) or labels.shape != logits.shape[:-1]:
        rule, got = "be [B, C] with labels [B], or [B, P, C] with [B, P]", f"{list(logits.shape)}, {list(labels.shape)}"
        raise ValueError(broken_rule(who, "logits", rule, got, "Give the logits of the labels."))
    counts = labels != ignore_index
    known = labels.masked_fill(~counts, 0)
    if bool(((known < 0) | (known >= logits.shape[-1])).any()):
        rule, got = f"be classes, 0 to {logits.shape[-1] - 1}, or {ignore_index}", f"{int(labels.min())} to"
        raise ValueError(broken_rule(who, "labels", rule, f"{got} {int(labels.max())}", "Check them."))
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    wide = wide.scatter_add(-1, known[..., None], -torch.ones_like(known[..., None], dtype=wide.dtype))
    scores = torch.linalg.vector_norm(wide, dim=-1).masked_fill(~counts, torch.nan)
    found: torch.Tensor = scores.nanmean(1) if scores.dim() > 1 and per == "example" else scores
    return found


def hardest(scores: torch.Tensor, keep: float, *, skip: float = 0.0) -> torch.Tensor:
    """Which examples a filter by GraNd or EL2N keeps: the part ``keep`` with the highest scores, int64, in order.

    Args:
        scores: [N]; those of NaN are never kept.
        keep: above 0, at most 1: the part of all examples that is kept.
        skip: from 0 to below 1: the part with the highest scores of all that is left out first: where labels are
            noisy, these are the wrong ones (Paul et al. 2021, section 4).

    Raises:
        ValueError: for other numbers, or where there are too few examples.

    Example:
        >>> import torch
        >>> from tlfast.attribution import hardest
        >>> hardest(torch.tensor([0.1, 0.9, 0.5, 0.7]), 0.5)
        tensor([1, 3])
        >>> hardest(torch.tensor([0.1, 0.9, 0.5, 0.7]), 0.5, skip=0.25)
        tensor([2, 3])
    """
    who = "hardest"
    if scores.dim() != 1 or not len(scores):
        raise ValueError(broken_rule(who, "scores", "be [N]", list(scores.shape), "Give one for each example."))
    if not 0 < keep <= 1 or not 0 <= skip < 1 or keep + skip > 1 + 1e-9:
        rule, got = "be above 0, and at most 1 together with skip", f"keep={keep}, skip={skip}"
        raise ValueError(broken_rule(who, "keep", rule, got, "Both are parts of all examples."))
    order = scores.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)
    order = order[~scores[order].isnan()]
    first = round(skip * len(scores))
    kept: torch.Tensor = order[first : first + max(1, round(keep * len(scores)))].sort().values
    return kept
