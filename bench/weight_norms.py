"""The norm of each example's weight gradient at each layer, no row stored: beside opacus' ghost norms."""

from __future__ import annotations

from collections.abc import Callable
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
from .turns import take_turns

SHAPE = {"n_layers": 6, "width": 128, "length": 64, "batch": 16, "n_batches": 16}
QUICK = {"n_layers": 1, "width": 32, "length": 8, "batch": 4, "n_batches": 3}


@dataclass(frozen=True)
class Work:
    """Batches of a model of `nn.Linear` layers, which opacus knows, and their names."""

    model: Any
    batches: list[Batch]
    points: tuple[str, ...]


def make_work(n_layers: int, width: int, length: int, batch: int, n_batches: int) -> Work:
    """A small Llama with random weights; opacus has to be told of the layers by class, and knows no Conv1D."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=n_layers,
        num_attention_heads=4, max_position_embeddings=length, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(256, (n_batches, batch, length), generator=torch.Generator().manual_seed(0))
    names = tuple(name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear))
    return Work(model, [Batch(ids, None) for ids in tokens], names)


def _backward(work: Work, batch: Batch) -> None:
    next_token_loss(work.model, batch).backward()  # type: ignore[no-untyped-call]


def floor(work: Work) -> None:
    """The frozen forward and backward."""
    with tlfast.freeze(work.model):
        for batch in work.batches:
            _backward(work, batch)


def gram_hooks(work: Work) -> torch.Tensor:
    """What is best in Python: tensor hooks, and the product of both Gram matrices."""
    found: list[torch.Tensor] = []
    kept: dict[int, torch.Tensor] = {}

    def attach(k: int) -> Callable[[nn.Module, Any, Any], None]:
        def backward(grad: torch.Tensor) -> None:
            products = torch.bmm(grad, grad.mT).mul_(kept.pop(k))
            found[-1][:, k] = products.sum((1, 2)).clamp_min_(0).sqrt_()

        def forward(module: nn.Module, args: Any, output: Any) -> None:
            given = args[0].detach()
            kept[k] = torch.bmm(given, given.mT)
            first_tensor(output).register_hook(backward)

        return forward

    handles = [work.model.get_submodule(name).register_forward_hook(attach(k)) for k, name in enumerate(work.points)]
    with tlfast.freeze(work.model), hooked(handles):
        for batch in work.batches:
            found.append(torch.empty(len(batch.input_ids), len(work.points)))
            _backward(work, batch)
    return torch.cat(found)


def opacus_ghost(work: Work) -> torch.Tensor:
    """opacus' ghost norms; its layers need weights with a gradient, and so get that of the whole batch, too."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    return _opacus(work, GradSampleModuleFastGradientClipping, lambda weight: weight._norm_sample.clone())


def opacus_rows(work: Work) -> torch.Tensor:
    """The norms of opacus' per-sample gradients, which it forms."""
    from opacus.grad_sample import GradSampleModule

    return _opacus(work, GradSampleModule, lambda weight: weight.grad_sample.flatten(1).norm(dim=1))


def _opacus(work: Work, wrapper: Any, norm: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    found, weights = [], [work.model.get_submodule(name).weight for name in work.points]
    with tlfast.freeze(work.model):
        for weight in weights:
            weight.requires_grad_(True)
        wrapped = wrapper(work.model, loss_reduction="sum", strict=False)
        try:
            for batch in work.batches:
                _backward(work, batch)
                found.append(torch.stack([norm(weight) for weight in weights], dim=1))
                wrapped.zero_grad()
        finally:
            wrapped.to_standard_module()
            for weight in weights:
                weight.requires_grad_(False)
    return torch.cat(found)


def capture(work: Work) -> torch.Tensor:
    """`tlfast.capture` of norms."""
    n = sum(len(batch.input_ids) for batch in work.batches)
    settings: Any = {"of": "weight", "reduce": "norm", "dtype": torch.float32}
    with tlfast.freeze(work.model), tlfast.capture(work.model, list(work.points), rows=n, **settings) as cap:
        for batch in work.batches:
            _backward(work, batch)
        return torch.stack([cap[f"{name}:weight:norm"] for name in work.points], dim=1)


FLOOR = "forward and backward (floor)"
GRAM = "tensor hooks, Gram matrices"
GHOST = "opacus, ghost norms"
FORMED = "opacus, norms of its gradients"
OURS = "tlfast.capture"

Way = Callable[[Work], "torch.Tensor | None"]
WAYS: dict[str, Way] = {FLOOR: floor, GRAM: gram_hooks, GHOST: opacus_ghost, FORMED: opacus_rows, OURS: capture}
OPACUS = (GHOST, FORMED)


def true_norms(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """The norms of the first batch in float64, and by how much those of float32 may differ.

    A square is a sum of products in float32, which may cancel: it is off by as many roundings of what it would be
    without signs, and its root by that over twice the root.
    """
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def watch(module: object, args: Any, output: Any) -> None:
        inputs.append(args[0].detach().double())
        outputs.append(first_tensor(output))

    handles = [work.model.get_submodule(name).register_forward_hook(watch) for name in work.points]
    with tlfast.freeze(work.model):
        loss = next_token_loss(work.model, work.batches[0])
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(loss, outputs)
    norms, bounds = [], []
    for grad, given in zip((grad.double() for grad in grads), inputs, strict=True):
        norm = (grad.mT @ given).flatten(1).norm(dim=1)
        unsigned = (grad.abs().mT @ given.abs()).flatten(1).norm(dim=1)
        terms = grad.shape[1] + grad.shape[2] + given.shape[2]
        norms.append(norm)
        bounds.append(terms * torch.finfo(torch.float32).eps * unsigned.square() / norm)
    return torch.stack(norms, dim=1), torch.stack(bounds, dim=1)


def check_ways(work: Work, ways: dict[str, Way]) -> None:
    """Compare the norms of the first batch with those of float64."""
    first, (true, bound) = Work(work.model, work.batches[:1], work.points), true_norms(work)
    for name, way in ways.items():
        found = way(first)
        if found is not None:
            check_close(name, found, true, bound)


def findings(quick: bool = False, ways: dict[str, Way] | None = None) -> Findings:
    """Measure every way."""
    if ways is None:
        ways = {name: way for name, way in WAYS.items() if name not in OPACUS or find_spec("opacus")}
    work = make_work(**(QUICK if quick else SHAPE))
    check_ways(work, ways)
    turns = {name: lambda model, _, way=way: way(replace(work, model=model)) for name, way in ways.items()}
    measured = take_turns(work.model, turns, len(work.batches))
    found = Findings([_table(work, measured)])
    for name, least in ((FORMED, 2.0), (GHOST, 1.5), (GRAM, 1.0)):
        if {name, OURS} <= measured.keys():
            cpu, ours, base = measured[name]["cpu"], measured[OURS]["cpu"], measured[FLOOR]["cpu"]
            found.claims.append(Claim(f"norms: CPU time, {name} / {OURS}", "at least", least, cpu.ratio(ours)))
            above = cpu.above(base) / ours.above(base)
            found.claims.append(Claim(f"norms: the same of {name}, each above the floor", "at least", least, above))
    return found


def _table(work: Work, measured: Measured) -> Table:
    n = len(work.batches[0].input_ids)
    rows = rate_rows(measured, FLOOR, n)
    title = f"norms of each example's weight gradients: {n} examples a step, {len(work.points)} layers of a Llama"
    return Table(title, FLOOR, list(rows[0]), rows)
