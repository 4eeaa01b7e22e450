"""All settings of `tlfast collect`, as the command line and config.yaml give them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ..dataset.errors import DatasetError, extra
from ..dataset.places.remote import url_of
from ..dataset.places.store import as_store
from ..dataset.read.conditions import Condition
from ..errors import broken_rule
from ..hooks.options import check_words, taken
from ..projections.projection import Projection
from ..spec import (
    DTYPE_NAMES,
    ENCODINGS,
    At,
    Encoding,
    Heads,
    Over,
    Project,
    as_heads,
    check_summed,
    check_weight,
    one_of,
    parse_over,
    sources_of,
)
from .huggingface import as_device_map
from .normalizer_files import NormalizerKind
from .options import CollectOptions, SharedOptions
from .tokenizing import Columns
from .unit_queue import units_in

_MAX_BYTES = 1 << 20  # of a config.yaml at a URL
# Of which examples are made.
COLUMNS = ("column", "prompt_column", "response_column", "messages_column", "image_column", "audio_column")
_TOGETHER = (
    ["column"], ["prompt_column", "response_column"], ["messages_column"], ["image_column"], ["audio_column"],
    ["response_column", "audio_column"],
)  # fmt: skip
SEQ_LEN = 128  # tokens per example of text, unless given
NEVER_SAVED = ("trust_remote_code", "dry_run")  # a file of somebody else must not decide these
RAY: dict[str, Any] = {"ray_workers": 0, "ray_cpus": 1, "ray_gpus": -1}  # what Ray alone reads; unless given


REQUIRED = ("model", "text", "points", "out")  # which flags there must be; --dataset stands for --text


@dataclass(frozen=True)
class DataOptions:
    """Where the command takes its examples from, and what they are made of."""

    model: str = ""
    """folder with a Hugging Face model and its tokenizer, or a PEFT adapter of one, or a name on the hub; required"""
    text: tuple[str, ...] = ()
    """text files, and folders of them; required, or --dataset"""
    points: tuple[str, ...] = ()
    """names of modules, or globs: * stays within one part of a dotted name, ** crosses dots; required"""
    out: str = ""
    """folder of the dataset, or a URL such as s3://bucket/folder: new, empty, or with a part of the same; required"""
    dataset: str = ""
    """records: a file (JSONL, JSON, CSV, Parquet, Arrow, text), a folder of such or of save_to_disk, or a hub name"""
    split: str = ""
    """which split of it"""
    name: str = ""
    """which configuration of a data set on the hub"""
    column: str = ""
    """a column of texts, or of lists of tokens: an example each"""
    prompt_column: str = ""
    """a column of texts before those of --response-column, which the loss leaves out, or the encoder reads"""
    response_column: str = ""
    """a column of texts that the loss is of"""
    messages_column: str = ""
    """a column of conversations: the chat template makes the text, the loss is of the assistant's turns"""
    image_column: str = ""
    """a column of images (their files' bytes, or paths), for models of images; of a folder of images it is image"""
    audio_column: str = ""
    """a column of sounds, likewise, for models of sound, perhaps with --response-column; of a folder it is audio"""
    label_column: str = ""
    """a column of labels: of each example, or of each of its tokens"""
    keep_fields: tuple[str, ...] = ()
    """columns that the row table keeps: numbers, texts, short lists"""
    filter: str = ""
    """take the records alone for which it holds: "length > 10 and score < 3"; length is the number of tokens"""
    batch_examples: int = 0
    """examples in a batch, at most; 0: as many as --batch-tokens allows, 16 images or sounds"""
    truncate: bool = False
    """cut examples that are too long, in place of leaving them out"""
    pack: bool = False
    """put several examples into one, up to --seq-len; each has positions of its own, and sees no other"""
    eos: Literal["auto", "always", "never"] = "auto"
    """put the end-of-text token behind a response: auto (if there is one); always: behind each example; never"""
    loss: str = ""
    """a name (next_token, response, masked_lm, classification, seq2seq, ...), or module:function; empty: what fits"""
    task: Literal[
        "auto", "causal", "masked", "sequence-classification", "token-classification", "seq2seq",
        "image-classification", "audio-classification", "speech-seq2seq",
    ] = "auto"  # fmt: skip
    """what the model is loaded for; auto: as its config says, causal where it doesn't"""
    adapter: str = ""
    """folder or name of a PEFT adapter to put into the model"""
    trust_remote_code: bool = False
    """run the code that lies beside the model; no config.yaml says so, it must be given each time"""
    dry_run: bool = False
    """show what would be collected, and how long it would take; write nothing"""


@dataclass(frozen=True)
class TextOptions(DataOptions):
    """What else the command alone takes, or takes as other types than the function."""

    over: str = "pos"
    """dimensions to reduce: pos, or numbers (-1 is the last), separated by commas"""
    of: str = "grad"
    """what the rows are of: grad, act (the activation), grad*act (their product), grad*ref or weight, by commas"""
    ref: str = ""
    """module:function, of the batch: gives the tensor, or one for each point, that grad*ref multiplies with"""
    heads: str = ""
    """N,D: the last dimension, of N * D, is taken as [N, D]"""
    at: str = ""
    """positions to keep: numbers (-1 is the last token), separated by commas, or the field of the examples with them"""
    dtype: str = "bfloat16"
    """how rows are stored: float32, bfloat16, float16, float64, or auto for the gradient's own"""
    project: str = ""
    """of --of weight: the size of each side of a projected gradient, 16, or settings, dim=16,kind=normal,seed=1"""
    bias: bool = False
    """of --of weight: with the gradient of the bias, where a module has one"""
    normalizer: str = ""
    """of --of weight: divide gradients by the root of second moments, before they are projected: a .npz file of tlfast
    factors --kinds adam, or the optimizer.pt of a checkpoint, or bergson's normalizers.pth, or the folder of these"""
    normalizer_kind: NormalizerKind = "auto"
    """adam or adafactor (rows and columns of the moments), for which a .npz file has both; auto: adam of a .npz file,
    else what the file has"""
    summed: bool = False
    """of --of weight and a projection with form=one-sided: the rows of all points added up, in one column"""
    encoding: str = ""
    """store rows in low precision: int8, int8:64, float8_e4m3fn or int4:64, also rounded at random
    (int8:stochastic, see docs/format.md); empty: by --dtype"""
    output: str = ""
    """index or key of the output to take where a module has several; empty: the first tensor"""
    embedding: tuple[str, ...] = ()
    """names of the modules at which the gradients start, where the model's embeddings aren't those"""
    seq_len: int = 0
    """tokens per example, at most; 0: 128 of text, as many as the model has positions of a --dataset"""
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
    """Run a model over text or records and keep the gradient of every example at some points."""

    @property
    def text_len(self) -> int:
        """Tokens per example of text."""
        return self.seq_len or SEQ_LEN

    @property
    def dims(self) -> Over:
        """``over`` as `Spec` takes it."""
        parts = [part.strip() for part in self.over.split(",")]
        return [int(part) if part.lstrip("+-").isdigit() else part for part in parts]

    @property
    def n_heads(self) -> Heads | None:
        """``heads`` as `Spec` takes it."""
        if not self.heads:
            return None
        parts = [part.strip() for part in self.heads.split(",")]
        return as_heads("collect", [int(part) if part.isdigit() else part for part in parts])

    @property
    def positions(self) -> At | None:
        """``at`` as `Spec` takes it: one number is a position, others are a list."""
        parts = [part.strip() for part in self.at.split(",")]
        if not all(part.lstrip("+-").isdigit() for part in parts):
            return self.at or None
        return [int(part) for part in parts] if len(parts) > 1 else int(parts[0])

    @property
    def projection(self) -> Project | None:
        """``project`` as `Spec` takes it: a number, or the settings of a `Projection`."""
        parts = [part.strip().partition("=") for part in self.project.split(",") if part.strip()]
        if not parts:
            return None
        said = {"dim" if not mark else name.strip(): value.strip() if mark else name for name, mark, value in parts}
        return Projection.from_json({name: int(v) if v.lstrip("-").isdigit() else v for name, v in said.items()})

    @property
    def stored_encoding(self) -> Encoding | None:
        """``encoding`` as `Spec` takes it."""
        return cast(Encoding, self.encoding) if self.encoding else None

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
            of=self.of,
            over=self.dims,
            dtype=stored_as(self.dtype),
            output=self.which_output,
            heads=self.n_heads,
            at=self.positions,
            encoding=self.stored_encoding,
            project=self.projection,
            bias=self.bias,
            summed=self.summed,
            embedding=self.embedding or None,
            seq_len=(self.seq_len or None) if self.dataset else self.text_len,
            rows_per_unit=self.rows_per_unit or None,
            staging=self.staging or None,
            **{"batch_examples": self.batch_examples or None, **more},
        )

    def describe_data(self) -> dict[str, Any]:
        """What a dataset says of how its examples were cut, beside what they are."""
        if not self.dataset:
            return {"seq_len": self.text_len, "bos": self.bos} | {
                name: getattr(self, name) for name in ("filter", "pack") if getattr(self, name)
            }
        names = ("split", "name", *COLUMNS, "label_column", "filter", "truncate", "pack", "eos", "seq_len")
        plain = DataOptions()
        said = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name, 0)}
        return {"bos": self.bos, **said}

    def check(self) -> None:
        """ValueError for the first setting that can be seen to be wrong without reading a file."""
        who = "collect"
        check_words(who, self)
        if ("grad*ref" in sources_of(who, self.of, self.reduce)) != bool(self.ref):
            rule, got = "be given with --of grad*ref, and with that alone", repr(self.ref)
            raise ValueError(broken_rule(who, "ref", rule, got, "Name a function of the batch: module:function."))
        if self.encoding:
            one_of(who, "encoding", self.encoding, ENCODINGS)
        if 0 in parse_over(who, self.dims) and self.reduce != "none":
            remedy = "Reduce the batch when reading, or use capture."
            raise ValueError(broken_rule(who, "over", "keep the batch: a row is an example", repr(self.over), remedy))
        _ = self.n_heads  # which looks at it
        self._check_weight(who)
        one_of(who, "dtype", self.dtype, (*DTYPE_NAMES, "auto"))
        one_of(who, "model_dtype", self.model_dtype, (*DTYPE_NAMES, "auto"))
        for argument, least in (
            ("text_len", 2),
            ("batch_tokens", 1),
            ("max_examples", 0),
            ("batch_examples", 0),
            ("rows_per_unit", 0),
            ("disk_wait_s", 0),
            ("ray_workers", 0),
            ("ray_cpus", 1),
            ("ray_gpus", -1),
        ):
            if getattr(self, argument) < least:
                got, name = getattr(self, argument), {"text_len": "seq_len"}.get(argument, argument)
                raise ValueError(broken_rule(who, name, f"be at least {least}", got, "Give a larger one."))
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
        check_data(self)
        if not self.points:
            raise ValueError(broken_rule(who, "points", "name one at least", "nothing", "Give --points."))

    def _check_weight(self, who: str) -> None:
        sources = sources_of(who, self.of, self.reduce)
        check_weight(who, sources, self.projection, self.bias, self.normalizer or None, self.summed)
        if self.normalizer_kind != "auto" and not self.normalizer:
            rule, remedy = "be left out without normalizer", "Give --normalizer FILE."
            raise ValueError(broken_rule(who, "normalizer_kind", rule, repr(self.normalizer_kind), remedy))
        reduce = "norm" if self.reduce == "norm" else "none"  # others are those of other rows
        check_summed(who, self.summed, self.projection, reduce, self.per, self.n_heads)

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
            "keep_fields": list(self.keep_fields),
            "seq_len": self.seq_len if self.dataset else self.text_len,
        }
        for name in ("model", "dataset", "adapter", "normalizer"):
            if values[name] and Path(values[name]).expanduser().exists():
                values[name] = os.path.abspath(os.path.expanduser(values[name]))
        for name in ("out", "overwrite", "extend", "resume", "staging", "units", "engine", *RAY, *NEVER_SAVED):
            del values[name]
        defaults = DataOptions()
        for field in fields(DataOptions):  # what has to do with other data than these
            if field.name in values and values[field.name] in (getattr(defaults, field.name), []):
                del values[field.name]
        for name in ("embedding", "ref", "heads", "at", "project", "bias", "normalizer", "summed"):
            if not values[name]:
                del values[name]
        if self.normalizer_kind == "auto":
            del values["normalizer_kind"]
        text = str(extra("yaml", "tlfast collect").safe_dump(values, sort_keys=False, allow_unicode=True))
        return f"# {first_line}\n{text}"


def columns_of(settings: CollectSettings) -> Columns:
    """The columns of records that settings name."""
    return Columns(
        settings.column, settings.prompt_column, settings.response_column, settings.messages_column,
        settings.label_column, settings.keep_fields, settings.image_column, settings.audio_column,
    )  # fmt: skip


def check_data(settings: CollectSettings) -> None:
    """ValueError for settings of the data that don't go together, or are for other data."""
    who = "collect"
    if bool(settings.text) == bool(settings.dataset):
        got = "both" if settings.text else "nothing"
        remedy = "Give --text, or --dataset with the columns to take."
        raise ValueError(broken_rule(who, "text", "name one at least, or dataset in its place", got, remedy))
    plain = DataOptions()
    given = [field.name for field in fields(DataOptions) if getattr(settings, field.name) != getattr(plain, field.name)]
    of_records = ("split", "name", *COLUMNS, "label_column", "keep_fields", "truncate", "eos")
    of_media = settings.image_column or settings.audio_column
    odd = next((name for name in given if settings.text and name in of_records), None)
    if odd is not None:
        got, remedy = repr(getattr(settings, odd)), "It is for --dataset."
        raise ValueError(broken_rule(who, odd, "be left out with text", got, remedy))
    named = [name for name in COLUMNS if name in given]
    if settings.dataset and named not in _TOGETHER:
        rule = "be --column, --prompt-column and --response-column, --messages-column, --image-column or --audio-column"
        got = ", ".join("--" + name.replace("_", "-") for name in named) or "none"
        raise ValueError(broken_rule(who, "the columns", rule, got, "Say which columns examples are made of."))
    if settings.label_column and named not in (["column"], ["image_column"], ["audio_column"]):
        rule, remedy = "stand beside --column, --image-column or --audio-column", "A response is a label itself."
        raise ValueError(broken_rule(who, "label_column", rule, settings.label_column, remedy))
    of_texts = ("seq_len", "bos", "eos", "pack", *(["truncate"] if settings.image_column else []))
    odd = next((n for n in of_texts if of_media and getattr(settings, n) != getattr(CollectSettings, n)), None)
    if odd is not None:
        got, remedy = repr(getattr(settings, odd)), "It is for text."
        raise ValueError(broken_rule(who, odd, "be left out with images and sounds", got, remedy))
    if settings.batch_examples and settings.pack:
        remedy = "A pack is an example."
        raise ValueError(broken_rule(who, "batch_examples", "be left out with pack", settings.batch_examples, remedy))
    if settings.dataset and settings.pattern != "*":
        raise ValueError(broken_rule(who, "pattern", "be left out with dataset", repr(settings.pattern), "Name files."))
    if settings.filter:
        Condition(settings.filter, who)
    for name in ("keep_fields", "label_column") if settings.pack else ():
        if getattr(settings, name):
            remedy = "Several examples have several of them."
            raise ValueError(broken_rule(who, name, "be left out with pack", repr(getattr(settings, name)), remedy))
    if settings.pack and settings.loss and ":" not in settings.loss and settings.loss != "response":
        rule, remedy = "be response with pack, or a function", "Leave it out: all tokens of a text are its response."
        raise ValueError(broken_rule(who, "loss", rule, repr(settings.loss), remedy))


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
    if unknown or not {"model", "points"} <= set(values) or not {"text", "dataset"} & set(values):
        got = f"unknown {', '.join(unknown)}" if unknown else f"only {', '.join(map(str, values)) or 'nothing'}"
        rule = "hold model, text, points and other settings of `tlfast collect`"
        raise ValueError(broken_rule(who, "config", rule, f"{got} in {str(path)!r}", "See tlfast collect --help."))
    plain = CollectSettings()
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
