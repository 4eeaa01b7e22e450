"""The loss whose gradients are collected: a sum over examples, so that no row depends on its batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..dataset.format.plan import Example
from ..errors import broken_rule
from ..hooks.freeze import find_embedding
from .batches import Batch, Batching
from .tasks import CAUSAL, task_of

Loss = Callable[[nn.Module, Batch], torch.Tensor]

_TRIAL_TOKENS = 32  # enough for every token to have some before it and some behind
_ROUNDINGS = 2  # the same sums in another order, either time
# What a Hugging Face model compares its output with, if it gets it.
_LABELS = frozenset(
    {
        "labels",
        "label_ids",
        "start_positions",
        "end_positions",
        "next_sentence_label",
        "sentence_order_label",
        "mc_labels",
        "class_labels",
        "mask_labels",
        "entity_labels",
        "return_loss",
    }
)


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The names that a forward takes, and whether it takes any others too."""
    parameters = inspect.signature(forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    return frozenset(parameters), inspect.Parameter.VAR_KEYWORD in kinds


def _accepted(model: nn.Module, wanted: frozenset[str] = frozenset()) -> frozenset[str]:
    """The names that a model takes; through ``**kwargs`` also those of the model that it wraps, as PEFT's do.

    That is the first child that takes tokens; or a field that is ``wanted``, of a model that names nothing itself. What
    ``**kwargs`` alone would swallow isn't taken: nobody could tell whether it is used.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    names, others = _parameters(type(model).forward)
    if others:
        for child in model.children():
            inner = _accepted(child, wanted)
            if "input_ids" in inner or (inner & wanted and not names - {"self", "args", "kwargs"}):
                return names | inner
    return names


def accepted_names(model: nn.Module) -> frozenset[str]:
    """The names that a model takes, also those of the model that it wraps."""
    return _accepted(model)


def places_of_padding(model: nn.Module, looked_up: bool = False, counted: bool = True) -> Iterator[tuple[int, int]]:
    """Of each embedding of positions that has one for padding, which it is, and how many positions there are.

    Models with such count on from there, as RoBERTa's kin do; unless ``counted`` also those that are known not to.
    Those that are ``looked_up`` are asked for positions; a class of its own may find them itself, as ProphetNet's,
    which gives the last one to all tokens behind.
    """
    for name, module in model.named_modules():
        if counted and not _counts_on(model.get_submodule(name.rpartition(".")[0])):
            continue
        of_positions = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if looked_up and type(module).forward is not nn.Embedding.forward:
            continue
        if of_positions and module.padding_idx is not None:
            yield module.padding_idx, module.num_embeddings


def _counts_on(owner: nn.Module) -> bool:
    """Whether positions are counted from that of padding on, where one of an owner's embeddings has any.

    In transformers such an owner knows it, too. LXMERT's doesn't, and counts from 0.
    """
    return hasattr(owner, "padding_idx") or not type(owner).__module__.startswith("transformers.models.")


def _first_position(model: nn.Module) -> int:
    """What position a model gives to the first token."""
    return next((place + 1 for place, _ in places_of_padding(model)), 0)


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of ``model.forward`` that the batch asks for, out of those that it accepts.

    These are mask and positions, and all fields but labels: a model makes a mean of its own of those, over the batch.
    Whether the model makes of them what it should is tried before a collection begins (`tlfast.collecting.probe`).
    """
    wanted: dict[str, Any] = {"use_cache": False}
    # A mask of padding would stand in for the one that a model makes of positions that begin anew. By them a padded
    # token is a text of its own, which no other sees.
    if batch.mask is not None and not (batch.packed and task_of(model) == CAUSAL):
        wanted["attention_mask"] = batch.mask.long()
        positions = batch.position_ids
        if positions is not None:
            wanted["position_ids"] = positions + _first_position(model)
    fields = frozenset(batch.fields) - _LABELS
    accepted = _accepted(model, fields)
    wanted = {name: value for name, value in wanted.items() if name in accepted}
    return wanted | {name: batch.fields[name] for name in batch.fields if name in fields & accepted}


def call_model(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """What the model makes of a batch: of its tokens, where it has any, and of the fields that it takes.

    Raises:
        ValueError: for tokens that the model doesn't know, on the CPU; a GPU's kernels fail by themselves.
    """
    inputs = model_inputs(model, batch) | more
    try:
        return model(batch.input_ids, **inputs) if batch.input_ids.shape[1] else model(**inputs)
    except IndexError as error:
        _check_known(model, batch, error)
        raise


def _check_known(model: nn.Module, batch: Batch, error: IndexError) -> None:
    """ValueError, from what the model has raised, where a token of the batch is none of the model's."""
    looks_up = find_embedding(model) if any(isinstance(module, nn.Embedding) for module in model.modules()) else None
    if not isinstance(looks_up, nn.Embedding) or not batch.input_ids.numel():
        return
    n, most, least = looks_up.num_embeddings, int(batch.input_ids.max()), int(batch.input_ids.min())
    if most >= n or least < 0:
        rule = f"be tokens that {type(model).__name__} has, 0 to {n - 1}"
        remedy = "Take the model's own tokenizer, or give the model more (resize_token_embeddings)."
        raise ValueError(broken_rule("collect", "input_ids", rule, most if most >= n else least, remedy)) from error


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of the next token, summed over the real tokens of each example and over the examples.

    Under a mean, a row would be divided by the number of tokens in its batch.

    Args:
        model: a Hugging Face causal LM, or any module that returns logits [B, P, V], or has them first in a tuple.
        batch: the tokens.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> from tlfast.collecting.batches import Batch
        >>> from tlfast.collecting.loss import next_token_loss
        >>> model = torch.nn.Embedding(4, 4)  # its output is the logits
        >>> next_token_loss(model, Batch(torch.tensor([[0, 1, 2]]), None)).shape
        torch.Size([])
    """
    logits = token_logits(model, batch)
    # The tokens are shifted, not the logits: a slice of those would be copied.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), batch.next_tokens.flatten(), ignore_index=-100, reduction="sum")


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model returned: itself, its ``logits``, or the first of a tuple; ValueError without any."""
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, torch.Tensor):
        remedy = "Pass loss=, a function of model and batch."
        raise ValueError(broken_rule("collect", "model", "return logits", type(output).__name__, remedy))
    return logits


def token_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits [B, P, V] of a batch; ValueError for another shape."""
    logits = logits_of(call_model(model, batch))
    if logits.shape[:-1] != batch.input_ids.shape:
        extra = logits.shape[1] - batch.input_ids.shape[1] if logits.dim() == 3 else 0
        rule = f"return logits [B, P, V] for tokens {list(batch.input_ids.shape)}"
        remedy = "Pass loss=, a function of model and batch."
        if extra > 0:
            remedy = f"It adds {extra} positions (virtual tokens?), that no mask covers. Collect a model without them."
        raise ValueError(broken_rule("collect", "model", rule, list(logits.shape), remedy))
    return logits


@torch.no_grad()
def check_causal(model: nn.Module, batching: Batching, examples: Sequence[Example]) -> None:
    """Take an example through, and again with another last token, which `next_token_loss` asks a model to predict.

    Where the model doesn't see it, the logits before it are the same up to rounding: a mixture of experts may compute
    them in another order, as it may for two examples in a batch. The model is called three times, whatever comes out,
    since the ranks of a sharded one must agree on that.

    Raises:
        ValueError: if they are not.
    """
    batching = replace(batching, source=None, collate=None, sizes=None)
    ids = list(examples[0].input_ids[:_TRIAL_TOKENS])
    n, tokens = len(ids), chain(ids, (token for example in examples for token in example.input_ids))
    other = next((token for token in tokens if token != ids[-1]), None)
    if other is None:  # there is one token in all examples
        return
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def take(*rows: list[int]) -> torch.Tensor:
        batch = batching.batch([Example(k, row, "", 0, n) for k, row in enumerate(rows)], batching.n_positions(n))
        logits = token_logits(model, batch.to(device))[0]
        start = len(logits) - n if batching.padding_side == "left" else 0
        return logits[start : start + n - 1].flatten(1).double()

    before, twice, after = take(ids), take(ids, ids), take([*ids[:-1], other])
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo().eps)
    rounding, change = (float(((x - before).norm(dim=1) / before.norm(dim=1)).max()) for x in (twice, after))
    if change > _ROUNDINGS * (rounding + eps):
        rule = "not see the token that it is to predict"
        got = f"{type(model).__name__}, whose logits change by {change:.1e} with the token behind them"
        remedy = "Give a causal model; or loss=, a function of model and batch (--loss module:function)."
        if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):  # of bitsandbytes
            remedy = "Its layers in 8 bits round what they are given by all tokens of it: quantise weights alone."
        raise ValueError(broken_rule("collect", "model", rule, got, remedy))


def checked_loss(loss: object, n_examples: int = 1) -> torch.Tensor:
    """What a loss function returned, if a backward can begin there; TypeError or ValueError if it can't.

    One number, or one for each of ``n_examples``, of which the sum is taken.
    """
    who = "collect"
    if not isinstance(loss, torch.Tensor):
        remedy = "Return the tensor that the backward begins at."
        if loss is None:
            remedy = "The function lacks a return, or the model was given no labels and has no loss."
        raise TypeError(broken_rule(who, "loss", "return a tensor", type(loss).__name__, remedy))
    if loss.numel() != 1 and loss.shape != (n_examples,):
        remedy = "Sum it over the examples, or return [B]."
        raise ValueError(broken_rule(who, "loss", "return one number", f"a tensor {list(loss.shape)}", remedy))
    if not loss.requires_grad:
        remedy = (
            "Detach nothing. If the model doesn't start at its embedding, name the module: embedding= (--embedding)."
        )
        raise ValueError(broken_rule(who, "loss", "be made of the model's output", "a tensor without a graph", remedy))
    return loss if loss.numel() == 1 else loss.sum()
