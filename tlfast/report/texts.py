"""The text of an example for people to read: decoded where its tokenizer is at hand, otherwise its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..dataset import GradientDataset
from ..dataset.decoding import tokenizer_fingerprint
from ..dataset.errors import extra
from ..huggingface import load_tokenizer

_LONGEST = 600  # characters

Decode = Callable[[Sequence[int]], str]


def decoder(dataset: GradientDataset, tokenizer: Any = None) -> tuple[Decode, str]:
    """Return how to show the tokens of an example, and why they are shown as numbers, if they are.

    Args:
        dataset: whose config.yaml names the model, if that is a folder of this machine.
        tokenizer: an object with ``decode``, or the name of one.
    """
    if tokenizer is None:
        name = _model_folder(dataset)
        if name is None:
            return tokens_only, "No tokenizer at hand (--tokenizer names one): these are token numbers."
        try:
            tokenizer = load_tokenizer(name)
        except (ImportError, ValueError) as error:
            return tokens_only, f"The tokenizer could not be loaded ({error}): these are token numbers."
    elif isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    said = dataset.header.get("tokenizer")
    fingerprint = said.get("fingerprint") if isinstance(said, dict) else None
    if fingerprint is not None and hasattr(tokenizer, "get_vocab") and tokenizer_fingerprint(tokenizer) != fingerprint:
        return tokens_only, "The tokenizer at hand is another than the dataset's: these are token numbers."
    return lambda tokens: _cut(str(tokenizer.decode(list(tokens)))), ""


def _model_folder(dataset: GradientDataset) -> str | None:
    """The model in config.yaml, if it is a folder here: a report asks no network."""
    if not isinstance(dataset.path, Path):
        return None
    try:
        config = extra("yaml", "tlfast report").safe_load((dataset.path / "config.yaml").read_text(encoding="utf-8"))
    except Exception:  # whatever a file that says anything makes of a parser: there is then no name in it
        return None
    name = config.get("model") if isinstance(config, dict) else None
    return name if isinstance(name, str) and Path(name).is_dir() else None


def tokens_only(tokens: Sequence[int]) -> str:
    """The numbers of the tokens."""
    return _cut(" ".join(map(str, list(tokens)[:_LONGEST])))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026"
