"""What a model is for, by its class, and which losses that goes with."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import broken_rule

CAUSAL = "a causal language model"
MASKED = "a masked language model"
CLASSIFIER = "a classifier"
SEQ2SEQ = "an encoder-decoder"

# How transformers calls the classes of a task.
_ENDINGS = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForMaskedLM": MASKED,
    "ForSequenceClassification": CLASSIFIER,
    "ForTokenClassification": CLASSIFIER,
    "ForImageClassification": CLASSIFIER,
    "ForVideoClassification": CLASSIFIER,
    "ForAudioClassification": CLASSIFIER,
    "ForSpeechSeq2Seq": SEQ2SEQ,
}
LOSSES_OF = {
    CAUSAL: ("next_token", "response", "preference", "reward_logprob", "logit_difference"),
    MASKED: ("masked_lm", "logit_difference"),
    CLASSIFIER: ("classification",),
    SEQ2SEQ: ("seq2seq",),
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile or PEFT put around it."""
    model = getattr(model, "_orig_mod", model)
    base: Any = getattr(model, "get_base_model", None)  # of PEFT
    return base() if callable(base) else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a Hugging Face model reads one sequence and writes another.

    One that gives a class to each token that it reads writes none, whatever its config says: T5's encoder alone.
    """
    if any(kind.__name__.endswith("ForTokenClassification") for kind in type(unwrapped(model)).__mro__):
        return False
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def task_of(model: nn.Module) -> str | None:
    """What a Hugging Face model is for; None for a model of which its class doesn't say it.

    Example:
        >>> import torch
        >>> from tlfast.collecting.tasks import task_of
        >>> task_of(type("TinyForCausalLM", (torch.nn.Module,), {})())
        'a causal language model'
    """
    for kind in type(unwrapped(model)).__mro__:
        if kind.__name__.endswith("WithLMHeadModel"):  # XLM's kin, which were trained as the one or as the other
            return CAUSAL if getattr(getattr(unwrapped(model), "config", None), "causal", False) else MASKED
        task = next((task for ending, task in _ENDINGS.items() if kind.__name__.endswith(ending)), None)
        if task is not None:
            return task
        if kind.__name__.endswith("ForConditionalGeneration"):
            return SEQ2SEQ if is_encoder_decoder(model) else CAUSAL
    return None


def has_own_ends(task: str | None) -> bool:
    """Whether models for a task were trained with what their tokenizer puts around a text: [CLS], </s> and the like."""
    return task in (MASKED, CLASSIFIER, SEQ2SEQ)


def classifies_whole(model: nn.Module) -> bool:
    """Whether a model gives classes to an example, and not to each of its tokens."""
    names = [kind.__name__ for kind in type(unwrapped(model)).__mro__]
    return task_of(model) == CLASSIFIER and not any(name.endswith("ForTokenClassification") for name in names)


def check_task(model: nn.Module, loss: str) -> None:
    """ValueError where a loss, by its name, asks of a model what its class isn't for."""
    task = task_of(model)
    if task is not None and loss not in LOSSES_OF[task]:
        rule = f"be {' or '.join(LOSSES_OF[task])} for {type(unwrapped(model)).__name__}, {task}"
        remedy = "Or a function of model and batch; or load the model with another head."
        raise ValueError(broken_rule("collect", "loss", rule, loss, remedy))
