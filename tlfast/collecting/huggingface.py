"""Hugging Face models and tokenizers, loaded from a folder or the hub, with errors of one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..dataset.errors import extra
from ..dataset.read.pretrained import from_pretrained
from ..dataset.write.folder import some
from ..errors import broken_rule

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")

# What transformers calls the class of a task, and how a checkpoint's architecture ends that is of it.
TASKS = {
    "causal": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "masked": ("AutoModelForMaskedLM", ("ForMaskedLM",)),
    "sequence-classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "token-classification": ("AutoModelForTokenClassification", ("ForTokenClassification",)),
    "seq2seq": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
    "image-classification": ("AutoModelForImageClassification", ("ForImageClassification",)),
    "audio-classification": ("AutoModelForAudioClassification", ("ForAudioClassification",)),
    "speech-seq2seq": ("AutoModelForSpeechSeq2Seq", ("ForSpeechSeq2Seq",)),
}
# Classes of these are called as those of text are, in part: transformers lists them.
_OF_SOUND = {
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
ADAPTER = "adapter_config.json"

# What the hub accepts as a name: one part, or two with a slash.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded, beside its name.

    Args:
        task: one of `TASKS`; "auto": as the checkpoint's config says, causal where it doesn't.
        adapter: folder or name of a PEFT adapter to put into it; "": none.
        trust_remote_code: run the code that lies beside the checkpoint.
    """

    task: str = "causal"
    adapter: str = ""
    trust_remote_code: bool = False


def base_and_adapter(name: str, adapter: str = "") -> tuple[str, str]:
    """The model and the adapter that are meant: a folder may hold an adapter alone, which names its model.

    ValueError where that is so, and another adapter is given, or none is named.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return name, adapter
    if adapter:
        rule, got = "be a model where adapter is given", f"{name!r}, an adapter, and {adapter!r}"
        raise ValueError(broken_rule("collect", "model", rule, got, "Give one adapter."))
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        rule, remedy = "name its model in " + ADAPTER, "Give the model by --model, this folder by --adapter."
        raise ValueError(broken_rule("collect", "model", rule, repr(name), remedy))
    return base, name


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


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a model; ValueError where there is none."""
    trusting = _trusting(trust_remote_code)
    try:
        return _load("AutoTokenizer", name, **trusting)
    except ValueError:
        kind = _kind_without_text(name, trusting)
        if kind is None:
            raise
    got, remedy = f"{name!r}, of type {kind}", "--image-column and --audio-column are for models of these."
    raise ValueError(broken_rule("collect", "model", "read text", got, remedy))


def _kind_without_text(name: str, trusting: Mapping[str, Any]) -> str | None:
    """The type of a model that has no vocabulary; None for others, and where there is no such model."""
    try:
        config = _load("AutoConfig", name, **trusting)
    except ValueError:
        return None
    return None if hasattr(config.get_text_config(), "vocab_size") else str(config.model_type)


def _trusting(trust: bool) -> dict[str, Any]:
    # Always said: where it isn't, transformers asks whoever sits at the terminal.
    return {"trust_remote_code": trust}


def auto_class(name: str, loading: Loading = Loading()) -> str:
    """The class of transformers that loads a model for its task."""
    if loading.task in TASKS:
        return TASKS[loading.task][0]
    path = Path(name).expanduser() / "config.json"
    if path.is_file():
        try:
            said: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            said = {}
    else:
        said = _load("AutoConfig", name, **_trusting(loading.trust_remote_code)).to_dict()
    kinds = said.get("architectures") if isinstance(said, dict) else None
    kind = kinds[0] if isinstance(kinds, list) and kinds and isinstance(kinds[0], str) else ""
    known = extra("transformers.models.auto.modeling_auto", "collect")
    for auto, names in _OF_SOUND.items():
        if kind and kind in getattr(known, names, {}).values():
            return auto
    found = [auto for auto, endings in TASKS.values() if kind.endswith(endings)]
    if kind.endswith("ForConditionalGeneration") and not said.get("is_encoder_decoder"):
        found = []
    return found[0] if found else TASKS["causal"][0]


def load_model(
    name: str, dtype: torch.dtype | None, device: torch.device, device_map: str = "", loading: Loading = Loading()
) -> nn.Module:
    """Load a model for its task, a causal language model where nothing says another; ``dtype`` None is its own.

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
    kind = auto_class(name, loading)
    model, loaded = _load(kind, name, **settings, **_trusting(loading.trust_remote_code))
    _check_loaded(name, model, loaded)
    if loading.adapter:
        _put_in(model, loading.adapter)
    return model if device_map else model.to(device)


def empty_model(name: str, loading: Loading) -> nn.Module:
    """The model of a checkpoint without its weights, on the meta device; ValueError where it can't be made."""
    trust = _trusting(loading.trust_remote_code)
    config = _load("AutoConfig", name, **trust)
    kind = getattr(extra("transformers", "collect"), auto_class(name, loading))
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(config, **trust).to("meta")  # some make a weight elsewhere
    except (OSError, ValueError, KeyError) as error:
        got, remedy = f"{name!r}: {' '.join(str(error).split())[:300]}", "Give another --task."
        raise ValueError(broken_rule("collect", "model", f"be one of {kind.__name__}", got, remedy)) from error
    return model


def _put_in(model: Any, adapter: str) -> None:
    """Put a PEFT adapter into a model, whose modules keep their names; ValueError where it isn't for that model."""
    extra("peft", "collect", "peft")
    folder = Path(adapter).expanduser()
    try:
        found = model.load_adapter(str(folder) if folder.is_dir() else adapter)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        got = f"{adapter!r}: {' '.join(str(error).split())[:300]}"
        remedy = "Check the folder, or the name; prompt tuning has no weights to put in."
        raise ValueError(broken_rule("collect", "adapter", "be a PEFT adapter of the model", got, remedy)) from error
    missing = sorted({*(getattr(found, "missing_keys", None) or ()), *(getattr(found, "unexpected_keys", None) or ())})
    if missing:
        got = f"{adapter!r} with or without {some(missing)}"
        remedy = "It was trained with another model."
        raise ValueError(
            broken_rule("collect", "adapter", "have the weights that the model has places for", got, remedy)
        )


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


def end_of_text(tokenizer: Any, eos: str, is_response: bool) -> list[int]:
    """The tokens to put behind an example of a causal model: "auto" is one behind a response, where there is one."""
    token = tokenizer.eos_token_id
    if eos == "always" and token is None:
        remedy = "It has no eos token."
        raise ValueError(broken_rule("collect", "eos", "be auto or never for this tokenizer", repr(eos), remedy))
    return [token] if token is not None and (eos == "always" or (eos == "auto" and is_response)) else []


def more_around(tokenizer: Any, bos: str, eos: str, strict: bool = True) -> tuple[list[int], list[int]]:
    """The tokens to put before and behind a text that its tokenizer has put its own around, as models have it then.

    Raises:
        ValueError: if ``strict``, for a "never" of a token that the tokenizer puts itself.
    """
    own, found = list(tokenizer("a")["input_ids"]), []
    for name, said, token, there in (
        ("bos", bos, tokenizer.bos_token_id, own[:1]),
        ("eos", eos, tokenizer.eos_token_id, own[-1:]),
    ):
        if said == "never" and there == [token] and strict:
            rule, remedy = "be auto for this tokenizer", "It puts the token to each text itself."
            raise ValueError(broken_rule("collect", name, rule, repr(said), remedy))
        found.append([token] if said == "always" and there != [token] else [])
    return found[0], found[1]


def encoder(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """A function from text to its tokens, without special ones and without warnings about long texts."""

    def encode(text: str) -> Sequence[int]:
        tokens: Sequence[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return tokens

    return encode


def response_encoder(tokenizer: Any, model: nn.Module) -> Callable[[str], list[int]]:
    """A function from a text to the tokens that a decoder beside an encoder is to write.

    Of what the tokenizer puts before a text the token is left out at which the decoder begins: it reads that anyway.
    """
    first = getattr(getattr(model, "config", None), "decoder_start_token_id", None)

    def encode(text: str) -> list[int]:
        tokens = list(tokenizer(text_target=text, return_attention_mask=False, verbose=False)["input_ids"])
        return tokens[1:] if tokens and tokens[0] == first else tokens

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
