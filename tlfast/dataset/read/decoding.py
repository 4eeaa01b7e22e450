"""From tokens back to text: the tokenizer that a dataset names, if it is on this machine and the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import dataset_error
from ..places.store import Store
from .pretrained import from_pretrained

_WHO = "GradientDataset"
_MAX_CONFIG_BYTES = 1 << 20


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer's own JSON, or of a slow one's vocabulary."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = str(fast.to_str()) if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def recorded_tokenizer(store: Store, header: Mapping[str, Any]) -> Any:
    """Return the tokenizer that a dataset names; None where it isn't on this machine, or is another one by now.

    config.yaml has the folder of a model, dataset.json its name. Nothing is downloaded, and no code of a model is run.
    """
    model, tokenizer = header.get("model"), header.get("tokenizer")
    name = model.get("name") if isinstance(model, dict) else None
    wanted = tokenizer.get("fingerprint") if isinstance(tokenizer, dict) else None
    if not isinstance(wanted, str):
        return None
    for place in (_model_folder(store), name):
        if isinstance(place, str):
            try:
                loader = import_module("transformers").AutoTokenizer
                found = loader.from_pretrained(place, local_files_only=True, trust_remote_code=False)
                if tokenizer_fingerprint(found) == wanted:
                    return found
            except Exception:  # text is a courtesy; the tokens are there without it
                continue
    return None


def _model_folder(store: Store) -> str | None:
    try:
        config = import_module("yaml").safe_load(store.read("config.yaml", _WHO, _MAX_CONFIG_BYTES))
    except Exception:  # whatever a file that says anything makes of a parser: there is then no name in it
        return None
    name = config.get("model") if isinstance(config, dict) else None
    folder = Path(name).expanduser() if isinstance(name, str) else None
    return str(folder) if folder is not None and folder.is_dir() else None


def given_tokenizer(tokenizer: Any) -> Any:
    """Return what was given, or load it where it is the name or the folder of one."""
    if isinstance(tokenizer, str):
        return from_pretrained("AutoTokenizer", tokenizer, _WHO, "tokenizer")
    if not hasattr(tokenizer, "decode"):
        remedy = "Give a tokenizer, or the name or folder of one."
        raise dataset_error(_WHO, "tokenizer", "have a method decode", repr(tokenizer)[:80], remedy)
    return tokenizer


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens, or the tokens themselves as text without a tokenizer."""
    return " ".join(map(str, tokens)) if tokenizer is None else str(tokenizer.decode(list(tokens)))
