"""The main job: a model and examples in, a dataset of gradients out, unit by unit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from ..dataset.format.layout import Column
from ..dataset.format.plan import Plan, Unit
from ..dataset.places.remote import url_of
from ..dataset.write.background import BackgroundWriter
from ..dataset.write.writer import DatasetWriter
from ..errors import broken_rule
from ..hooks.freeze import Embedding
from ..hooks.graph_step import graph_step
from ..spec import (
    At,
    Attach,
    Backend,
    Calls,
    Encoding,
    Heads,
    Missing,
    Normalizing,
    Over,
    Per,
    Points,
    Project,
    Reduction,
    Ref,
    Side,
    Spec,
)
from .batches import Collate, PaddingSide, unit_rows_of
from .checks import check_peaceful, said_positions
from .determinism import Deterministic, as_begun, describe_machine
from .drain import Drain, streams_for
from .fsdp import Lockstep, agreed, is_sharded, share_of_group
from .function_identity import what_stays
from .graph_cache import CudaGraph, Replays, graphs_wanted
from .identity import describe_collection, describe_examples, describe_loss
from .loop import run_units
from .loss import Loss, next_token_loss
from .options import CollectOptions, NonFinitePolicy, Resume
from .probe import Probed
from .progress import Progress, Report
from .resume import (
    add_the_rest,
    check_folder,
    existing_folder,
    has_units,
    holds_first,
    loss_as_begun,
    next_tokens_as_begun,
    own_part,
    positions_as_begun,
    reasons_as_begun,
)
from .signals import Terminated, stopping
from .skipped import BadPolicy, RefusedExamples
from .spool import lengths_of
from .stored_examples import MadeAnew
from .unit import Oddities, Runner
from .unit_queue import Share, Todo, share_of, units_in
from .work import Work


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    points: Points | Spec | Sequence[Spec],
    reduce: Reduction = "mean",
    of: str | Sequence[str] = "grad",
    side: Side = "output",
    ref: Ref | None = None,
    heads: Heads | None = None,
    at: At | None = None,
    per: Per = "example",
    encoding: Encoding | None = None,
    project: Project | None = None,
    bias: bool = False,
    normalizer: Normalizing | None = None,
    summed: bool = False,
    over: Over = "pos",
    dtype: torch.dtype | str | None = None,
    output: int | str | None = None,
    embedding: Embedding | None = None,
    loss: Loss | str = next_token_loss,
    identity: str = "",
    fields: Sequence[str] | Mapping[str, Any] | None = None,
    keep_fields: Sequence[str] = (),
    collate: Collate | None = None,
    batch_examples: int | None = None,
    size: Callable[[Mapping[str, Any]], int] | None = None,
    fingerprint: str = "",
    batch_tokens: int = 2048,
    seq_len: int | None = None,
    rows_per_unit: int | None = None,
    padding_side: PaddingSide = "right",
    pad_id: int = 0,
    grad_scale: float = 1.0,
    attach: Attach = "auto",
    backend: Backend = "auto",
    calls: Calls = "raise",
    missing: Missing = "raise",
    cuda_graph: CudaGraph = "auto",
    lens: bool = False,
    units: str = "",
    share: tuple[int, int] | None = None,
    resume: Resume = "auto",
    extend: bool = False,
    overwrite: bool = False,
    staging: str | os.PathLike[str] | None = None,
    bad_examples: BadPolicy = "skip",
    skipped: Iterable[tuple[str, int, str]] = (),
    non_finite: NonFinitePolicy = "flag",
    disk_wait_s: float = 600.0,
    deterministic: Deterministic = "strict",
    progress: bool = True,
    header: Mapping[str, Any] | None = None,
    config: str | Mapping[str, Any] = "",
) -> Report:
    """Collect the gradients of ``model`` at ``points`` into the dataset folder ``out``: one row per example.

    The model runs in eval mode and frozen (no parameter gradient), and is as before afterwards. A row depends on its
    example alone, up to rounding; rounding depends on the examples of its unit alone, so a resumed run gives the same
    bytes on the same kind of device. If ``out`` holds a part of the same dataset, only the units that are missing are
    computed, on the CPU with as many threads as it was begun with.

    Args:
        model: any module; with the default loss, one that returns logits, such as a Hugging Face causal LM.
        batches: the examples: a sequence or another data set with a length, a Hugging Face ``Dataset`` or
            ``IterableDataset``, a ``DataLoader``, or any iterable, which is read once. An item is a sequence of tokens,
            a tensor [P] or [B, P], a mapping of fields (``input_ids`` and others, or others alone), or a list of these.
            They are rearranged: only the order of the examples counts.
        out: the folder, or a URL such as s3://bucket/folder; new, empty, or with a part of this dataset.
        points, reduce, of, side, over, dtype, output, attach, backend, calls, missing: as in `capture`; over can't be
            "batch". Where points are Specs, what they say themselves is left out beside them: another reduce than the
            default is an error, and so are the others.
        project, bias: of the gradients of weights, as in `capture`.
        normalizer: of "weight": what divides gradients before they are projected, as `tlfast.read_optimizer` and
            `Factors.normalizers` return it. Its numbers are a part of the dataset's identity, as a digest.
        summed: of "weight" with a one-sided projection: the rows of all points added up, in one column
            ``gradients:weight``.
        ref: what "grad*ref" multiplies with: a tensor [D], or with positions where all examples have as many; or a
            function of the `tlfast.collecting.batches.Batch`, which returns a tensor that broadcasts to the gradient,
            or a mapping of one for each point. It is called before each forward, and may run the model. A part of the
            dataset's identity: the tensor by what is in it, the function by its code.
        heads: (n, d): the last dimension is taken as [n, d].
        at: a position, or a list of them, which count the tokens of each example, -1 the last; or the name of a field
            of the examples that has them, whole numbers or a bool for each token.
        per: "example", or "token": each token has a row, ``ds[point][example]`` is [length, ...], and padding has none.
            ``reduce`` and ``over`` are left as they are then, or name dimensions behind the positions.
        encoding: how rows are stored: "int8" or "float8_e4m3fn" (codes, and a scale for each row), "int8:64" or
            "int4:64" (for each 64 values), perhaps with ":stochastic" behind it: rounded at random, by
            the example's number, so that the mean is right; None: as ``dtype`` says.
        embedding: the module at which the graph starts, its name, or several, as in `freeze`; None: found by itself.
            The rows are the same wherever it starts before the points.
        loss: "next_token", "response", "masked_lm", "classification", "seq2seq", "preference", "reward_logprob" or
            "logit_difference" (`tlfast.collecting.losses`); or (model, batch) -> [B], a number for each example, or
            their sum; batch is a `tlfast.collecting.batches.Batch`.
        identity: a text that stands for a loss of your own in the dataset's identity, in place of its code: you vouch
            for it being the same in each run.
        fields: the fields to take of each example; the names of the parts where examples are tuples; or a mapping from
            names to keys. None: all, of which each must be used by the model, by the loss, or be kept.
        keep_fields: fields that the row table keeps: numbers, texts and short lists of these.
        collate: (list of mappings, one for each example) -> mapping of tensors [B, ...], in place of padding by name.
        batch_examples: examples in a batch, at most; None: as ``batch_tokens`` allows, or 16 without ``input_ids``.
        size: (fields of an example without ``input_ids``) -> int that counts as its tokens for ``batch_tokens``.
        fingerprint: a text that stands for the examples in the dataset's identity, in place of what they are: you vouch
            for them being the same in each run.
        batch_tokens: positions B x P in a batch, at most (but at least one example).
        seq_len: positions of rows that keep the position dimension, zero at padding; None: of the longest example.
        rows_per_unit: examples per unit, the piece that is written and resumed whole; None: those that fill 256 MiB,
            at most 2048. Memory used: three times as much; on a GPU that, and two times as much on the host.
        padding_side: "right" or "left".
        pad_id: the token at padded positions, which are masked.
        grad_scale: the loss is multiplied by it and the rows divided by it: keeps small fp16 gradients alive.
        cuda_graph: run the steps as CUDA graphs, with batches padded to a few lengths, which become part of the
            dataset's identity: "auto" (where the native code runs on CUDA; a model that can't be run so is warned of
            and runs without), "on" (or an error) or "off".
        lens: the model is one of TransformerLens, and points are hook points by its names.
        units: "A:B": only these units of the plan, as a Python slice would count them; "": all.
        share: (index, count) of this process where several collect into the same ``out``, each for itself: it does its
            own units first, then whatever is left; None: by RANK and WORLD_SIZE, which torchrun sets, else (0, 1).
        resume: "auto" continues the dataset in ``out``, or begins one; "must" continues, "never" begins, or raises.
        extend: append the examples that the dataset in ``out`` lacks. Those that it has come first, the same as then.
        overwrite: remove a dataset that lies in ``out`` first.
        staging: where units lie until they are uploaded, if ``out`` is a URL; None: in the user's cache folder.
        bad_examples: those of less than 2 tokens, or of more than ``seq_len`` (without it: than a Hugging Face model
            has positions): "skip" leaves them out and records them with the reason, "stop" raises.
        skipped: (source, start, reason) of examples that were left out before, to be recorded too.
        non_finite: rows with a NaN or an infinity are flagged in the dataset; "flag" also names the first of them at
            the end, "keep" doesn't, "stop" raises at the first and keeps all units before its own.
        disk_wait_s: how many seconds a full disk is waited for.
        deterministic: for an operation without a deterministic form: "strict" raises, "warn" warns, and a resumed run
            may then differ in last bits.
        progress: show a bar, or a line every 30 s where there is no terminal, on stderr.
        header: what else to say of the data in dataset.json, JSON; part of the dataset's identity.
        config: text or mapping for config.yaml.

    Returns:
        A Report.

    Raises:
        ValueError, TypeError: for bad arguments, a foreign or different ``out``, a full disk, a model without
            gradients: before anything is written.
        OSError, FloatingPointError: for a disk that fails or stays full, and for ``non_finite="stop"``, at the next
            batch; all finished units are on disk.
        KeyboardInterrupt, tlfast.collecting.signals.Terminated: after Ctrl-C and SIGTERM, at the next batch, with all
            finished units on disk; the message says how many. A second Ctrl-C doesn't wait for those that are being
            written.

    Example:
        >>> import tempfile, torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> out = tempfile.mkdtemp()
        >>> tlfast.collect(model, [[1, 2, 3], [4, 5]], out, points="0", progress=False).n_rows
        2
        >>> tlfast.open_dataset(out)["0"].shape
        (2, 4)
    """
    given = dict(locals())  # what follows the * is a field of the options by its name
    return Run(given.pop("model"), given.pop("batches"), given.pop("out"), CollectOptions(**given)).collect()


class Run(Work):
    """One collection: what is asked for is checked when it is made; then it is done, once.

    Args:
        model, batches, out: as in `collect`.
        options: its other arguments.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], out: str | os.PathLike[str], options: CollectOptions
    ) -> None:
        self.out = out
        check_folder(out, options.resume, options.overwrite, options.staging)
        super().__init__(model, options)
        self.together = is_sharded(model, options.cuda_graph)
        if self.together and options.share is not None:
            rule, remedy = "be None for a sharded model", "Its ranks are known."
            raise ValueError(broken_rule("collect", "share", rule, options.share, remedy))
        if self.together:
            self.share = share_of_group()
        else:
            self.share = share_of() if options.share is None else Share(*options.share)
        if options.units or self.share.count > 1:
            check_peaceful(options.overwrite, options.resume)
        self.loss_at_first, self.loss_unknown = describe_loss(self.loss, options.identity, options.header)
        graphs: CudaGraph = "off" if self.together else self.graphs_possible(options.cuda_graph)
        self.with_graphs = graphs_wanted(graphs, self.devices, lambda: self.enter(1, self.specs).backend)
        self._as_earlier = False
        self._read(batches)
        self.with_graphs = self.batching.buckets is not None

    def _read(self, batches: Iterable[Any]) -> None:
        """Read the examples: as they are made today, or as earlier versions made those of the dataset that goes on.

        The latter where today's aren't those of the dataset and the others are. Of today's that are refused the ones
        count that aren't: a dataset that has these goes on with today's, and is told what is wrong with them.
        """
        out, here = self.out, not url_of(self.out)
        where = self.with_graphs, existing_folder(out) if here else None, os.fspath(out) if here else None
        earlier = batches.earlier if isinstance(batches, MadeAnew) else None
        if earlier is None or self.options.overwrite or not has_units(out):
            self.read(batches, *where)
            return
        refused: RefusedExamples | None = None
        try:
            self.read(batches, *where)
        except RefusedExamples as error:  # what is wrong today may have been right
            refused = error
        if refused is None and self._are_begun():
            return
        if refused is not None and self._are_begun_without_bad(batches, where):
            raise refused
        self.bad.forget()
        self._as_earlier = True
        with suppress(RefusedExamples):
            self.read(earlier(), *where)
            if self._are_begun():
                return
        if refused is not None:
            raise refused
        self.bad.forget()
        self._as_earlier = False
        self.read(batches, *where)  # neither are: what differs is told of today's

    def _are_begun_without_bad(self, batches: Iterable[Any], where: tuple[Any, ...]) -> bool:
        """Whether today's examples begin with those of the dataset, where those that are refused are left out."""
        self.bad.forget()
        with self.bad.skipping(), suppress(RefusedExamples):
            self.read(batches, *where)
            return self._are_begun()
        return False

    def _are_begun(self) -> bool:
        """Whether the examples that were read begin with those of the dataset that goes on."""
        reasons_as_begun(self.out, self.bad.skipped, overwrite=False)
        return holds_first(self.out, self.examples, self.bad.skipped, self.options.fingerprint)

    def most_tokens(self) -> int | None:
        """Those of the dataset that it continues."""
        if self._as_earlier:
            return said_positions(self.model)
        return positions_as_begun(self.out, self.model, self.options.overwrite)

    def next_in_text(self) -> bool:
        """As in the dataset that it continues."""
        return next_tokens_as_begun(self.out, self.options.overwrite)

    def collect(self, notes: Sequence[str] = ()) -> Report:
        """Make the units that are asked for and missing; ``notes`` are lines to be shown once, when work begins."""
        options = self.options
        with stopping() as stop_if_asked, self.at_work():
            probed = self.look(options.rows_per_unit)
            here = describe_machine(self.model)
            writer = self._open(probed.columns, here)
            plan = writer.plan
            asked = [plan.unit(k) for k in units_in(options.units, plan.n_units)]
            left = [unit for unit in asked if unit.name not in writer.done]
            left = agreed(left) if self.together else left
            if self.stored is not None and self.share.index == 0 and len(writer.done) < plan.n_units:
                self.stored.write()
            n_asked, n_before = sum(map(len, asked)), sum(map(len, asked)) - sum(map(len, left))
            bar = options.progress and self.share.index == 0
            shown = Progress(n_asked, n_before, bar, waits_for=writer.waits_for)
            oddities, todo, waited_s = Oddities(options.non_finite == "stop"), Todo([], self.share, set), 0.0
            for note in (*notes, *([str(self.bad)] if len(self.bad) else [])):
                shown.say(note)
            try:
                with writer:
                    if left:
                        todo, waited_s = self._make(left, probed, writer, here, shown, oddities, stop_if_asked)
            except (KeyboardInterrupt, Terminated) as stop:
                kept = f"{len(writer.done)} of {plan.n_units} units are kept in {writer.out}{writer.still_to_do()}"
                raise type(stop)(kept) from None
        if self.stored is not None and len(writer.committed()) == plan.n_units:
            self.stored.remove()
        if oddities.first and options.non_finite == "flag":
            named = ", ".join(map(str, oddities.first))
            line = f"{oddities.n_nonfinite_rows} rows are not finite, and flagged; the first: {named}"
            shown.say(line, always=options.progress)  # of every process: each knows its own rows
        return Report(
            writer.out, sum(map(len, todo.taken)), n_before, len(todo.taken), shown.n_tokens, writer.bytes_written,
            oddities.n_nonfinite_rows, oddities.n_saturated, shown.time_s, waited_s + writer.waited_s,
            todo.n_rows_elsewhere, len(self.bad), tuple(oddities.first), writer.waits_for,
        )  # fmt: skip

    def _open(self, columns: dict[str, Column], here: dict[str, Any]) -> DatasetWriter:
        """The dataset, begun or continued, with all examples in its plan."""
        options, bad = self.options, self.bad
        reasons_as_begun(self.out, bad.skipped, options.overwrite)
        said = what_stays(self.loss_at_first, describe_loss(self.loss, options.identity, options.header)[0])
        said = loss_as_begun(self.out, said, self.loss_unknown, options.overwrite)
        n_own, n_own_skipped = own_part(
            self.out, self.examples, bad.skipped, options.overwrite, options.extend, options.fingerprint
        )
        examples = describe_examples(self.examples[:n_own], bad.skipped[:n_own_skipped], options.fingerprint)
        n_rows = options.rows_per_unit or unit_rows_of(columns.values(), self.examples[:n_own])
        writer = DatasetWriter(
            self.out,
            staging=options.staging,
            header=describe_collection(self.model, self.specs, said, self.batching, examples, options),
            columns=columns,
            plan=Plan(n_own, n_rows),
            config=options.config,
            overwrite=options.overwrite,
            about=here | self.enter(1, self.specs).about_weights,
            backend=options.backend,
            replace_unused=options.resume == "auto" and not options.extend,
            fields=self.kept_types,
        )
        add_the_rest(writer, self.examples, bad.skipped, options.extend, options.config)
        return writer

    def _make(
        self,
        left: Sequence[Unit],
        probed: Probed,
        writer: DatasetWriter,
        here: dict[str, Any],
        shown: Progress,
        oddities: Oddities,
        stop_if_asked: Callable[[], None],
    ) -> tuple[Todo, float]:
        """Make units; return which were taken, and how long the model waited for the disk."""
        options = self.options
        background = BackgroundWriter(writer, 2, options.disk_wait_s, partial(shown.say, always=True))
        cap = self.enter(max(map(len, left)), self.specs).unmasked(probed.unmasked)
        with as_begun(writer.description.about, here), background, cap, shown:
            replays = Replays(cap, graph_step, options.cuda_graph == "on") if self.with_graphs else None
            runner = Runner(self.model, cap, self.batching, self.loss, options.grad_scale, replays, probed.decoding)
            n_tokens = max(sum(lengths_of(self.examples[u.start : u.stop])) for u in left)
            drain = Drain(streams_for(probed.devices), probed.columns, cap.capacity, n_tokens, writer.native)
            if self.together:
                todo: Todo = Lockstep(left, self.share, self.examples, runner)
            else:
                todo = Todo(left, self.share, writer.committed)
            run_units(
                runner, drain, todo, self.examples, background, writer, shown, oddities, options.missing == "nan",
                stop_if_asked,
            )  # fmt: skip
            return todo, background.waited_s
