"""The main job: a model and examples in, a dataset of gradients out, unit by unit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..dataset.format.plan import Plan
from ..dataset.write.background import BackgroundWriter
from ..dataset.write.remote_writer import open_writer
from ..errors import broken_rule
from ..hooks.capture import capture
from ..hooks.captured import Capture
from ..hooks.freeze import Embedding
from ..hooks.graph_step import graph_step
from ..spec import Over, Points, Reduction, Spec, one_of
from .batches import Batching, PaddingSide, as_examples, bucket_lengths, unit_rows
from .checks import check_numbers, check_peaceful, positions_of, wanted_specs, width_of
from .determinism import Deterministic, as_begun, describe_machine
from .determinism import deterministic as only_deterministic
from .drain import Drain, streams_for
from .fsdp import Lockstep, agreed, is_sharded, share_of_group
from .function_identity import what_stays
from .graph_cache import CudaGraph, Replays, graphs_wanted
from .identity import describe_collection, describe_examples, describe_loss
from .loop import at_work, run_units
from .loss import check_causal, next_token_loss
from .probe import Probe
from .progress import Progress, Report
from .resume import Resume, add_the_rest, check_folder, loss_as_begun, own_part
from .signals import Terminated, stopping
from .skipped import BadExamples, BadPolicy
from .unit import Loss, Oddities, Runner
from .unit_queue import Share, Todo, share_of, units_in

NonFinitePolicy = Literal["keep", "flag", "stop"]


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    points: Points | Spec | Sequence[Spec],
    reduce: Reduction = "mean",
    over: Over = "pos",
    dtype: torch.dtype | str | None = None,
    output: int | str | None = None,
    embedding: Embedding | None = None,
    loss: Loss = next_token_loss,
    identity: str = "",
    batch_tokens: int = 2048,
    seq_len: int | None = None,
    rows_per_unit: int | None = None,
    padding_side: PaddingSide = "right",
    pad_id: int = 0,
    grad_scale: float = 1.0,
    attach: str = "auto",
    backend: str = "auto",
    calls: str = "raise",
    missing: str = "raise",
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
        batches: token sequences, tensors [P] or [B, P], mappings with ``input_ids``, or lists of these. They are
            rearranged: only the order of the examples counts.
        out: the folder, or a URL such as s3://bucket/folder; new, empty, or with a part of this dataset.
        points, reduce, over, dtype, output, attach, backend, calls, missing: as in `capture`; over can't be "batch".
        embedding: the module at which the graph starts, its name, or several, as in `freeze`; None: found by itself.
            The rows are the same wherever it starts before the points.
        loss: (model, batch) -> scalar that is a sum over examples; batch is a `tlfast.collecting.batches.Batch`.
        identity: a text that stands for a loss of your own in the dataset's identity, in place of its code: you vouch
            for it being the same in each run.
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
    for name, value, known in (
        ("padding_side", padding_side, ("right", "left")), ("cuda_graph", cuda_graph, get_args(CudaGraph)),
        ("resume", resume, get_args(Resume)), ("bad_examples", bad_examples, get_args(BadPolicy)),
        ("non_finite", non_finite, get_args(NonFinitePolicy)),
        ("deterministic", deterministic, get_args(Deterministic)),
    ):  # fmt: skip
        one_of("collect", name, value, known)
    check_folder(out, resume, overwrite, staging)
    specs = wanted_specs(model, points, reduce, over, dtype, output, lens, embedding)
    check_numbers(batch_tokens=batch_tokens, seq_len=seq_len, rows_per_unit=rows_per_unit)
    if not 0 < grad_scale < math.inf:
        raise ValueError(broken_rule("collect", "grad_scale", "be positive", grad_scale, "1.0 changes nothing."))
    together = is_sharded(model, cuda_graph)
    if together and share is not None:
        raise ValueError(broken_rule("collect", "share", "be None for a sharded model", share, "Its ranks are known."))
    mine = share_of_group() if together else share_of() if share is None else Share(*share)
    units_in(units, 0)
    if units or mine.count > 1:
        check_peaceful(overwrite, resume)
    if not 0 <= disk_wait_s < math.inf:
        raise ValueError(broken_rule("collect", "disk_wait_s", "be 0 or more", disk_wait_s, "Give seconds."))
    at_first, unknown = describe_loss(loss, identity, header)
    bad = BadExamples(bad_examples, skipped)
    examples = as_examples(batches, bad, seq_len or positions_of(model))
    longest = max(example.length for example in examples)
    width = width_of(specs, longest, seq_len)

    def enter(rows: int, specs: Sequence[Spec] = specs) -> Capture:
        enter_capture: Any = capture
        if lens:
            from ..transformer_lens.capturing import capture as enter_capture
        entered: Capture = enter_capture(
            model, specs, rows=rows, attach=attach, backend=backend, calls=calls, missing=missing
        )
        return entered

    model_devices = {p.device for p in model.parameters()}
    with_graphs = graphs_wanted("off" if together else cuda_graph, model_devices, lambda: enter(1).backend)
    buckets = ((width,) if width else bucket_lengths(longest)) if with_graphs else None
    batching = Batching(batch_tokens, width, padding_side, pad_id, buckets)
    with stopping() as stop_if_asked, at_work(model, embedding), only_deterministic(deterministic, model_devices):
        probed = Probe(model, enter, specs, batching, loss, examples, grad_scale, rows_per_unit).look()
        columns = probed.columns
        if loss is next_token_loss:
            check_causal(model, batching, examples)
        said = what_stays(at_first, describe_loss(loss, identity, header)[0])
        said = loss_as_begun(out, said, unknown, overwrite)
        n_own, n_own_skipped = own_part(out, examples, bad.skipped, overwrite, extend)
        described = describe_collection(
            model, specs, said, batching, describe_examples(examples[:n_own], bad.skipped[:n_own_skipped]), header,
            grad_scale=grad_scale, calls=calls, missing=missing,
        )  # fmt: skip
        plan = Plan(n_own, rows_per_unit or unit_rows(sum(column.row_bytes for column in columns.values())))
        here = describe_machine(model)
        writer = open_writer(
            out, staging=staging, header=described, columns=columns, plan=plan, config=config, overwrite=overwrite,
            about=here, backend=backend, replace_unused=resume == "auto" and not extend,
        )  # fmt: skip
        add_the_rest(writer, examples, bad.skipped, extend, config)
        plan = writer.plan
        asked = [plan.unit(k) for k in units_in(units, plan.n_units)]
        left = [unit for unit in asked if unit.name not in writer.done]
        left = agreed(left) if together else left
        n_before = sum(map(len, asked)) - sum(map(len, left))
        bar = progress and mine.index == 0
        shown = Progress(sum(map(len, asked)), n_before, bar, waits_for=writer.waits_for)
        oddities, todo, waited_s = Oddities(non_finite == "stop"), Todo(left, mine, writer.committed), 0.0
        if len(bad):
            shown.say(str(bad))
        try:
            with writer:
                if left:
                    say = partial(shown.say, always=True)
                    background = BackgroundWriter(writer, 2, disk_wait_s, say)
                    cap = enter(max(map(len, left))).unmasked(probed.unmasked)
                    with as_begun(writer.description.about, here), background, cap, shown:
                        replays = Replays(cap, graph_step, cuda_graph == "on") if with_graphs else None
                        runner = Runner(model, cap, batching, loss, grad_scale, replays)
                        drain = Drain(streams_for(probed.devices), columns, cap.capacity)
                        if together:
                            todo = Lockstep(left, mine, examples, runner)
                        run_units(
                            runner, drain, todo, examples, background, writer, shown, oddities, missing == "nan",
                            stop_if_asked,
                        )  # fmt: skip
                        waited_s = background.waited_s
        except (KeyboardInterrupt, Terminated) as stop:
            kept = f"{len(writer.done)} of {plan.n_units} units are kept in {writer.out}{writer.still_to_do()}"
            raise type(stop)(kept) from None
    if oddities.first and non_finite == "flag":
        named = ", ".join(map(str, oddities.first))
        line = f"{oddities.n_nonfinite_rows} rows are not finite, and flagged; the first: {named}"
        shown.say(line, always=progress)  # of every process: each knows its own rows
    return Report(
        writer.out, sum(map(len, todo.taken)), n_before, len(todo.taken), shown.n_tokens, writer.bytes_written,
        oddities.n_nonfinite_rows, oddities.n_saturated, shown.time_s, waited_s + writer.waited_s,
        todo.n_rows_elsewhere, len(bad), tuple(oddities.first), writer.waits_for,
    )  # fmt: skip
