"""All settings of `tlfast collect`, as the command line and config.yaml give them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..dataset.errors import DatasetError, extra
from ..dataset.places.remote import url_of
from ..dataset.places.store import as_store
from ..errors import broken_rule
from ..hooks.options import check_words, taken
from ..spec import DTYPE_NAMES, Over, one_of, parse_over
from .huggingface import as_device_map
from .options import CollectOptions, SharedOptions
from .unit_queue import units_in

_MAX_BYTES = 1 << 20  # of a config.yaml at a URL
RAY: dict[str, Any] = {"ray_workers": 0, "ray_cpus": 1, "ray_gpus": -1}  # what Ray alone reads; unless given


@dataclass(frozen=True)
class TextOptions:
    """What the command alone takes, or takes as other types than the function."""

    model: str
    """folder with a Hugging Face model and its tokenizer, or a name on the hub"""
    text: tuple[str, ...]
    """text files, and folders of them"""
    points: tuple[str, ...]
    """names of modules, or globs: * stays within one part of a dotted name, ** crosses dots"""
    out: str
    """folder of the dataset, or a URL such as s3://bucket/folder: new, empty, or with a part of the same dataset"""
    over: str = "pos"
    """dimensions to reduce: pos, or numbers (-1 is the last), separated by commas"""
    dtype: str = "bfloat16"
    """how rows are stored: float32, bfloat16, float16, float64, or auto for the gradient's own"""
    output: str = ""
    """index or key of the output to take where a module has several; empty: the first tensor"""
    embedding: tuple[str, ...] = ()
    """names of the modules at which the gradients start, where the model's embeddings aren't those"""
    seq_len: int = 128
    """tokens per example"""
    max_examples: int = 0
    """stop at so many examples; 0: all"""
    rows_per_unit: int = 0
    """examples per unit, the piece that is written and resumed whole; 0: those that fill 256 MiB, at most 2048"""
    pattern: str = "*"
    """which file names to read in folders; one with an ending, *.jsonl, takes such files as the text that they are"""
    bos: Literal["auto", "always", "never"] = "auto"
    """put the beginning-of-text token before each example: auto (if the tokenizer does so), always or never"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    device_map: str = ""
    """spread the model over devices: auto, balanced, balanced_low_0, sequential, or JSON, {"module": device, ...}"""
    model_dtype: str = "auto"
    """what the model runs in: auto (the checkpoint's), float32, bfloat16, float16 or float64"""
    staging: str = ""
    """where units lie until they are uploaded, if OUT is a URL; empty: in the user's cache folder"""
    engine: Literal["local", "ray"] = "local"
    """local (this process, or the ranks of torchrun), or ray: tasks on all nodes of a Ray cluster"""
    ray_workers: int = 0
    """tasks that take units under Ray; 0: as many as the cluster has room for now"""
    ray_cpus: int = 1
    """CPU cores, and threads, of each of them"""
    ray_gpus: int = -1
    """GPUs of each of them; -1: one if the cluster has any and --device isn't cpu"""


@dataclass(frozen=True)
class CollectSettings(SharedOptions, TextOptions):
    """Run a causal language model over text and keep the gradient of every example at some points."""

    @property
    def dims(self) -> Over:
        """``over`` as `Spec` takes it."""
        parts = [part.strip() for part in self.over.split(",")]
        return [int(part) if part.lstrip("+-").isdigit() else part for part in parts]

    @property
    def which_output(self) -> int | str | None:
        """``output`` as `Spec` takes it."""
        return int(self.output) if self.output.lstrip("-").isdigit() else self.output or None

    def to_options(self, **more: Any) -> CollectOptions:
        """These settings as the function takes them, with what the command line doesn't say."""
        given = taken(SharedOptions, self)
        if self.lens and self.calls == "raise":
            given["calls"] = "sum"  # as TransformerLens' own capture
        return CollectOptions(
            **given,
            points=self.points,
            over=self.dims,
            dtype=stored_as(self.dtype),
            output=self.which_output,
            embedding=self.embedding or None,
            seq_len=self.seq_len,
            rows_per_unit=self.rows_per_unit or None,
            staging=self.staging or None,
            **more,
        )

    def check(self) -> None:
        """ValueError for the first setting that can be seen to be wrong without reading a file."""
        who = "collect"
        check_words(who, self)
        if 0 in parse_over(who, self.dims) and self.reduce != "none":
            remedy = "Reduce the batch when reading, or use capture."
            raise ValueError(broken_rule(who, "over", "keep the batch: a row is an example", repr(self.over), remedy))
        one_of(who, "dtype", self.dtype, (*DTYPE_NAMES, "auto"))
        one_of(who, "model_dtype", self.model_dtype, (*DTYPE_NAMES, "auto"))
        for argument, least in (
            ("seq_len", 2),
            ("batch_tokens", 1),
            ("max_examples", 0),
            ("rows_per_unit", 0),
            ("disk_wait_s", 0),
            ("ray_workers", 0),
            ("ray_cpus", 1),
            ("ray_gpus", -1),
        ):
            if getattr(self, argument) < least:
                got = getattr(self, argument)
                raise ValueError(broken_rule(who, argument, f"be at least {least}", got, "Give a larger one."))
        for argument, default in RAY.items():
            if self.engine != "ray" and getattr(self, argument) != default:
                got, remedy = f"{getattr(self, argument)} with engine {self.engine!r}", "Or --engine ray."
                raise ValueError(broken_rule(who, argument, "be left out without Ray", got, remedy))
        units_in(self.units, 0)
        if self.device_map and self.device != "auto":
            got = f"{self.device!r} with device_map {self.device_map!r}"
            raise ValueError(broken_rule(who, "device", "be auto where device_map is given", got, "Leave one out."))
        if self.device_map:
            as_device_map(self.device_map)
        for argument in ("text", "points"):
            if not getattr(self, argument):
                raise ValueError(broken_rule(who, argument, "name one at least", "nothing", f"Give --{argument}."))

    def to_yaml(self, first_line: str) -> str:
        """The text of config.yaml, which `load_settings` reads.

        Paths are absolute. ``out`` is left out, since that is where the file lies, and so are ``overwrite``,
        ``extend``, ``resume``, ``units`` and what engine it was, so that a replay continues and completes the dataset,
        and ``staging``, which belongs to one machine.
        """
        values: dict[str, Any] = asdict(self) | {
            "text": [os.path.abspath(os.path.expanduser(path)) for path in self.text],
            "points": list(self.points),
            "embedding": list(self.embedding),
        }
        if Path(self.model).expanduser().is_dir():
            values["model"] = os.path.abspath(os.path.expanduser(self.model))
        for name in ("out", "overwrite", "extend", "resume", "staging", "units", "engine", *RAY):
            del values[name]
        if not self.embedding:
            del values["embedding"]
        text = str(extra("yaml", "tlfast collect").safe_dump(values, sort_keys=False, allow_unicode=True))
        return f"# {first_line}\n{text}"


def stored_as(name: str) -> torch.dtype | None:
    """The dtype called ``name``; None for "auto"."""
    return DTYPE_NAMES.get(name)


def load_settings(path: str | os.PathLike[str]) -> CollectSettings:
    """Read a config.yaml, a path or a URL; without ``out`` the dataset is the folder it lies in.

    Raises:
        ValueError: for a file that is missing, no YAML, or has other keys or types than the settings.
    """
    yaml = extra("yaml", "tlfast collect")
    who = "collect"
    try:
        values = yaml.safe_load(_text(path))
    except (OSError, DatasetError, UnicodeDecodeError, yaml.YAMLError) as error:
        got = f"{str(path)!r}: {error}"
        raise ValueError(broken_rule(who, "config", "be a readable YAML file", got, "Check the path.")) from error
    if values is None:
        rule, got = "hold the settings of a run of the command", f"an empty file, {str(path)!r}"
        remedy = "The dataset was made by tlfast.collect(...): call it again, as it was."
        raise ValueError(broken_rule(who, "config", rule, got, remedy))
    if not isinstance(values, Mapping):
        got = f"{type(values).__name__} in {str(path)!r}"
        raise ValueError(broken_rule(who, "config", "be a mapping", got, "Write one setting per line."))
    known = {field.name: field for field in fields(CollectSettings)}
    unknown = [str(name) for name in values if name not in known]
    if unknown or not {"model", "text", "points"} <= set(values):
        got = f"unknown {', '.join(unknown)}" if unknown else f"only {', '.join(map(str, values)) or 'nothing'}"
        rule = "hold model, text, points and other settings of `tlfast collect`"
        raise ValueError(broken_rule(who, "config", rule, f"{got} in {str(path)!r}", "See tlfast collect --help."))
    plain = CollectSettings("", (), (), "")
    given: dict[str, Any] = {"out": os.path.dirname(path) or "."}
    for name, value in values.items():
        given[name] = _typed(name, value, type(getattr(plain, name)), path)
    return replace(plain, **given)


def _text(path: str | os.PathLike[str]) -> str:
    folder, name = os.path.split(path)
    return as_store(folder).read(name, "collect", _MAX_BYTES).decode() if url_of(path) else Path(path).read_text()


def _typed(name: str, value: Any, kind: type, path: str | os.PathLike[str]) -> Any:
    if kind is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items)
    elif kind is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)  # over: -1 and output: 0 are numbers to YAML
    elif name == "cuda_graph" and isinstance(value, bool):
        return "on" if value else "off"  # so YAML reads these words
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    rule = f"be {'a list of text' if kind is tuple else kind.__name__}"
    raise ValueError(broken_rule("collect", name, rule, f"{value!r} in {str(path)!r}", "Correct the file."))
