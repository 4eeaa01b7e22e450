"""Sums over the rows of all examples, in one call: no dataset, and no row in memory behind its batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..dataset.format.strict_json import sha256_of
from ..errors import broken_rule
from ..hooks.running import RunningSums, Stat
from ..spec import Points, Spec
from .fsdp import is_sharded
from .identity import describe_collection, describe_loss
from .options import CollectOptions
from .stream import SETTINGS, row_options
from .unit import Runner
from .work import Work

_WHO = "running"
_SORTED = 2048  # examples that are sorted by length at a time
_OF_BATCHES = ("batching", "examples", "calls", "missing")  # what a header says beside what the sums are of


def running(
    model: nn.Module,
    batches: Iterable[Any],
    points: Points | Spec | Sequence[Spec],
    *,
    stats: Stat | Sequence[Stat] = ("sum", "moment2"),
    non_finite: Literal["stop", "skip"] = "stop",
    **settings: Any,
) -> RunningSums:
    """Add up what ``model`` has at ``points`` over all examples: sums, means, second moments, maxima; nothing is kept.

    A row is that of an example, or with ``per="token"`` that of a real token; padding never counts. The model runs in
    eval mode and frozen, and is as before afterwards.

    For several processes, or several calls, give each a part of the examples, save what it returns, and `merge` the
    parts: how near that is to one call over all says `RunningSums`. Parts of other weights, points or losses can't be
    merged.

    Args:
        model, batches, points: as in `collect`.
        stats, non_finite: as in `RunningSums`.
        settings: reduce, of, side, per, over, loss and the others that `stream` takes, as in `collect`, but no
            rows_per_unit. The default ``reduce`` is "mean", over an example's real positions.

    Returns:
        RunningSums; ``skipped`` are the (source, start, reason) of bad examples.

    Raises:
        ValueError, TypeError: for bad arguments, and all that `collect` refuses, before the first batch.
        FloatingPointError: for a row that is not finite, with ``non_finite="stop"``.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> sums = tlfast.running(model, [[1, 2, 3], [4, 5]], "0", per="token", stats=("mean", "moment2_full"))
        >>> sums["0"].n, sums["0"].moment2_full.shape
        (5, torch.Size([4, 4]))
    """
    sums = RunningSums(stats, non_finite=non_finite)
    options = row_options(_WHO, [name for name in SETTINGS if name != "rows_per_unit"], points, settings)
    return _Summing(model, batches, options).into(sums)


class _Summing(Work):
    """All examples through the model, batch by batch, into sums."""

    squeezes = True

    def __init__(self, model: nn.Module, batches: Iterable[Any], options: CollectOptions) -> None:
        super().__init__(model, options)
        if is_sharded(model):
            remedy = "Give each process a whole model, and a part of the examples."
            raise ValueError(broken_rule(_WHO, "model", "be whole in this process", "a sharded one", remedy))
        self.read(batches, with_graphs=False)
        # Rows are added up behind each batch, so batches may have positions of their own.
        self.batching = replace(self.batching, one_width=False)

    def into(self, sums: RunningSums) -> RunningSums:
        """Add up the rows of all examples."""
        options, batching = self.options, self.batching
        said = describe_loss(self.loss, "", None)[0]
        header = describe_collection(self.model, self.specs, said, batching, {}, options)
        sums.identity = sha256_of({key: value for key, value in header.items() if key not in _OF_BATCHES})
        sums.skipped = [(str(source), int(start), str(reason)) for source, start, reason in self.bad.skipped]
        parts = [self.examples[start : start + _SORTED] for start in range(0, len(self.examples), _SORTED)]
        cut = [batching.parts(part, batching.order(part)) for part in parts]
        most = max(len(rows) for batches in cut for rows, _ in batches)
        with self.at_work():
            probed = self.look(None)
            cap = self.enter(most, self.specs).unmasked(probed.unmasked)
            with cap, cap.into(sums):
                runner = Runner(self.model, cap, batching, self.loss, options.grad_scale, decoding=probed.decoding)
                for part in parts:
                    for _, batch in batching.batches(part, batching.order(part)):
                        runner.step(batch.to(runner.device))
        return sums
