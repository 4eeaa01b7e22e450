"""The text of an example for people to read: decoded where its tokenizer is at hand, otherwise its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..dataset import GradientDataset
from ..dataset.read.decoding import given_tokenizer, text_of, tokenizer_fingerprint

_LONGEST = 600  # characters

Decode = Callable[[Sequence[int]], str]


def decoder(dataset: GradientDataset, tokenizer: Any = None) -> tuple[Decode, str]:
    """Return how to show the tokens of an example, and why they are shown as numbers, if they are.

    Args:
        dataset: asked for its own tokenizer, if none is given.
        tokenizer: an object with ``decode``, or the name of one.
    """
    if tokenizer is None:
        own = dataset.tokenizer()
        if own is None:
            return tokens_only, "No tokenizer at hand (--tokenizer names one): these are token numbers."
        return lambda tokens: cut(text_of(own, tokens)), ""
    used = given_tokenizer(tokenizer)
    said = dataset.header.get("tokenizer")
    fingerprint = said.get("fingerprint") if isinstance(said, dict) else None
    if fingerprint is not None and hasattr(used, "get_vocab") and tokenizer_fingerprint(used) != fingerprint:
        return tokens_only, "The tokenizer at hand is another than the dataset's: these are token numbers."
    return lambda tokens: cut(text_of(used, tokens)), ""


def tokens_only(tokens: Sequence[int]) -> str:
    """The numbers of the tokens."""
    return cut(" ".join(map(str, list(tokens)[:_LONGEST])))


def cut(text: str) -> str:
    """A text, or its beginning where it is long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026"
