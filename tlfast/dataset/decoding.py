"""From tokens back to text: the tokenizer that a dataset names, if it is on this machine and the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from .errors import dataset_error, extra

_WHO = "GradientDataset"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer's own JSON, or of a slow one's vocabulary."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = str(fast.to_str()) if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def recorded_tokenizer(header: Mapping[str, Any]) -> Any:
    """Return the tokenizer that the header names; None where it isn't on this machine, or is another one by now.

    Nothing is downloaded, and no code of a model is run.
    """
    model, tokenizer = header.get("model"), header.get("tokenizer")
    name = model.get("name") if isinstance(model, dict) else None
    wanted = tokenizer.get("fingerprint") if isinstance(tokenizer, dict) else None
    if not isinstance(name, str) or not isinstance(wanted, str):
        return None
    try:
        loader = import_module("transformers").AutoTokenizer
        found = loader.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return found if tokenizer_fingerprint(found) == wanted else None
    except Exception:  # text is a courtesy; the tokens are there without it
        return None


def given_tokenizer(tokenizer: Any) -> Any:
    """Return what was given, or load it where it is the name or the folder of one."""
    if isinstance(tokenizer, str):
        return extra("transformers", _WHO).AutoTokenizer.from_pretrained(tokenizer)
    if not hasattr(tokenizer, "decode"):
        remedy = "Give a tokenizer, or the name or folder of one."
        raise dataset_error(_WHO, "tokenizer", "have a method decode", repr(tokenizer)[:80], remedy)
    return tokenizer


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens, or the tokens themselves as text without a tokenizer."""
    return " ".join(map(str, tokens)) if tokenizer is None else str(tokenizer.decode(list(tokens)))
