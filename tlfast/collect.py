"""The main job: a model and examples in, a dataset of gradients out, unit by unit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from .batches import Batching, PaddingSide, as_examples, bucket_lengths, unit_rows
from .dataset.background import BackgroundWriter
from .dataset.folder import refuse_stranger
from .dataset.plan import Plan
from .dataset.writer import DatasetWriter
from .drain import Drain, streams_for
from .errors import broken_rule
from .graphs import graph_step
from .hooks import Capture
from .identity import describe_collection
from .loss import next_token_loss
from .progress import Progress, Report
from .public import capture
from .replay import CudaGraph, Replays, graphs_wanted
from .request import check_numbers, wanted_specs, width_of
from .spec import Over, Points, Reduction, Spec, one_of
from .unit_loop import at_work, run_units
from .units import Loss, Oddities, Runner, probe_columns


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    out: str | os.PathLike[str],
    *,
    points: Points | Spec | Sequence[Spec],
    reduce: Reduction = "mean",
    over: Over = "pos",
    dtype: torch.dtype | None = None,
    output: int | str | None = None,
    loss: Loss = next_token_loss,
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
    overwrite: bool = False,
    progress: bool = True,
    header: Mapping[str, Any] | None = None,
    config: str | Mapping[str, Any] = "",
) -> Report:
    """Collect the gradients of ``model`` at ``points`` into the dataset folder ``out``: one row per example.

    The model runs in eval mode and frozen (no parameter gradient), and is as before afterwards. A row depends on its
    example alone, up to rounding; rounding depends on the examples of its unit alone, so a resumed run gives the same
    bytes. If ``out`` holds a part of the same dataset, only the units that are missing are computed.

    Args:
        model: any module; with the default loss, one that returns logits, such as a Hugging Face causal LM.
        batches: token sequences, tensors [P] or [B, P], mappings with ``input_ids``, or lists of these. They are
            rearranged: only the order of the examples counts.
        out: the folder; new, empty, or with a part of this dataset.
        points, reduce, over, dtype, output, attach, backend, calls, missing: as in `capture`; over can't be "batch".
        loss: (model, batch) -> scalar that is a sum over examples; batch is a `tlfast.batches.Batch`.
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
        overwrite: remove a dataset that lies in ``out`` first.
        progress: show a bar, or a line every 30 s where there is no terminal, on stderr.
        header: what else to say of the data in dataset.json, JSON; part of the dataset's identity.
        config: text or mapping for config.yaml.

    Returns:
        A Report.

    Raises:
        ValueError, TypeError: for bad arguments, a foreign or different ``out``, a full disk, a model without
            gradients: before anything is written.
        KeyboardInterrupt: after Ctrl-C, with all finished units on disk; the message says how many.

    Example:
        >>> import tempfile, torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> out = tempfile.mkdtemp()
        >>> tlfast.collect(model, [[1, 2, 3], [4, 5]], out, points="0", progress=False).n_rows
        2
        >>> tlfast.open_dataset(out)["0"].shape
        (2, 4)
    """
    refuse_stranger(Path(out), "collect")
    specs = wanted_specs(model, points, reduce, over, dtype, output, lens)
    check_numbers(batch_tokens=batch_tokens, seq_len=seq_len, rows_per_unit=rows_per_unit)
    one_of("collect", "padding_side", padding_side, ("right", "left"))
    one_of("collect", "cuda_graph", cuda_graph, get_args(CudaGraph))
    if not 0 < grad_scale < math.inf:
        raise ValueError(broken_rule("collect", "grad_scale", "be positive", grad_scale, "1.0 changes nothing."))
    examples = as_examples(batches)
    width = width_of(specs, examples, seq_len)

    def enter(rows: int) -> Capture:
        enter_capture: Any = capture
        if lens:
            from .transformer_lens.capturing import capture as enter_capture
        entered: Capture = enter_capture(
            model, specs, rows=rows, attach=attach, backend=backend, calls=calls, missing=missing
        )
        return entered

    with_graphs = graphs_wanted(cuda_graph, {p.device for p in model.parameters()}, lambda: enter(1).backend)
    longest = max(example.length for example in examples)
    buckets = ((width,) if width else bucket_lengths(longest)) if with_graphs else None
    batching = Batching(batch_tokens, width, padding_side, pad_id, buckets)
    with at_work(model):
        columns, devices = probe_columns(model, enter, batching, loss, examples[0])
        plan = Plan(len(examples), rows_per_unit or unit_rows(sum(column.row_bytes for column in columns.values())))
        identity = describe_collection(
            model, specs, loss, batching, examples, header, grad_scale=grad_scale, calls=calls, missing=missing
        )
        writer = DatasetWriter(
            out, header=identity, columns=columns, plan=plan, config=config, overwrite=overwrite, backend=backend
        )
        n_before = sum(len(plan.unit_named(name)) for name in writer.done)
        todo = [unit for unit in plan.units if unit.name not in writer.done]
        shown, oddities, waited_s = Progress(plan.n_examples, n_before, progress), Oddities(), 0.0
        try:
            if todo:
                with BackgroundWriter(writer, 2) as background, enter(max(map(len, todo))) as cap, shown:
                    replays = Replays(cap, graph_step, cuda_graph == "on") if with_graphs else None
                    runner = Runner(model, cap, batching, loss, grad_scale, replays)
                    drain = Drain(streams_for(devices), columns, cap.capacity)
                    run_units(runner, drain, todo, examples, background, shown, oddities, missing == "nan")
                    waited_s = background.waited_s
        except KeyboardInterrupt:
            kept = f"{len(writer.done)} of {plan.n_units} units are kept in {writer.out}"
            raise KeyboardInterrupt(kept) from None
    return Report(
        writer.out, plan.n_examples - n_before, n_before, len(todo), shown.n_tokens, writer.bytes_written,
        oddities.n_nonfinite_rows, oddities.n_saturated, shown.time_s, waited_s,
    )  # fmt: skip
