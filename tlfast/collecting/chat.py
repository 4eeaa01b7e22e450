"""Conversations as examples: the chat template of a tokenizer, and which of its tokens are the assistant's."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from ..errors import broken_rule
from .fields import NOT_ASKED_FOR

ASSISTANT = "assistant"


def check_template(tokenizer: Any) -> None:
    """ValueError for a tokenizer that can't make a text of a conversation, or doesn't say where its tokens begin."""
    if not getattr(tokenizer, "chat_template", None):
        remedy = "Take a chat model's, or --prompt-column and --response-column."
        got = f"{type(tokenizer).__name__} without one"
        raise ValueError(broken_rule("collect", "tokenizer", "have a chat template", got, remedy))
    if not tokenizer.is_fast:
        remedy = "Save one with a tokenizer.json."
        got = type(tokenizer).__name__
        raise ValueError(broken_rule("collect", "tokenizer", "be a fast one for messages", got, remedy))


def chat_tokens(tokenizer: Any, messages: Any) -> tuple[array[int], array[int]]:
    """The tokens of a conversation, and its labels: the tokens of the assistant's turns, -100 elsewhere.

    A template with ``{% generation %}`` says itself which they are. Of others each turn of the assistant is what the
    text has behind the prompt for it, up to and with the end of the turn.

    Raises:
        ValueError: for what is no conversation, or a template that writes a turn otherwise once others follow; the text
            is the reason, without the example.
    """
    _check_messages(messages)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        found = _applied(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, theirs = found["input_ids"], found["assistant_masks"]
    else:
        text = _rendered(tokenizer, messages)
        spans = [
            (len(_begun(tokenizer, text, messages[:k], True)), len(_begun(tokenizer, text, messages[: k + 1], False)))
            for k, message in enumerate(messages)
            if message["role"] == ASSISTANT
        ]
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        theirs = [any(start <= first < last <= stop for start, stop in spans) for first, last in offsets]
    return array("i", ids), array("q", [t if own else NOT_ASKED_FOR for t, own in zip(ids, theirs, strict=True)])


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages are no list, or an empty one")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError("a message without role and content")
    if all(message["role"] != ASSISTANT for message in messages):
        raise ValueError("no turn of the assistant")


def _rendered(tokenizer: Any, messages: Any, prompt: bool = False) -> str:
    text: str = _applied(tokenizer, messages, tokenize=False, add_generation_prompt=prompt)
    return text


def _applied(tokenizer: Any, messages: Any, **how: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # whatever a template raises: most check the order of the roles
        raise ValueError(f"the chat template refuses it: {' '.join(str(error).split())[:80]}") from None


def _begun(tokenizer: Any, text: str, messages: Any, prompt: bool) -> str:
    """The text of the first messages, with which that of all of them begins."""
    begun = _rendered(tokenizer, messages, prompt)
    if not text.startswith(begun):
        raise ValueError("the chat template writes a turn otherwise where others follow, and has no {% generation %}")
    return begun
