"""The losses that have a name: what each asks of the fields of an example, and its sum over the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import broken_rule
from .batches import Batch
from .fields import NOT_ASKED_FOR
from .loss import Loss, call_model, logits_of, next_token_loss, token_logits
from .tasks import unwrapped

# What dataset.json says of each: so two runs agree, whatever the function is called.
SAID = {
    "next_token": "next-token cross-entropy, summed over each example's tokens",
    "response": "next-token cross-entropy, summed over the tokens that labels name",
    "masked_lm": "cross-entropy of the tokens that labels name, summed",
    "classification": "classification loss of labels, summed over the examples",
    "seq2seq": "cross-entropy of the labels behind the decoder, summed",
    "preference": "log-probability of the chosen tokens minus that of the rejected ones, summed over the examples",
    "reward_logprob": "reward times the log-probability of the labelled tokens, summed over the examples",
    "logit_difference": "logit of answer_ids minus that of wrong_ids after the last token, summed over the examples",
}


def response_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Next-token cross-entropy where ``labels`` say: [B, P], the token itself, or -100 where it isn't asked for.

    The labels stand at their own tokens, as transformers has them; they are shifted here.

    Example:
        >>> import torch
        >>> from tlfast.collecting.batches import Batch
        >>> from tlfast.collecting.fields import FieldsOfBatch
        >>> from tlfast.collecting.losses import response_loss
        >>> fields = FieldsOfBatch({"labels": torch.tensor([[-100, -100, 2]])})
        >>> response_loss(torch.nn.Embedding(4, 4), Batch(torch.tensor([[0, 1, 2]]), None, fields=fields)).shape
        torch.Size([])
    """
    return _summed(_log_likelihoods(token_logits(model, batch), _next_labels(batch)).neg())


def masked_lm_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy at each token where ``labels`` [B, P] have the true one; -100 elsewhere."""
    return _summed(_log_likelihoods(token_logits(model, batch), _labels(batch)).neg())


def classification_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that transformers takes for ``labels``, summed: over examples, tokens, or the values of an example.

    Whole numbers are classes, [B] or [B, P] with -100 where a token isn't asked for: cross-entropy. Others are targets
    of a regression where the model's config says so or there is one output, [B] or [B, C]: squared errors; else they
    say of each class whether it holds: binary cross-entropy. So do whole numbers [B, C], each 0 or 1.
    """
    logits, labels = _wide(logits_of(call_model(model, batch))), _field(batch, "labels", "classification")
    kind = getattr(getattr(unwrapped(model), "config", None), "problem_type", None)
    whole = not labels.is_floating_point() and kind != "regression" and logits.shape[-1] > 1
    if whole and labels.shape != logits.shape:
        _check_labels(labels, logits.shape[:-1])
        return F.cross_entropy(
            logits.flatten(0, -2), labels.flatten().long(), ignore_index=NOT_ASKED_FOR, reduction="sum"
        )
    targets = labels.to(logits.dtype)
    targets = targets[..., None] if targets.dim() < logits.dim() else targets
    _check_labels(targets, logits.shape)
    if kind == "regression" or logits.shape[-1] == 1:
        return F.mse_loss(logits, targets, reduction="sum")
    if whole and not bool(((labels == 0) | (labels == 1)).all()):
        rule, remedy = "be 0 or 1 for each class", "Give one class an example, or floats."
        raise ValueError(broken_rule("collect", "labels", rule, f"{labels.min()} to {labels.max()}", remedy))
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def seq2seq_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of ``labels`` [B, L] behind a decoder that has read those before; -100 where there is none.

    The decoder reads ``decoder_input_ids`` where the examples have them, else the labels shifted by one.
    """
    labels = _labels(batch)
    given = {} if "decoder_input_ids" in batch else {"decoder_input_ids": _shifted(unwrapped(model), labels)}
    return _summed(_log_likelihoods(logits_of(call_model(model, batch, **given)), labels).neg())


def reward_logprob(model: nn.Module, batch: Batch) -> torch.Tensor:
    """``reward`` [B] times the log-probability of each example's tokens: of those that ``labels`` name, or of all."""
    targets = _next_labels(batch) if "labels" in batch else batch.next_tokens
    per_example = _log_likelihoods(token_logits(model, batch), targets).sum(1)
    reward = _field(batch, "reward", "reward_logprob").to(per_example)
    if reward.shape != per_example.shape:
        remedy = "Give each example one number."
        raise ValueError(broken_rule("collect", "reward", "be [B]", list(reward.shape), remedy))
    return (reward * per_example).sum()


def logit_difference(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logit of ``answer_ids`` minus that of ``wrong_ids`` after the last token: [B], or the mean of [B, K] each."""
    logits = token_logits(model, batch)
    last = logits[torch.arange(len(batch), device=logits.device), _last(batch)]

    def of(name: str) -> torch.Tensor:
        ids = _field(batch, name, "logit_difference").long()
        return last.gather(1, ids.view(len(batch), -1)).mean(1)

    return _wide(of("answer_ids") - of("wrong_ids")).sum()


def preference_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The log-probability of the chosen tokens minus that of the rejected ones, of examples by `preference_pair`.

    ``labels`` [B, P] are both, at their own tokens; ``preference_mask`` [B, P] is 1 at chosen ones, -1 at rejected
    ones, and 0 elsewhere.
    """
    signs = _field(batch, "preference_mask", "preference")
    _check_labels(signs, batch.input_ids.shape)
    moved = torch.zeros_like(signs)
    moved[:, :-1] = signs[:, 1:]
    found = _log_likelihoods(token_logits(model, batch), _next_labels(batch))
    return _summed(found * moved)


LOSSES: dict[str, Loss] = {
    "next_token": next_token_loss,
    "response": response_loss,
    "masked_lm": masked_lm_loss,
    "classification": classification_loss,
    "seq2seq": seq2seq_loss,
    "preference": preference_loss,
    "reward_logprob": reward_logprob,
    "logit_difference": logit_difference,
}
# A single token has a next one nowhere; for these an example of one is whole.
OF_ONE_TOKEN = ("masked_lm", "classification", "seq2seq", "logit_difference")
OF_TOKENS = ("next_token", "response", "preference", "reward_logprob", "masked_lm", "logit_difference")


def name_of(loss: Any) -> str | None:
    """The name of a loss that has one; None for another function."""
    if isinstance(loss, str):
        return loss
    return next((name for name, known in LOSSES.items() if known is loss), None)


def loss_called(loss: Any) -> Any:
    """A loss as a function; ValueError for a name that there isn't."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        rule = f"be one of {', '.join(LOSSES)}, or a function"
        raise ValueError(broken_rule("collect", "loss", rule, repr(loss), "Check the spelling."))
    return LOSSES[loss]


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _summed(values: torch.Tensor) -> torch.Tensor:
    return values.sum()


def _log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probability of each target [B, P], 0 where none is asked for."""
    _check_labels(targets, logits.shape[:-1])
    found = F.cross_entropy(
        _wide(logits).flatten(0, -2), targets.flatten().long(), ignore_index=NOT_ASKED_FOR, reduction="none"
    )
    return found.view(targets.shape).neg()


def _check_labels(labels: torch.Tensor, shape: torch.Size) -> None:
    if labels.shape != shape:
        rule, got = f"have the shape {list(shape)} of what the model predicts", list(labels.shape)
        raise ValueError(broken_rule("collect", "labels", rule, got, "Check the field, and the loss."))


def _field(batch: Batch, name: str, loss: str) -> torch.Tensor:
    value = batch.fields.get(name)
    if not isinstance(value, torch.Tensor):
        got = ", ".join(batch.fields) or "none" if value is None else f"a {type(value).__name__}"
        remedy = f"Give each example a field {name!r}, numbers."
        raise ValueError(broken_rule("collect", "examples", f"have the field {name} for loss {loss}", got, remedy))
    return value


def _labels(batch: Batch) -> torch.Tensor:
    return _field(batch, "labels", "of labels")


def _next_labels(batch: Batch) -> torch.Tensor:
    labels = _labels(batch)
    if labels.shape != batch.input_ids.shape:
        _check_labels(labels, batch.input_ids.shape)
    moved = torch.full_like(labels, NOT_ASKED_FOR)
    moved[:, :-1] = labels[:, 1:]
    return moved


def _last(batch: Batch) -> torch.Tensor:
    """The position of the last real token of each example, int64 [B]."""
    n_positions = batch.input_ids.shape[1]
    if batch.mask is None or batch.padding_side == "left":
        return torch.full((len(batch),), n_positions - 1, device=batch.input_ids.device)
    return batch.mask.sum(1) - 1


def _shifted(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """What a decoder reads to write these labels, as the model itself shifts them where it says how."""
    own: Callable[..., torch.Tensor] | None = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(own):
        return own(labels=labels)
    config: Any = getattr(model, "config", None)
    first, pad = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
    if first is None or pad is None:
        rule, got = "say decoder_start_token_id and pad_token_id in its config", type(model).__name__
        remedy = "Give each example decoder_input_ids."
        raise ValueError(broken_rule("collect", "model", rule, got, remedy))
    moved = labels.new_full(labels.shape, first)
    moved[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == NOT_ASKED_FOR, pad)
    return moved
