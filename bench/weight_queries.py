"""Dot products of each example's weight gradients with queries, no row stored: beside hooks that make the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import tlfast
from tlfast import Spec

from . import weight_ways
from .measure import Measured, check_close
from .report import Claim, Findings, Table, rate_rows
from .rivals import first_tensor
from .storing import hooked
from .turns import take_turns

N_QUERIES = 8
N_TOKENS = 16  # of each query that is given as the factors of its tokens
STEPS = 9  # the first one warms up, the last one is left out
MOST = 25.0  # percent above the floor


@dataclass(frozen=True)
class Work:
    """Batches of a model, and at each layer the queries: whole ones [Q, O, I], or [Q, O, r] and [Q, r, I]."""

    of: weight_ways.Work
    queries: Mapping[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]

    def whole(self, point: str) -> torch.Tensor:
        """The queries of a layer, [Q, O, I]."""
        given = self.queries[point]
        return given if isinstance(given, torch.Tensor) else torch.bmm(*given)


def make_works(of: weight_ways.Work) -> dict[str, Work]:
    """Queries that fill their matrices, and queries of few tokens."""
    draw = torch.Generator().manual_seed(0)
    sizes = {point: of.sizes(point) for point in of.points}
    tokens = {
        point: (
            torch.randn(N_QUERIES, n, N_TOKENS, generator=draw),
            torch.randn(N_QUERIES, N_TOKENS, m, generator=draw),
        )
        for point, (n, m) in sizes.items()
    }
    whole = {point: torch.randn(N_QUERIES, n, m, generator=draw) for point, (n, m) in sizes.items()}
    return {
        f"{N_QUERIES} whole queries": Work(of, whole),
        f"{N_QUERIES} queries of {N_TOKENS} tokens": Work(of, tokens),
    }


def floor(work: Work) -> None:
    """The frozen forward and backward."""
    with tlfast.freeze(work.of.model):
        for batch in work.of.batches:
            work.of.backward(batch)


def python_hooks(work: Work) -> torch.Tensor:
    """What is simplest: a tensor hook that makes the gradient of each example, and multiplies it with the queries."""
    found: list[torch.Tensor] = []
    kept: dict[int, torch.Tensor] = {}
    flat = [work.whole(point).flatten(1) for point in work.of.points]

    def attach(k: int) -> Callable[[nn.Module, Any, Any], None]:
        def backward(grad: torch.Tensor) -> None:
            found[-1][:, k] = torch.bmm(grad.mT, kept.pop(k)).flatten(1) @ flat[k].T

        def forward(module: nn.Module, args: Any, output: Any) -> None:
            kept[k] = args[0].detach()
            first_tensor(output).register_hook(backward)

        return forward

    modules = [work.of.model.get_submodule(point) for point in work.of.points]
    with tlfast.freeze(work.of.model), hooked([m.register_forward_hook(attach(k)) for k, m in enumerate(modules)]):
        for batch in work.of.batches:
            found.append(torch.empty(len(batch.input_ids), len(modules), N_QUERIES))
            work.of.backward(batch)
    return torch.cat(found)


def capture(work: Work) -> torch.Tensor:
    """`tlfast.capture` with the queries."""
    spec: Any = Spec(list(work.of.points), of="weight", queries=work.queries, dtype=torch.float32)
    with tlfast.freeze(work.of.model), tlfast.capture(work.of.model, spec, rows=work.of.n_examples) as cap:
        for batch in work.of.batches:
            work.of.backward(batch)
        return torch.stack([cap[f"{point}:weight:scores"] for point in work.of.points], dim=1)


FLOOR = "forward and backward (floor)"
PYTHON = "tensor hooks, bmm, matmul"
OURS = "tlfast.capture, queries"

Way = Callable[[Work], "torch.Tensor | None"]
WAYS: dict[str, Way] = {FLOOR: floor, PYTHON: python_hooks, OURS: capture}


def true_scores(
    work: Work, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of the first batch in float64 [B, layers, Q], and by how much sums of float32 may differ."""
    scores, bounds = [], []
    for point, (grad, given) in factors.items():
        queries = work.whole(point).double()
        rows = grad.double().mT @ given.double()
        unsigned = grad.double().abs().mT @ given.double().abs()
        held = work.queries[point]
        if isinstance(held, torch.Tensor):
            sizes, terms = queries.abs(), 0
        else:
            sizes, terms = held[0].double().abs() @ held[1].double().abs(), N_TOKENS
        # Each product of a sum of so many, in float32 and in any order.
        terms += grad.shape[1] + grad.shape[2] + given.shape[2]
        scores.append(rows.flatten(1) @ queries.flatten(1).T)
        bounds.append(terms * torch.finfo(torch.float32).eps * (unsigned.flatten(1) @ sizes.flatten(1).T))
    return torch.stack(scores, dim=1), torch.stack(bounds, dim=1)


def check_ways(work: Work, ways: dict[str, Way], factors: Callable[[weight_ways.Work], Mapping[str, Any]]) -> None:
    """Compare the scores of the first batch with those of float64. ``factors`` gives gradients and inputs by layer."""
    of = work.of
    first = replace(work, of=replace(of, batches=of.batches[:1]))
    true, bound = true_scores(first, factors(first.of))
    for name, way in ways.items():
        found = way(first)
        if found is not None:
            check_close(name, found, true, bound)


def findings(
    quick: bool,
    of: weight_ways.Work,
    factors: Callable[[weight_ways.Work], Mapping[str, Any]],
    ways: dict[str, Way] | None = None,
) -> Findings:
    """Check, then measure."""
    ways, found = WAYS if ways is None else ways, Findings()
    for what, work in make_works(of).items():
        check_ways(work, ways, factors)
        turns = {
            name: lambda model, _, way=way, work=work: way(replace(work, of=replace(work.of, model=model)))
            for name, way in ways.items()
        }
        measured = take_turns(work.of.model, turns, len(work.of.batches))
        found.tables.append(_table(what, work, measured))
        if OURS in measured:
            above = (measured[OURS]["cpu"].ratio(measured[FLOOR]["cpu"]) - 1) * 100
            found.claims.append(Claim(f"{what}: {OURS} above the floor", "at most", MOST, above, " %"))
        if {OURS, PYTHON} <= measured.keys():
            ratio = measured[PYTHON]["cpu"].ratio(measured[OURS]["cpu"])
            found.claims.append(Claim(f"{what}: CPU time, {PYTHON} / {OURS}", "at least", 1.0, ratio))
    return found


def products(work: Work) -> tuple[float, float]:
    """Multiplications for a token: by the cheapest form of the scores, and in the layers forward and backward."""
    n, q, ours, theirs = work.of.batches[0].input_ids.shape[1], N_QUERIES, 0.0, 0.0
    for point in work.of.points:
        n_outputs, n_inputs = work.of.sizes(point)
        whole = n_outputs * n_inputs * min(q, 1 + q / n)
        of_factors = q * N_TOKENS * (n_outputs + n_inputs)
        ours += whole if isinstance(work.queries[point], torch.Tensor) else min(whole, of_factors)
        theirs += 2 * n_outputs * n_inputs
    return ours, theirs


def _table(what: str, work: Work, measured: Measured) -> Table:
    n = len(work.of.batches[0].input_ids)
    rows = rate_rows(measured, FLOOR, n)
    scores, layers = products(work)
    title = f"{what}: {n} examples a step, {len(work.of.points)} layers, width {work.of.sizes(work.of.points[0])[1]}"
    note = f"multiplications of the scores: {scores / layers * 100:.0f} % of those of the layers, forward and backward"
    return Table(title, FLOOR, list(rows[0]), rows, note)
