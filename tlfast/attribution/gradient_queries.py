"""Queries that are the weight gradients of examples: whole, or the factors of their tokens where these are smaller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..collecting.options import CollectOptions
from ..collecting.passes import Passes
from ..dataset.format.plan import Example
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..hooks.experts import submodule
from ..hooks.layers import find_layer
from ..spec import Query, Spec
from .queries import WHO


class QueryExamples(NamedTuple):
    """The examples that queries are the gradients of."""

    ids: list[int]  # -1 of a mean
    examples: Sequence[Example]


def gradients_of(
    model: nn.Module, examples: Iterable[Any], options: CollectOptions, mean: bool
) -> tuple[dict[str, Query], QueryExamples]:
    """The weight gradients of examples by point, [Q, ...], or one query that is their mean; and the examples.

    Of a linear layer a gradient is a pair of factors, (sum over tokens of) g a^T, where its tokens are fewer numbers.
    """
    passes = Passes(WHO, model, examples, options)
    lengths = list(passes.examples.lengths())
    n, rank = len(lengths), sum(lengths) if mean else max(lengths)
    kept: dict[str, list[torch.Tensor | None]] = {}
    sizes: dict[str, int] = {}  # the outputs of the points whose factors are kept

    def choose(unmasked: set[str]) -> Sequence[Spec]:
        chosen = []
        for point in passes.enter(1, passes.specs).wanted.values():
            name, spec = point
            layer = find_layer(WHO, name, submodule(model, name))
            smaller = rank * (layer.n_outputs + layer.n_inputs) < layer.n_outputs * layer.n_inputs
            tokens = passes.has_tokens and name not in unmasked and spec.project is None and options.calls == "raise"
            if tokens and smaller and layer.kind == "linear":
                sizes[name] = layer.n_outputs
                chosen.append(Spec(name, of="weight", per="token", bias=spec.bias))
            else:
                chosen.append(Spec(name, of="weight", bias=spec.bias, project=spec.project))
        return chosen

    def take(numbers: Sequence[int], cap: Capture) -> None:
        for column, (point, _) in cap.wanted.items():
            rows = cap[column]
            if point in sizes:
                example, _ = cap.where(column)
                parts = [rows[(example == at).to(rows.device)] for at in range(len(numbers))]
            else:
                parts = list(rows.clone())
            of_point = kept.setdefault(point, [None] * n)
            for number, part in zip(numbers, parts, strict=True):
                of_point[number] = part

    passes.run(take, lambda start, stop: None, choose)
    ids = [passes.examples[k].id for k in range(n)]
    found: dict[str, Query] = {}
    for point, parts in kept.items():
        rows = [part for part in parts if part is not None]
        found[point] = _factors(rows, sizes[point], mean) if point in sizes else _whole(rows, mean)
    return found, QueryExamples([-1] if mean else ids, passes.examples)


def _whole(rows: Sequence[torch.Tensor], mean: bool) -> torch.Tensor:
    stacked = torch.stack(list(rows))
    return stacked.mean(0, keepdim=True) if mean else stacked


def _factors(rows: Sequence[torch.Tensor], n_outputs: int, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """U [Q, O, T] and V [Q, T, I] of rows (g, a), zero where an example has fewer tokens."""
    some = [torch.cat(list(rows))] if mean else rows
    made = torch.nn.utils.rnn.pad_sequence(list(some), batch_first=True)
    left, right = made[..., :n_outputs].transpose(1, 2), made[..., n_outputs:]
    return (left / len(rows) if mean else left).contiguous(), right.contiguous()


def as_tensors(queries: Mapping[str, Query]) -> dict[str, torch.Tensor]:
    """The queries as whole tensors, the products of those that are pairs."""
    return {name: query[0] @ query[1] if isinstance(query, tuple) else query for name, query in queries.items()}


def query_norms(queries: Mapping[str, Query]) -> torch.Tensor:
    """The norm of each query over all points, float64 [Q] on the host; ValueError for one of zeros, or of NaN."""
    total = torch.zeros(count(queries), dtype=torch.float64)
    for given in queries.values():
        if isinstance(given, torch.Tensor):
            total += given.double().flatten(1).square().sum(1).cpu()
        else:
            left, right = (one.double() for one in given)
            total += (left.mT @ left * (right @ right.mT)).sum((1, 2)).clamp_min(0).cpu()
    if not bool(total.isfinite().all()):
        got = f"NaN or infinity in query {int((~total.isfinite()).nonzero()[0])}"
        raise ValueError(broken_rule(WHO, "queries", "be finite", got, "Leave it out."))
    if not bool((total > 0).all()):
        got = f"zeros alone in query {int((total == 0).nonzero()[0])}"
        raise ValueError(broken_rule(WHO, "queries", "have a direction", got, "Leave it out."))
    return total.sqrt()


def divided(queries: Mapping[str, Query], norms: torch.Tensor) -> dict[str, Query]:
    """The queries divided by their norms."""

    def by_norm(given: torch.Tensor) -> torch.Tensor:
        wide = given.double() / norms.to(given.device).view(-1, *[1] * (given.dim() - 1))
        return wide.to(given.dtype)

    return {
        name: (by_norm(query[0]), query[1]) if isinstance(query, tuple) else by_norm(query)
        for name, query in queries.items()
    }


def count(queries: Mapping[str, Query]) -> int:
    """How many queries there are; ValueError unless they are equally many at all points."""
    sizes = {name: len(given if isinstance(given, torch.Tensor) else given[0]) for name, given in queries.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(broken_rule(WHO, "queries", "be equally many for all points", sizes, "Give one row each."))
    return next(iter(sizes.values()))
