"""`tlfast collect`: from settings to a dataset, by way of a Hugging Face model, and text files or records."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..dataset.format.plan import Example
from ..dataset.places.remote import url_of
from ..dataset.read.conditions import Condition
from ..dataset.read.decoding import tokenizer_fingerprint
from ..errors import broken_rule
from ..hooks.points import find_points
from .begun_examples import Ways, continues
from .chat import check_template
from .checks import positions_of, said_positions
from .data_files import DataFiles
from .determinism import prepare_cuda
from .huggingface import (
    Loading,
    base_and_adapter,
    beginning_of_text,
    check_model_name,
    encoder,
    load_model,
    load_tokenizer,
    pick_device,
    portable_name,
    response_encoder,
)
from .loss import accepted_names
from .losses import loss_called, name_of
from .media import Processor, decoded_by, kind_of
from .media_examples import MediaExamples
from .normalizer_files import reader_of
from .packing import check_packs, packs
from .progress import Report
from .records import HubRecords, Record, files_of, media_of, on_hub, read_records
from .resume import (
    check_folder,
    existing_folder,
    packs_as_begun,
    records_as_begun,
)
from .run import Run
from .settings import COLUMNS, CollectSettings, columns_of, stored_as
from .skipped import BadExamples
from .stored_examples import MadeAnew, Origin
from .tasks import (
    CAUSAL,
    CLASSIFIER,
    MASKED,
    SEQ2SEQ,
    check_task,
    has_own_ends,
    task_of,
    unwrapped,
)
from .text import TextFile, check_plain, find_text_files, texts
from .tokenizing import Tokenizing

_MOST_HASHED = 1 << 30  # bytes of data, a second or two, of which --max-examples may take but the first


def collect_text(settings: CollectSettings, made_by: str) -> Report:
    """Collect the gradients that ``settings`` ask for; cheap checks first, the model last.

    ``made_by`` becomes the first line of config.yaml, a comment.

    Raises:
        ValueError: for bad settings, before the model runs.
        KeyboardInterrupt, Terminated: as `collect`.
    """
    return Collection(settings).collect(settings, made_by)


class Collection:
    """The model and the examples of a run, loaded once: `collect` takes them through as often as it is called."""

    def __init__(self, settings: CollectSettings, like: str = "") -> None:
        """Cheap checks first, the model last.

        The examples are made as those of the dataset in the folder ``like``; "": as those of ``out``, where that has
        any, else as today.
        """
        settings.check()
        check_folder(settings.out, settings.resume, settings.overwrite, settings.staging or None)
        self._like, goes_on = like, bool(like) or continues(settings)
        name, adapter = base_and_adapter(settings.model, settings.adapter)
        check_model_name(name)
        self.device = device = pick_device(settings.device)
        files = _text_files(settings)
        loss = loss_called(imported(settings.loss)) if settings.loss else None
        self.ref: Any = imported(settings.ref, "ref") if settings.ref else None
        read = reader_of(settings.normalizer, settings.normalizer_kind) if settings.normalizer else None
        if device.type == "cuda":
            prepare_cuda()
        kind = kind_asked(settings)
        reads = kind == "text" or settings.response_column
        self.tokenizer: Any = load_tokenizer(name, settings.trust_remote_code) if reads else None
        loading = Loading(settings.task, adapter, settings.trust_remote_code)
        model = load_model(name, stored_as(settings.model_dtype), device, settings.device_map, loading)
        if settings.lens:
            from ..transformer_lens.loading import as_bridge
            from ..transformer_lens.names import find_names

            check_fits(model, settings, goes_on)
            model = as_bridge(model)
            find_names("collect", model, settings.points)
        else:
            find_points("collect", model, settings.points)  # a wrong glob is found before a long text is cut
            check_fits(model, settings, goes_on)
        self.normalizer: Any = None if read is None else read(model, settings.bias)
        check_kind(model, settings, kind)
        if not goes_on:
            check_texts(model, settings)
        self.bad = BadExamples(settings.bad_examples)
        self.model: nn.Module = model
        self.loss: Any = fitting_loss(settings, model) if loss is None else loss
        self._made_by: Tokenizing | MediaExamples | None = None
        self._name = name
        self.examples = self._made(settings, files)
        if settings.pack:
            self.examples = self._packed(settings, self.examples)
            check_packs(self.model, self.examples)
        check_labels(self.model, settings, self.loss)

    def _packed(self, settings: CollectSettings, examples: Any, earlier: bool = False) -> MadeAnew:
        """The examples in packs; of a data set as long as one may be, now or by what earlier versions took for it."""
        longest = self._ways(settings).longest(earlier) if settings.dataset else settings.text_len
        if task_of(self.model) not in (None, CAUSAL) or longest is None:
            got = f"{type(self.model).__name__}, {task_of(self.model) or 'of unknown length: give --seq-len'}"
            remedy = "Leave it out."
            raise ValueError(broken_rule("collect", "pack", "be for a causal language model", got, remedy))
        origin = getattr(examples, "origin", None)
        if origin is not None:
            origin = replace(origin, how={**origin.how, "pack": longest})
        # Without labels of the data each text is its own: what a loss that has its own way makes nothing of.
        ours = () if columns_of(settings).makes_labels else ("labels",)
        before = getattr(examples, "earlier", None)
        then = None if before is None else lambda: self._packed(settings, before(), earlier=True)
        return MadeAnew(partial(packs, examples, longest), origin, ours, then)

    @property
    def unused(self) -> list[str]:
        """Columns of the data that nobody asks for; known once they were read."""
        return [] if self._made_by is None else self._made_by.unused

    def examples_of(self, settings: CollectSettings) -> MadeAnew | MediaExamples:
        """The examples of other data, by the same model and what prepares its inputs."""
        return self._made(settings, _text_files(settings))

    def _made(self, settings: CollectSettings, files: Sequence[TextFile]) -> MadeAnew | MediaExamples:
        if kind_asked(settings) != "text":
            self._made_by = made = self._media(settings, self._name)
            return made
        return self._records(settings) if settings.dataset else self._texts(settings, files)

    def _texts(self, settings: CollectSettings, files: Sequence[TextFile]) -> MadeAnew:
        most = settings.max_examples or None
        how: dict[str, Any] = {
            "seq_len": settings.text_len,
            "first": list(beginning_of_text(self.tokenizer, settings.bos)),
        }

        def examples() -> Iterator[Any]:
            self.bad.forget()
            found = texts(
                files, encoder(self.tokenizer), **how, max_examples=None if settings.filter else most, bad=self.bad
            )
            return filtered(found, settings.filter, most) if settings.filter else found

        named = [(file.source, file.path) for file in files]
        return MadeAnew(examples, self._origin(settings, named, how, []))

    def _origin(
        self, settings: CollectSettings, files: Sequence[tuple[str, Path]] | None, how: dict[str, Any], notes: list[str]
    ) -> Origin | None:
        """What the examples are made of; None where that can't be known, or would take too long to find out."""
        tokenizer = self.tokenizer
        known = getattr(tokenizer, "is_fast", False) and type(tokenizer).__module__.startswith("transformers.")
        if files is None or not (known or tokenizer is None):
            return None
        there = DataFiles(files)
        if settings.max_examples and there.n_bytes > _MOST_HASHED:
            return None
        how = how | {
            "tokenizer": None if tokenizer is None
            else [repr(tokenizer), tokenizer_fingerprint(tokenizer), tokenizer.chat_template],
            "max_examples": settings.max_examples, "filter": settings.filter, "bad_examples": settings.bad_examples,
        }  # fmt: skip
        return Origin(there, how, self.bad, notes)

    @property
    def _label_ids(self) -> dict[str, int] | None:
        labels = getattr(getattr(self.model, "config", None), "label2id", None)
        return labels if isinstance(labels, dict) else None

    def _media(self, settings: CollectSettings, name: str) -> MediaExamples:
        columns, place = columns_of(settings), settings.dataset
        takes, most = accepted_names(self.model), settings.max_examples or None
        processor = Processor(
            name, columns.kind, self.model, takes, settings.truncate, settings.trust_remote_code  # type: ignore[arg-type]
        )  # fmt: skip
        config = getattr(self.model, "config", None)
        root, here = Path(place).expanduser(), existing_folder(settings.out) if not url_of(settings.out) else None
        hub = on_hub(place, settings.name, settings.split)

        def records() -> Iterator[Record]:
            return read_records(place, self.bad, settings.name, settings.split, (), made.wanted, columns.kind, hub=hub)

        made = MediaExamples(
            columns, records, processor, self.bad, root if root.is_dir() else root.parent, self._label_ids or {},
            response_encoder(self.tokenizer, self.model) if columns.response else None,
            getattr(config, "max_target_positions", None), settings.filter, most, here, place,
        )  # fmt: skip
        made.origin = self._media_origin(settings, made, hub)
        return made

    def _media_origin(self, settings: CollectSettings, made: MediaExamples, hub: HubRecords | None) -> Origin | None:
        """What images or sounds are made of, but for the bytes of files with a path, which they know themselves."""
        told, names = made.processor.told(), media_of(settings.dataset, made.columns.kind, settings.split)
        if told is None:
            return None
        listed = "" if names is None else hashlib.sha256(json.dumps(names).encode()).hexdigest()
        how: dict[str, Any] = {
            "processor": told, "decoded_by": decoded_by(), "columns": asdict(made.columns), "names": listed,
            "root": str(made.root.absolute()), "label_ids": made.label_ids, "longest": made.longest,
            "split": settings.split, "name": settings.name,
            "first": getattr(getattr(self.model, "config", None), "decoder_start_token_id", None),
        }  # fmt: skip
        files = files_of(settings.dataset, settings.split, hub) if names is None else []
        return self._origin(settings, files, how, made.unused)

    def _ways(self, settings: CollectSettings) -> Ways:
        return Ways(settings, self.model, self.tokenizer, self._like)

    def _records(self, settings: CollectSettings, earlier: bool = False) -> MadeAnew:
        """The examples of records, made as today or as earlier versions did."""
        columns = columns_of(settings)
        if columns.messages:
            check_template(self.tokenizer)
        ways, as_earlier = self._ways(settings), None
        way = ways.way(earlier)
        if not earlier and way != ways.way(earlier=True):
            as_earlier = partial(self._records, settings, earlier=True)
        of_whole = way.pop("of_whole")
        how: dict[str, Any] = {**way, "truncate": settings.truncate, "label_ids": self._label_ids}
        task = task_of(self.model)
        tokenizing = Tokenizing(
            columns, self.tokenizer, task, self.bad, condition=settings.filter, place=settings.dataset, **how
        )
        self._made_by = self._made_by if earlier else tokenizing
        tokenizing.of_whole = of_whole
        strict = settings.overwrite or settings.extend or not records_as_begun(settings.out)
        hub = on_hub(settings.dataset, settings.name, settings.split)
        files = files_of(settings.dataset, settings.split, hub)
        how |= {
            "columns": asdict(columns),
            "task": task,
            "of_whole": of_whole,
            "split": settings.split,
            "name": settings.name,
        }

        def examples() -> Iterator[Any]:
            self.bad.forget()
            records = read_records(
                settings.dataset, self.bad, settings.name, settings.split, columns.texts, tokenizing.wanted,
                strict=strict, hub=hub,
            )  # fmt: skip
            return tokenizing.together(records, settings.max_examples or None)

        return MadeAnew(examples, self._origin(settings, files, how, tokenizing.unused), earlier=as_earlier)

    def run(
        self, settings: CollectSettings, made_by: str, progress: bool = True, share: tuple[int, int] | None = None
    ) -> Run:
        """The run of these settings, which differ from those loaded in units, out or the like at most."""
        tokenizer = self.tokenizer
        adapter = {"adapter": portable_name(settings.adapter)} if settings.adapter else {}
        read_by = {} if tokenizer is None else {
            "tokenizer": {"class": type(tokenizer).__name__, "fingerprint": tokenizer_fingerprint(tokenizer)}
        }  # fmt: skip
        packed = {"batch_examples": packs_as_begun(settings.out, settings.overwrite)} if settings.pack else {}
        options = settings.to_options(
            loss=self.loss,
            ref=self.ref,
            normalizer=self.normalizer,
            keep_fields=settings.keep_fields,
            pad_id=getattr(tokenizer, "pad_token_id", None) or 0,
            share=share,
            skipped=self.bad,
            progress=progress,
            header={
                "model": {"name": portable_name(settings.model)} | adapter,
                **read_by,
                "text": settings.describe_data(),
            },
            config=settings.to_yaml(f"{made_by}, {settings.device_map or self.device}"),
            **packed,
        )
        return Run(self.model, self.examples, settings.out, options)

    def collect(
        self, settings: CollectSettings, made_by: str, progress: bool = True, share: tuple[int, int] | None = None
    ) -> Report:
        """`tlfast.collect` with these settings."""
        run = self.run(settings, made_by, progress, share)
        return run.collect([f"columns that are not used: {', '.join(self.unused)}"] if self.unused else [])


def _text_files(settings: CollectSettings) -> list[TextFile]:
    if not settings.text:
        return []
    files = find_text_files(settings.text, settings.pattern)
    if not any(file.path.stat().st_size for file in files):
        got = f"{len(files)} empty file{'s' * (len(files) != 1)}"
        raise ValueError(broken_rule("collect", "text", "hold text", got, "Give files with something in them."))
    if settings.extend or not continues(settings):
        check_plain(files, settings.pattern)
    return files


def filtered(examples: Iterable[Example], text: str, most: int | None = None) -> Iterator[Example]:
    """Yield the examples for which a condition on ``length``, ``source`` and ``start`` holds, numbered anew.

    All are gone through, also behind the first ``most`` of them: so what is bad is told, whatever is taken.

    Raises:
        ValueError: where none is left.
    """
    condition = Condition(text, "collect")
    condition.check_names(["length", "source", "start"])
    n_all = n = 0
    for n_all, e in enumerate(examples, 1):  # noqa: B007 (it is told below)
        if n != most and condition({"length": e.length, "source": e.source, "start": e.start}):
            yield replace(e, id=n)
            n += 1
    if not n:
        got = f"{text!r} with {n_all} examples"
        raise ValueError(broken_rule("collect", "filter", "leave an example at least", got, "Ask for less."))


def imported(given: str, argument: str = "loss") -> Any:
    """What a text names: of a loss its name; or what is called so in a module, which may lie in the working folder.

    Raises:
        ValueError: where there is no such module, or nothing in it that can be called.
    """
    module, colon, name = given.partition(":")
    if not colon and argument == "loss":
        return given
    rule = "be a name, or module:function" if argument == "loss" else "be module:function"
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        got, remedy = f"{given!r}: {error}", "Modules are looked for in the working folder, and where Python does."
        raise ValueError(broken_rule("collect", argument, rule, got, remedy)) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(
            broken_rule("collect", argument, rule, f"a {type(found).__name__}, {given!r}", "Name a function.")
        )
    return found


def kind_asked(settings: CollectSettings) -> str:
    """What the examples are of: "text", "image" or "audio"."""
    return columns_of(settings).kind


def check_kind(model: nn.Module, settings: CollectSettings, kind: str) -> None:
    """ValueError for examples of another kind than the model reads."""
    reads = kind_of(unwrapped(model))
    if reads != kind:
        got = (
            "--text"
            if settings.text
            else "--" + next(n for n in reversed(COLUMNS) if getattr(settings, n)).replace("_", "-")
        )
        flags = {"text": "--text, or --column and others of text", "image": "--image-column", "audio": "--audio-column"}
        rule = f"be {flags[reads]} for {type(unwrapped(model)).__name__}, which reads {main_input(model)}"
        raise ValueError(broken_rule("collect", "the columns", rule, got, "Or take another model."))


def check_texts(model: nn.Module, settings: CollectSettings) -> None:
    """ValueError for columns that make labels which the loss of the model, by its name, doesn't mean.

    And for tokens around conversations, which the template of these puts alone.
    """
    odd = next((name for name in ("bos", "eos") if getattr(settings, name) != "auto"), None)
    if settings.messages_column and odd is not None:
        got, remedy = repr(getattr(settings, odd)), "The chat template says what is around a turn."
        raise ValueError(broken_rule("collect", odd, "be left out with --messages-column", got, remedy))
    task = task_of(model)
    wrong = settings.messages_column or (settings.response_column and task != SEQ2SEQ)
    if wrong and has_own_ends(task) and ":" not in settings.loss and not settings.audio_column:
        wanted = "--prompt-column and --response-column" if task == SEQ2SEQ else "--column and --label-column"
        rule = f"be {wanted} for {type(unwrapped(model)).__name__}, {task}"
        got = "--messages-column" if settings.messages_column else "--prompt-column and --response-column"
        remedy = "Or take a causal language model, or --loss module:function."
        raise ValueError(broken_rule("collect", "the columns", rule, got, remedy))


def main_input(model: nn.Module) -> str:
    """What a model calls what it reads."""
    return str(getattr(unwrapped(model), "main_input_name", "input_ids"))


def fitting_loss(settings: CollectSettings, model: nn.Module) -> str:
    """The name of the loss of what the model is for, and of what the examples have."""
    task = task_of(model)
    if task == SEQ2SEQ:
        return "seq2seq"
    if task == CLASSIFIER:
        return "classification"
    if task == MASKED:
        return "masked_lm"
    if settings.pack:
        return "response"
    return "response" if settings.response_column or settings.messages_column or settings.label_column else "next_token"


def check_labels(model: nn.Module, settings: CollectSettings, loss: Any) -> None:
    """ValueError for a loss of labels, by its name, where no column makes any."""
    name = loss if isinstance(loss, str) else name_of(loss)
    columns = {"classification": "--label-column", "masked_lm": "--label-column", "seq2seq": "--response-column"}
    made = settings.label_column or settings.response_column or settings.messages_column
    if name in columns and not made:
        check_task(model, name)
        column = next((n for n in ("column", "image_column", "audio_column") if getattr(settings, n)), "column")
        given = f"--{column.replace('_', '-')} {getattr(settings, column)} alone"
        got = given if settings.dataset else "--text"
        remedy = "Or say another --loss."
        rule = f"come from --dataset and {columns[name]} for loss {name}"
        raise ValueError(broken_rule("collect", "labels", rule, got, remedy))


def check_fits(model: nn.Module, settings: CollectSettings, goes_on: bool) -> None:
    """ValueError for examples that may be longer than the model has positions, or than was asked of what goes on."""
    n_positions = said_positions(model) if goes_on else positions_of(model)
    seq_len = settings.seq_len if settings.dataset else settings.text_len
    if n_positions is not None and seq_len > n_positions:
        rule = f"be at most {n_positions}, the positions of the model"
        raise ValueError(broken_rule("collect", "seq_len", rule, seq_len, "Give a smaller --seq-len."))
