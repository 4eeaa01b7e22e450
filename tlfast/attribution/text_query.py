"""The row of a text that a dataset is asked about: made by its own model and settings, in a dataset of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..collecting.from_text import Collection
from ..collecting.huggingface import Loading, base_and_adapter, check_model_name, load_model, load_tokenizer
from ..collecting.identity import describe_spec
from ..collecting.losses import SAID
from ..collecting.normalizer_files import Normalizers, Reader, reader_of
from ..collecting.run import collect
from ..collecting.settings import CollectSettings, load_settings
from ..dataset import open_dataset
from ..dataset.format.description import CONFIG
from ..dataset.read.decoding import tokenizer_fingerprint
from ..errors import SpeakingAs, broken_rule
from ..projections.projection import Projection
from ..spec import DTYPE_NAMES, Spec

_WHO = "tlfast search"
_OF_OTHER_DATA: dict[str, Any] = {
    "text": (), "dataset": "", "split": "", "name": "", "filter": "", "keep_fields": (), "pack": False, "pattern": "*",
    "max_examples": 0, "rows_per_unit": 0, "staging": "", "cuda_graph": "off", "non_finite": "stop",
}  # fmt: skip


@contextmanager
def text_query(
    ds: Any, text: str, *, response: str = "", model: str = "", normalizer: str = "", trust: bool = False
) -> Iterator[Any]:
    """Give a dataset with the row of one text, as the dataset ``ds`` would have it; it is gone afterwards.

    Args:
        ds: an open dataset; of a merged one the first part says how.
        text: the text, or the prompt where examples have a prompt and a response.
        response: what follows it, where examples have one.
        model: the model's folder or name, where the dataset doesn't say it, or it lies elsewhere by now.
        normalizer: the file of what its rows were normalized with, as `tlfast collect` takes it, where the dataset
            doesn't say it, or it lies elsewhere by now.
        trust: run the code that lies beside the model.

    Raises:
        ValueError: where the model isn't known, the text is no example of this kind, or the settings can't be had from
            the dataset.
    """
    settings = _settings(ds)
    with TemporaryDirectory(prefix="tlfast-") as folder:
        out = os.path.join(folder, "out")
        if settings is not None:
            settings = replace(settings, **_given(settings, Path(folder), text, response), out=out)
            settings = replace(settings, model=_known(model or settings.model), trust_remote_code=trust)
            if normalizer and not settings.normalizer:
                raise _refused("--normalizer", "be left out: rows aren't normalized", repr(normalizer))
            settings = replace(settings, normalizer=normalizer or settings.normalizer)
            if settings.normalizer and not os.path.exists(os.path.expanduser(settings.normalizer)):
                remedy = "Give its place by --normalizer."
                raise _refused("the normalizer", "lie where config.yaml says", repr(settings.normalizer), remedy)
            with SpeakingAs(_WHO, "collect"):
                like = str(ds.sources[0].path)
                Collection(settings, like).collect(settings, "tlfast search", progress=False)
        else:
            if response:
                raise _refused("--response", "be left out: examples of this dataset are single texts", repr(response))
            _collect_alike(ds, text, model, normalizer, trust, out)
        made = open_dataset(out)
        if len(made) != 1:
            got, remedy = f"one that makes {len(made)}", "Shorten it; or collect several rows, and use `tlfast score`."
            raise _refused("the text", "make one example", got, remedy)
        yield made


def _settings(ds: Any) -> CollectSettings | None:
    """What `tlfast collect` was told; None where a program of a user's made the dataset."""
    try:
        return load_settings(f"{str(ds.sources[0].path).rstrip('/')}/{CONFIG}")
    except (OSError, ValueError):
        return None


def _known(model: str) -> str:
    try:
        check_model_name(base_and_adapter(model)[0])
    except ValueError as error:
        got = f"{model!r}: {error}"
        raise _refused("the model", "be where the dataset says", got, "Give its place by --model.") from error
    return model


def _given(settings: CollectSettings, folder: Path, text: str, response: str) -> dict[str, Any]:
    """The settings that name the text as the only data."""
    if settings.image_column or settings.audio_column:
        got, remedy = "images or sounds", "Collect queries of these, and use `tlfast score`."
        raise _refused("the dataset", "be of texts", got, remedy)
    if settings.label_column:
        got, remedy = f"labels in {settings.label_column!r}", "Collect queries with labels, and use `tlfast score`."
        raise _refused("the dataset", "be of texts alone", got, remedy)
    has_response = bool(settings.response_column or settings.messages_column)
    if has_response != bool(response):
        rule = "be given: its loss is of responses" if has_response else "be left out: examples are single texts"
        raise _refused("--response", rule, repr(response) if response else "none", "See config.yaml of the dataset.")
    if not settings.dataset:
        place = folder / "query.txt"
        place.write_text(text, encoding="utf-8")
        return _OF_OTHER_DATA | {"text": (str(place),)}
    if settings.messages_column:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": response}]
        record: dict[str, Any] = {settings.messages_column: turns}
    elif settings.response_column:
        record = {settings.prompt_column: text, settings.response_column: response}
    else:
        record = {settings.column: text}
    place = folder / "query.jsonl"
    place.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return _OF_OTHER_DATA | {"dataset": str(place)}


def _collect_alike(ds: Any, text: str, model: str, normalizer: str, trust: bool, out: str) -> None:
    """Collect a text by what dataset.json says, where there are no settings of the command."""
    header = ds.header
    specs, readers = _specs(header), _readers(header, normalizer)
    loss = {said: name for name, said in SAID.items()}.get(str(header.get("loss")))
    if loss is None:
        got, remedy = repr(header.get("loss")), "Collect queries with it, and use `tlfast score`."
        raise _refused("the loss", "be one that has a name", got, remedy)
    if not model:
        said = header.get("model")
        known = said.get("class", "no name") if isinstance(said, Mapping) else "no name"
        got, remedy = f"{known} alone in dataset.json", "Give the model's folder or name by --model."
        raise _refused("the model", "be known", got, remedy)
    name, adapter = base_and_adapter(model)
    check_model_name(name)
    tokenizer = load_tokenizer(name, trust)
    wanted = header.get("tokenizer")
    if isinstance(wanted, Mapping) and wanted.get("fingerprint") not in (None, tokenizer_fingerprint(tokenizer)):
        raise _refused("--model", "have the tokenizer of the dataset", "another", "Give the same model.")
    loaded = load_model(name, _dtype(header), torch.device("cpu"), "", Loading("auto", adapter, trust))
    tokens = tokenizer(text, verbose=False)["input_ids"]
    kept = {key: header[key] for key in ("grad_scale", "calls", "missing") if key in header}
    for k, read in readers.items():
        specs[k] = replace(specs[k], normalizer=_read(read, loaded, specs[k], header["specs"][k]["normalizer"]))
    collect(loaded, [list(tokens)], out, points=specs, loss=loss, progress=False, non_finite="stop", **kept)


def _dtype(header: Mapping[str, Any]) -> torch.dtype | None:
    """What all parameters of the model were in; None where they differed, as the checkpoint has it then."""
    said = header.get("model")
    dtypes = said.get("dtypes") if isinstance(said, Mapping) else None
    return DTYPE_NAMES.get(str(dtypes[0])) if isinstance(dtypes, list) and len(dtypes) == 1 else None


def _specs(header: Mapping[str, Any]) -> list[Spec]:
    """The specs that dataset.json describes."""
    known = {field.name for field in fields(Spec)}
    found = header.get("specs")
    if not isinstance(found, list) or not all(isinstance(said, Mapping) and set(said) <= known for said in found):
        got, remedy = "others", "Collect queries as it was made, and use `tlfast score`."
        raise _refused("the specs", "be in dataset.json, as tlfast.collect says them", got, remedy)
    odd = next((key for said in found for key in ("ref", "queries") if key in said), None)
    if odd is not None:
        remedy = "Collect queries with it, and use `tlfast score`."
        got = "a ref" if odd == "ref" else odd
        raise _refused("the specs", "name no function, and no tensor", got, remedy)
    return [_spec(dict(said)) for said in found]


def _readers(header: Mapping[str, Any], path: str) -> dict[int, Reader]:
    """What reads the normalizers of some specs, by number; ValueError where their file is missing, or isn't wanted."""
    said = {k: spec["normalizer"] for k, spec in enumerate(header["specs"]) if spec.get("normalizer") is not None}
    if said and not path:
        got, remedy = "a digest alone in dataset.json", "Give the file that it was read from by --normalizer."
        raise _refused("the normalizer of the rows", "be known", got, remedy)
    if path and not said:
        raise _refused("--normalizer", "be left out: rows aren't normalized", repr(path))
    with SpeakingAs(_WHO, "collect"):
        return {k: reader_of(path, one["kind"] if path.endswith(".npz") else "auto") for k, one in said.items()}


def _read(read: Reader, model: nn.Module, spec: Spec, said: Mapping[str, Any]) -> Normalizers:
    """The normalizers of a spec; ValueError for others than its rows were made with."""
    with SpeakingAs(_WHO, "collect"):
        made = read(model, spec.bias)
        if describe_spec(model, replace(spec, normalizer=made)).get("normalizer") != dict(said):
            rule, remedy = "hold what the rows were normalized with", "Give the file that it was read from."
            raise _refused("--normalizer", rule, "other numbers", remedy)
    return made


def _spec(said: dict[str, Any]) -> Spec:
    """The spec that `describe_spec` has described, without its normalizers."""
    said.pop("normalizer", None)
    said["dtype"] = DTYPE_NAMES.get(str(said.get("dtype")))
    if not said.get("over"):  # nothing is reduced
        said.pop("over", None)
    if "project" in said:
        said["project"] = Projection.from_json(said["project"])
    return Spec(**said)


def _refused(argument: str, rule: str, got: str, remedy: str = "Leave it out.") -> ValueError:
    return ValueError(broken_rule(_WHO, argument, rule, got, remedy))
