"""Sums over the rows of all examples, in one call: no dataset, and no row in memory behind its batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from ..errors import SpeakingAs
from ..hooks.running import RunningSums, Stat
from ..spec import Points, Spec
from .passes import Passes
from .stream import SETTINGS, row_options

_WHO = "running"


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
        ValueError, TypeError: for bad arguments, and all that `collect` refuses, before the first batch; for rows that
            keep positions where examples of a batch differ in length.
        FloatingPointError: for a row that is not finite, with ``non_finite="stop"``.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> sums = tlfast.running(model, [[1, 2, 3], [4, 5]], "0", per="token", stats=("mean", "moment2_full"))
        >>> sums["0"].n, sums["0"].moment2_full.shape
        (5, torch.Size([4, 4]))
    """
    sums = RunningSums(stats, non_finite=non_finite)
    with SpeakingAs(_WHO, "collect", "into"):
        options = row_options(_WHO, [name for name in SETTINGS if name != "rows_per_unit"], points, settings)
        passes = Passes(_WHO, model, batches, options)
        sums.identity, sums.skipped = passes.identity, passes.skipped
        sums.about = {key: passes.header[key] for key in ("model", "specs")}
        with passes.at_work():
            probed = passes.look()
            cap = passes.enter(passes.most, passes.specs).unmasked(probed.unmasked)
            with cap, cap.into(sums):
                for _ in passes.through(cap, probed.decoding, clears=False):
                    pass
    return sums
