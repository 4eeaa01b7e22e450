"""Queries of weight gradients as a spec has them, checked against the layer that they are of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch

from ..errors import broken_rule
from ..spec import Queries, Spec


def check_named(who: str, spec: Spec, names: Collection[str]) -> None:
    """ValueError unless the queries of a spec are of the points that it means, each of these."""
    if spec.queries is None:
        return
    if not isinstance(spec.queries, Mapping):
        if len(names) > 1:
            rule, got = "be a mapping from points to tensors where there are several points", f"one for {len(names)}"
            raise ValueError(broken_rule(who, "queries", rule, got, "Write {point: tensor}."))
        return
    absent = next((name for name in names if name not in spec.queries), None)
    odd = next((name for name in spec.queries if name not in names), None)
    if absent is not None or odd is not None:
        rule = "have an entry for each point, and for these alone"
        got = f"none for {absent!r}" if absent is not None else f"one for {odd!r}"
        raise ValueError(broken_rule(who, "queries", rule, got, f"The points are {', '.join(map(repr, names))}."))


def queries_at(who: str, name: str, queries: Queries, shape: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The queries of a point whose rows would have this shape, as a backend takes them; ValueError for others."""
    given: Any = queries[name] if isinstance(queries, Mapping) else queries
    pair = not isinstance(given, torch.Tensor)
    tensors = tuple(one.detach() for one in (given if pair else [given]))
    if pair:
        _check_pair(who, tensors, shape)
    elif tensors[0].dim() != len(shape) + 1 or tuple(tensors[0].shape[1:]) != tuple(shape) or not len(tensors[0]):
        said = ", ".join(map(str, shape))
        remedy = "A query has the shape that a row has without queries."
        raise ValueError(broken_rule(who, "queries", f"have the shape [Q, {said}]", list(tensors[0].shape), remedy))
    if not all(bool(one.isfinite().all()) for one in tensors):
        raise ValueError(broken_rule(who, "queries", "be finite", "NaN or infinity", "Leave that query out."))
    if len(shape) == 3:  # heads are rows of one matrix
        return (tensors[0].reshape(-1, prod(shape[:2]), shape[2]),)
    return tensors


def _check_pair(who: str, pair: Sequence[torch.Tensor], shape: Sequence[int]) -> None:
    if len(shape) != 2:
        rule, remedy = f"be whole where a row has the shape {list(shape)}", "Give a tensor, not a pair."
        raise ValueError(broken_rule(who, "queries", rule, "a pair of factors", remedy))
    left, right = pair
    fits = left.dim() == right.dim() == 3 and left.numel() and right.numel()
    fits = fits and left.shape[0] == right.shape[0] and left.shape[2] == right.shape[1]
    if not fits or (left.shape[1], right.shape[2]) != tuple(shape):
        rule = f"be factors [Q, {shape[0]}, r] and [Q, r, {shape[1]}]"
        got = f"{list(left.shape)} and {list(right.shape)}"
        raise ValueError(broken_rule(who, "queries", rule, got, "The query is their product."))
    if left.dtype != right.dtype or left.device != right.device:
        got = f"{left.dtype} on {left.device} and {right.dtype} on {right.device}"
        raise ValueError(broken_rule(who, "queries", "be factors of one dtype, on one device", got, "Convert one."))
