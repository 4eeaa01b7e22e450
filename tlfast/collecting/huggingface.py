"""Hugging Face models and tokenizers, loaded from a folder or the hub, with errors of one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..dataset.errors import extra
from ..dataset.read.pretrained import from_pretrained
from ..dataset.write.folder import some
from ..errors import broken_rule

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

# What the hub accepts as a name: one part, or two with a slash.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def check_model_name(name: str) -> None:
    """ValueError unless ``name`` is a folder with a config.json, or can be a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            got = f"{name!r} without config.json"
            remedy = "Save one with save_pretrained."
            raise ValueError(broken_rule("collect", "model", "be a folder with a Hugging Face model", got, remedy))
    elif path.exists() or not _HUB_NAME.fullmatch(name) or name.startswith(".") or _in_a_folder(path):
        rule = "be a folder or a name on the hub"
        got = f"{name!r}, {'a file' if path.exists() else 'no such folder'}"
        raise ValueError(broken_rule("collect", "model", rule, got, "Check the path."))


def _in_a_folder(path: Path) -> bool:
    # "demo/modle" could be a name on the hub, but where there is a folder demo it's a path with a slip in it.
    return len(path.parts) > 1 and path.parent.is_dir()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer that belongs to a model; ValueError where there is none."""
    return _load("AutoTokenizer", name)


def load_model(name: str, dtype: torch.dtype | None, device: torch.device, device_map: str = "") -> nn.Module:
    """Load a causal language model; ``dtype`` None is the checkpoint's own.

    It is put onto ``device``, or spread over several as ``device_map`` says.

    Raises:
        ValueError: if it fails, or if the checkpoint and the model don't have the same weights.
    """
    settings: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if device_map:
        extra("accelerate", "collect", "device-map")
        settings["device_map"] = as_device_map(device_map)
    # Sizes that differ are then told by name, and not by an error that says where to look for them.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model: nn.Module
    model, loaded = _load("AutoModelForCausalLM", name, **settings)
    _check_loaded(name, model, loaded)
    return model if device_map else model.to(device)


def _check_loaded(name: str, model: nn.Module, loaded: Mapping[str, Any]) -> None:
    """ValueError for a weight that the checkpoint lacks, since a random one stands in for it; or for a layer too many.

    Other weights that the model has no place for are left out in silence: a head for another task, a pooler.
    """
    class_name, numbers = type(model).__name__, re.compile(r"\d+")
    missing = sorted({*loaded["missing_keys"], *(entry[0] for entry in loaded["mismatched_keys"])})
    if missing:
        got = f"{name!r} without {some(missing)}, or of other sizes"
        remedy = "A random weight would stand in for each; give a model that was trained with them."
        raise ValueError(broken_rule("collect", "model", f"have all weights of {class_name}", got, remedy))
    kinds = {numbers.sub("0", key) for key in model.state_dict()}
    layers = sorted(key for key in loaded["unexpected_keys"] if numbers.sub("0", key) in kinds)
    if layers:
        got = f"{name!r} with {some(layers)} too"
        remedy = "Its config.json asks for fewer layers than are saved."
        raise ValueError(broken_rule("collect", "model", f"have the layers of {class_name}", got, remedy))


def as_device_map(text: str) -> str | dict[str, Any]:
    """What `from_pretrained` takes as ``device_map``: a word, or a mapping given as JSON. ValueError for other text."""
    if text in DEVICE_MAPS:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and value and all(map(_is_place, value.values())):
        return value
    rule = f"be one of {', '.join(DEVICE_MAPS)}, or JSON that maps modules to devices"
    raise ValueError(broken_rule("collect", "device_map", rule, repr(text), "Or leave it out: one device."))


def _is_place(place: Any) -> bool:
    if type(place) is int or place == "disk":  # a GPU's number, and accelerate's word
        return True
    try:
        return isinstance(place, str) and torch.device(place).type != "meta"
    except RuntimeError:
        return False


def _load(kind: str, name: str, **settings: Any) -> Any:
    return from_pretrained(kind, name, "collect", "model", **settings)


def beginning_of_text(tokenizer: Any, bos: str) -> list[int]:
    """The tokens to put before each example.

    ``bos`` is "auto" (what the tokenizer itself puts before a text: Llama and Gemma do, GPT-2 doesn't), "always" or
    "never".
    """
    token = tokenizer.bos_token_id
    if bos == "always" and token is None:
        raise ValueError(
            broken_rule("collect", "bos", "be auto or never for this tokenizer", repr(bos), "It has no bos token.")
        )
    if bos == "never" or token is None:
        return []
    return [token] if bos == "always" or list(tokenizer("a")["input_ids"][:1]) == [token] else []


def encoder(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """A function from text to its tokens, without special ones and without warnings about long texts."""

    def encode(text: str) -> Sequence[int]:
        tokens: Sequence[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return tokens

    return encode


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ValueError where it isn't there.

    "auto" is the GPU of this process's LOCAL_RANK, which torchrun sets, else the first one, or the CPU without any.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank, n_gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
        if not rank:
            return torch.device("cuda")
        if not rank.isdecimal() or int(rank) >= n_gpus:
            remedy = "Start as many processes on a machine as it has GPUs, or give --device."
            raise ValueError(broken_rule("collect", "LOCAL_RANK", f"be below {n_gpus}, the GPUs here", rank, remedy))
        torch.cuda.set_device(int(rank))  # else each process would keep a context on the first GPU as well
        return torch.device("cuda", int(rank))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        got = f"{name!r}: {str(error).splitlines()[0]}"
        raise ValueError(broken_rule("collect", "device", "be usable", got, 'Use "auto" or "cpu".')) from error
    return device


def portable_name(name: str) -> str:
    """The model's name without the machine: the last part of a folder's path, or the name on the hub."""
    path = Path(name).expanduser()
    return Path(os.path.abspath(path)).name if path.is_dir() else name
