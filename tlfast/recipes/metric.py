"""The metric of a recipe: examples as padded batches, what a model makes of them, and one number for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..collecting.batches import Batch, Batching
from ..collecting.examples import ExampleReader
from ..collecting.loss import call_model, logits_of
from ..collecting.skipped import BadExamples
from ..dataset.format.plan import Example
from ..errors import SpeakingAs, broken_rule
from ..hooks.freeze import find_embedding
from ..hooks.points import find_points

# Of the logits [B, P, V] and the batch, whose mask says which tokens are real and whose fields are the examples'.
Metric = Callable[[torch.Tensor, Any], torch.Tensor]


class Examples:
    """Examples as they were given, and as padded batches; the longest first, so that there is little padding.

    Args:
        who: the caller, for errors.
        given: token sequences, texts, mappings with fields, or batches of them: what `collect` takes, and texts.
        tokenizer: makes tokens of texts.
        batch_examples: in a batch.
        padding_side, pad_id: how they are padded.
    """

    def __init__(
        self, who: str, given: Any, tokenizer: Any, batch_examples: int, padding_side: str, pad_id: int
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(broken_rule(who, "padding_side", 'be "right" or "left"', repr(padding_side), "Say one."))
        if type(batch_examples) is not int or batch_examples < 1:
            raise ValueError(broken_rule(who, "batch_examples", "be a positive number", repr(batch_examples), "Say 1."))
        single = isinstance(given, (torch.Tensor, Mapping, str))
        items = [_tokenized(who, item, tokenizer) for item in ([given] if single else given)]
        reader = ExampleReader(BadExamples("stop"), 1, pad_id=pad_id)
        with SpeakingAs(who, "collect"):  # for which they are read as a rule
            self.all: Sequence[Example] = reader.read(items)
        self._batching = Batching(
            2**62, None, padding_side, pad_id, batch_examples=batch_examples, source=reader.source  # type: ignore[arg-type]
        )  # fmt: skip

    def batches(self, device: torch.device) -> Iterator[tuple[list[int], Batch]]:
        """Yield (which examples, batch)."""
        for rows, batch in self._batching.batches(self.all, self._batching.order(self.all)):
            yield rows, batch.to(device)

    def real(self, rows: torch.Tensor, batch: Batch, k: int) -> torch.Tensor:
        """Row k of what has a number for each position, without those of padding."""
        if batch.mask is None or rows.shape[1] != batch.mask.shape[1]:
            return rows[k]
        return rows[k][batch.mask[k]]


def _tokenized(who: str, item: Any, tokenizer: Any) -> Any:
    if not isinstance(item, str):
        return item
    if tokenizer is None:
        remedy = "Or give each example as a list of tokens."
        raise ValueError(broken_rule(who, "tokenizer", "be given for texts", None, remedy))
    return tokenizer(item)["input_ids"]


def embedding_of(who: str, model: nn.Module, embedding: str | nn.Module | None) -> tuple[str, nn.Module]:
    """The module at whose output a study begins, and its name; None: the model's embedding of tokens."""
    found = find_points(who, model, find_embedding(model) if embedding is None else embedding, "embedding")
    if len(found) != 1:
        raise ValueError(broken_rule(who, "embedding", "be one module", f"{len(found)} of them", "Name it in full."))
    ((name, module),) = found.items()
    return name, module


def device_of(model: nn.Module) -> torch.device:
    """Where batches go."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def values_of(who: str, metric: Metric, model: nn.Module, batch: Batch) -> torch.Tensor:
    """The metric of each example [B] of a batch that is run through the model.

    ValueError for a field of the examples that neither the model nor the metric has asked for.
    """
    found = checked_values(who, metric(logits_of(call_model(model, batch)), batch), len(batch))
    unused = sorted(batch.fields.use.given - batch.fields.use.read)
    if unused:
        rule, remedy = "be used by the model or the metric", "Leave them out."
        raise ValueError(broken_rule(who, "fields of the examples", rule, ", ".join(unused), remedy))
    return found


def checked_values(who: str, found: object, n: int) -> torch.Tensor:
    """What a metric returned as [n]; an error if it isn't a number for each, with a gradient."""
    remedy = "Return a tensor [B], not its sum or mean."
    if not isinstance(found, torch.Tensor):
        raise TypeError(broken_rule(who, "metric", "return a tensor", type(found).__name__, remedy))
    if found.numel() != n or found.dim() > 1:
        raise ValueError(broken_rule(who, "metric", f"return [{n}], a number each", list(found.shape), remedy))
    if torch.is_grad_enabled() and not found.requires_grad:
        remedy = "Make it of the logits, without argmax(), detach() or no_grad()."
        raise RuntimeError(broken_rule(who, "metric", "have a gradient", "a value without a graph", remedy))
    return found.reshape(n)
