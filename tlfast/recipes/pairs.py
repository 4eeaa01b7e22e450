"""Pairs of clean and corrupted inputs, a few at a time through the model, and the metric of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule

Inputs = torch.Tensor | Mapping[str, Any]
MASK = "attention_mask"


@dataclass(frozen=True)
class Pairs:
    """The pairs of one pass, for a metric.

    Args:
        clean, corrupted: their inputs, as they were given.
        index: [pairs], which of all pairs they are: ``answers[pairs.index]`` are their answers.
        mask: [pairs, P], True at real tokens; None without an attention mask.
    """

    clean: Inputs
    corrupted: Inputs
    index: torch.Tensor
    mask: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.index)


Metric = Callable[[Any, Pairs], torch.Tensor]


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    named = {"tokens": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
    return {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}


def _check_kind(who: str, argument: str, inputs: object) -> None:
    found = _tensors(inputs) if isinstance(inputs, (torch.Tensor, Mapping)) else {}
    if not found or any(tensor.dim() < 1 for tensor in found.values()):
        got = type(inputs).__name__ if not found else "a tensor without dimensions"
        remedy = "Tokenize the prompts, all to one length."
        raise TypeError(broken_rule(who, argument, "be a tensor, or a mapping of tensors", got, remedy))
    if isinstance(inputs, torch.Tensor) and (inputs.dim() < 2 or 0 in inputs.shape[1:]):
        remedy = "Add the dimension of the pairs: tokens[None]."
        raise ValueError(broken_rule(who, argument, "be [pairs, P], of a position or more", list(inputs.shape), remedy))
    sizes = {len(tensor) for tensor in found.values()}
    if len(sizes) != 1 or 0 in sizes:
        rule, remedy = "hold one or more examples, as many in each tensor", "Begin each tensor with the examples."
        raise ValueError(broken_rule(who, argument, rule, sorted(sizes), remedy))


def check_model(who: str, model: object) -> None:
    """TypeError for what is no module; RuntimeError where no gradient can be made.

    Raises:
        TypeError: for another object.
        RuntimeError: inside `torch.inference_mode`, which nothing ends but its own context.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(broken_rule(who, "model", "be an nn.Module", type(model).__name__, "Load it first."))
    if torch.is_inference_mode_enabled():
        got, remedy = "a call inside", "Leave it: the recipe runs what needs no gradient without any."
        raise RuntimeError(broken_rule(who, "the call", "be made outside of torch.inference_mode", got, remedy))


def check_pairs(who: str, clean: Inputs, corrupted: Inputs) -> int:
    """How many pairs there are.

    Raises:
        TypeError, ValueError: where the two don't go together, position by position.
    """
    for argument, inputs in (("clean", clean), ("corrupted", corrupted)):
        _check_kind(who, argument, inputs)
    one, other = _tensors(clean), _tensors(corrupted)
    shapes = [{key: list(tensor.shape) for key, tensor in side.items()} for side in (one, other)]
    if shapes[0] != shapes[1]:
        got, remedy = shapes[1], "Activations are compared position by position: pad both to one length."
        raise ValueError(broken_rule(who, "corrupted", f"have the shapes of clean, {shapes[0]}", got, remedy))
    if MASK in one and not torch.equal(one[MASK].cpu(), other[MASK].cpu()):
        rule, remedy = "be the same in clean and corrupted", "Pair prompts of the same number of tokens."
        raise ValueError(broken_rule(who, MASK, rule, "two masks", remedy))
    return len(next(iter(one.values())))


def _part(inputs: Inputs, rows: slice) -> Inputs:
    if isinstance(inputs, torch.Tensor):
        return inputs[rows]
    return {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def in_batches(
    who: str, clean: Inputs, corrupted: Inputs, batch_size: int | None, n_pairs: int
) -> Iterator[tuple[slice, Pairs]]:
    """(rows, pairs) of each pass."""
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        rule, remedy = "be a positive number of pairs, or None", "None takes all pairs at once."
        raise ValueError(broken_rule(who, "batch_size", rule, repr(batch_size), remedy))
    step = n_pairs if batch_size is None else batch_size
    for start in range(0, n_pairs, step):
        rows = slice(start, min(start + step, n_pairs))
        taken = [_part(side, rows) for side in (clean, corrupted)]
        mask = None if isinstance(taken[0], torch.Tensor) else taken[0].get(MASK)
        yield (
            rows,
            Pairs(taken[0], taken[1], torch.arange(rows.start, rows.stop), None if mask is None else mask.bool()),
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What a model makes of inputs: tokens by position, a mapping by keyword."""
    device = device_of(model)
    if isinstance(inputs, torch.Tensor):
        return model(inputs.detach().to(device))
    inputs = _with_positions(model, inputs)
    return model(**{key: v.detach().to(device) if isinstance(v, torch.Tensor) else v for key, v in inputs.items()})


def _with_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs with the position of each real token, where padding is on the left and nobody has said any.

    A model that learnt its positions would count the padding. One that skips it by its tokens needs nothing.
    """
    mask, name = inputs.get(MASK), "position_ids"
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask[:, 0].all()) or name in inputs:
        return inputs
    own = any(isinstance(m, nn.Embedding) and m.padding_idx is not None and "position" in at.rpartition(".")[2]
              for at, m in model.named_modules())  # fmt: skip
    if own or name not in signature(model.forward).parameters:
        return inputs
    return {**inputs, name: (mask.long().cumsum(1) - 1).clamp(min=0)}


def logits_of(output: Any) -> Any:
    """The logits in what a model returned; what is none of the known kinds is handed to the metric as it is."""
    if isinstance(output, torch.Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    return output if found is None else found


def metric_of(who: str, metric: Metric, output: Any, pairs: Pairs, alone: bool) -> torch.Tensor:
    """A metric's value, [pairs] or one number.

    Args:
        alone: whether these are all pairs; else a mean of them would be one of each pass.

    Raises:
        TypeError, ValueError, RuntimeError: for a value that nothing can be made of.
    """
    value: Any = metric(logits_of(output), pairs)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        got = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(broken_rule(who, "metric", "return a floating-point tensor", got, "Don't call item()."))
    if list(value.shape) not in ([], [len(pairs)]):
        rule, remedy = f"return one value for each of the {len(pairs)} pairs, or one in all", "Sum the rest."
        raise ValueError(broken_rule(who, "metric", rule, list(value.shape), remedy))
    if value.dim() == 0 and not alone:
        remedy = "Return [pairs], without the mean over them, or take all at once by batch_size=None."
        rule = "return one value for each pair where pairs go in several passes"
        raise ValueError(broken_rule(who, "metric", rule, "one number", remedy))
    if not value.requires_grad:
        remedy = "Make it of the logits, without detach() or no_grad()."
        raise RuntimeError(broken_rule(who, "metric", "have a gradient", "a value without a graph", remedy))
    checked: torch.Tensor = value
    return checked
