"""K-FAC's factors of linear layers over a data set, beside kronfluence's and what is simplest in Python."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import tlfast
from tlfast.collecting.batches import Batch
from tlfast.collecting.loss import next_token_loss

from .measure import Measured, check_close
from .report import Claim, Findings, Table, rate_rows
from .rivals import first_tensor
from .storing import hooked
from .turns import silent, take_turns
from .weight_norms import Work, make_work

SHAPE = {"n_layers": 4, "width": 128, "length": 64, "batch": 16, "n_batches": 33}
QUICK = {"n_layers": 1, "width": 32, "length": 8, "batch": 4, "n_batches": 3}
TOGETHER = 4  # batches to a sample: what is summed in float32 goes to float64 once in them

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by layer A [I, I] and S [O, O], sums over tokens


def floor(work: Work) -> None:
    """The frozen forward and backward."""
    with tlfast.freeze(work.model):
        for batch in work.batches:
            next_token_loss(work.model, batch).backward()  # type: ignore[no-untyped-call]


def python_hooks(work: Work) -> Sums:
    """What is simplest: a forward hook and a tensor hook, and `addmm_` into float32 sums."""
    sums: Sums = {}

    def attach(module: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
        n_outputs, n_inputs = module.weight.shape  # type: ignore[union-attr, misc]
        of_inputs, of_outputs = torch.zeros(n_inputs, n_inputs), torch.zeros(n_outputs, n_outputs)
        sums[names[module]] = of_inputs, of_outputs

        def backward(grad: torch.Tensor) -> None:
            flat = grad.flatten(0, 1)
            of_outputs.addmm_(flat.T, flat)

        def forward(module: nn.Module, args: Any, output: Any) -> None:
            flat = args[0].detach().flatten(0, 1)
            of_inputs.addmm_(flat.T, flat)
            first_tensor(output).register_hook(backward)

        return forward

    names = {work.model.get_submodule(name): name for name in work.points}
    handles = [module.register_forward_hook(attach(module)) for module in names]
    with hooked(handles):
        floor(work)
    return sums


@dataclass(frozen=True)
class Prepared:
    """A copy of the model whose layers kronfluence has wrapped, and its task."""

    model: Any
    task: Any


def prepared(work: Work) -> Prepared:
    """What kronfluence does before all."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.task import Task

    class NextToken(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: torch.Tensor, model: nn.Module, sample: bool = False) -> torch.Tensor:
            return next_token_loss(model, Batch(batch, None))

        def compute_measurement(self, batch: torch.Tensor, model: nn.Module) -> torch.Tensor:
            return next_token_loss(model, Batch(batch, None))

        def get_influence_tracked_modules(self) -> list[str]:
            return list(work.points)

    task = NextToken()
    return Prepared(prepare_model(model=deepcopy(work.model), task=task), task)


def kronfluence(work: Work) -> Sums:
    """kronfluence's covariance matrices of the empirical Fisher, by its own loop, and nothing written."""
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.utils.state import State
    from torch.utils.data import DataLoader

    made, examples = prepared(work), [row for batch in work.batches for row in batch.input_ids]
    loader: Any = DataLoader(examples, batch_size=len(work.batches[0].input_ids))  # type: ignore[arg-type]
    _, found = fit_covariance_matrices_with_loader(
        made.model, State(), made.task, loader, FactorArguments(use_empirical_fisher=True)
    )
    return {name: (found["activation_covariance"][name], found["gradient_covariance"][name]) for name in work.points}


def ours(work: Work) -> Sums:
    """The whole of `tlfast.factors`, with its set-up."""
    examples = [row for batch in work.batches for row in batch.input_ids]
    found = tlfast.factors(
        work.model, examples, list(work.points), kinds="kfac", batch_tokens=work.batches[0].input_ids.numel()
    )
    return {name: (found[name].inputs, found[name].outputs) for name in work.points}


FLOOR = "forward and backward (floor)"
PYTHON = "tensor hooks, addmm"
KRONFLUENCE = "kronfluence, its covariance loop"
OURS = "tlfast.factors, with its set-up"

Way = Callable[[Work], "Sums | None"]
WAYS: dict[str, Way] = {FLOOR: floor, PYTHON: python_hooks, OURS: ours}


def ways_here() -> dict[str, Way]:
    """All ways that can be gone here."""
    return {**WAYS, KRONFLUENCE: kronfluence} if find_spec("kronfluence") else WAYS


def true_sums(work: Work) -> dict[str, tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """By layer A and S in float64, each beside how far a sum of float32 may be from it."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in work.points}
    for batch in work.batches:
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def watch(
            module: object, args: Any, output: Any, inputs: list[Any] = inputs, outputs: list[Any] = outputs
        ) -> None:
            inputs.append(args[0].detach())
            outputs.append(first_tensor(output))

        handles = [work.model.get_submodule(name).register_forward_hook(watch) for name in work.points]
        with tlfast.freeze(work.model), hooked(handles):
            grads = torch.autograd.grad(next_token_loss(work.model, batch), outputs)
        for name, *both in zip(work.points, inputs, grads, strict=True):
            seen[name].append(tuple(one.flatten(0, 1).double() for one in both))  # type: ignore[arg-type]
    return {name: tuple(map(_summed, zip(*of, strict=True))) for name, of in seen.items()}  # type: ignore[misc]


def _summed(parts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.cat(list(parts))
    return rows.T @ rows, len(rows) * torch.finfo(torch.float32).eps * (rows.abs().T @ rows.abs())


def check_ways(work: Work, ways: dict[str, Way]) -> None:
    """Compare the sums of the first two batches with those of float64."""
    first = Work(work.model, work.batches[:2], work.points)
    true = true_sums(first)
    for name, way in ways.items():
        with silent():
            found = way(first)
        for point, both in (found or {}).items():
            for side, got, (wanted, bound) in zip(("A", "S"), both, true[point], strict=True):
                check_close(f"{name}, {side} at {point}", got, wanted, bound)


def findings(quick: bool, ways: dict[str, Way] | None = None) -> Findings:
    """Check, then measure; of a rival that isn't installed there is no row."""
    work = make_work(**(QUICK if quick else SHAPE))
    ways = ways_here() if ways is None else ways
    check_ways(work, ways)
    turns = {name: lambda model, _, way=way: way(replace(work, model=model)) for name, way in ways.items()}
    measured = take_turns(work.model, turns, len(work.batches), 1 if quick else TOGETHER)
    found = Findings([_table(work, measured)])
    if OURS not in measured:
        return found
    cpu = {name: times["cpu"] for name, times in measured.items()}
    if KRONFLUENCE in cpu:
        ratio = cpu[OURS].ratio(cpu[KRONFLUENCE])
        found.claims.append(Claim(f"factors: CPU time, {OURS} / {KRONFLUENCE}", "at most", 0.6, ratio))
        above = cpu[OURS].above(cpu[FLOOR]) / cpu[KRONFLUENCE].above(cpu[FLOOR])
        found.claims.append(Claim("factors: the same, each above the floor", "at most", 0.6, above))
    if PYTHON in cpu:
        found.claims.append(
            Claim(f"factors: CPU time, {PYTHON} / {OURS}", "at least", 1.0, cpu[PYTHON].ratio(cpu[OURS]))
        )
    return found


def _table(work: Work, measured: Measured) -> Table:
    n = work.batches[0].input_ids.numel()
    rows = rate_rows(measured, FLOOR, n, "tokens")
    title = f"K-FAC's A and S: {n} tokens a step, {len(work.points)} layers of a Llama"
    return Table(title, FLOOR, list(rows[0]), rows)
