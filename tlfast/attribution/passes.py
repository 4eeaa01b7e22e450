"""All examples through a model, batch by batch: rows are read where they were captured, and none is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..collecting.fsdp import is_sharded
from ..collecting.options import CollectOptions
from ..collecting.probe import Probed
from ..collecting.unit import Runner
from ..collecting.work import Work
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..spec import Spec
from .queries import WHO

SORTED = 2048  # examples that are sorted by length at a time
# The settings of `collect` that say how the model is run.
SETTINGS = (
    "embedding", "loss", "fields", "collate", "batch_examples", "size", "batch_tokens", "seq_len", "padding_side",
    "pad_id", "grad_scale", "backend", "calls", "bad_examples", "deterministic",
)  # fmt: skip


class Passes(Work):
    """A model and examples, checked and tried as `collect` does.

    Args:
        model: any module, whole in this process.
        batches: the examples, as `collect` takes them.
        options: which rows are wanted, and how.
    """

    squeezes = True

    def __init__(self, model: nn.Module, batches: Iterable[Any], options: CollectOptions) -> None:
        super().__init__(model, options)
        if is_sharded(model):
            remedy = "Give each process a whole model, and a part of the examples."
            raise ValueError(broken_rule(WHO, "model", "be whole in this process", "a sharded one", remedy))
        self.read(batches, with_graphs=False)
        # Rows are read behind each batch, so batches may have positions of their own.
        self.batching = replace(self.batching, one_width=False)

    @property
    def has_tokens(self) -> bool:
        """Whether examples have ``input_ids``."""
        return self.batching.source is None or self.batching.source.rules.has_tokens

    def run(
        self,
        take: Callable[[Sequence[int], Capture], None],
        part_done: Callable[[int, int], None],
        choose: Callable[[set[str]], Sequence[Spec]] | None = None,
    ) -> None:
        """Take all examples through the model.

        Args:
            take: is given the numbers of the examples of a batch, and the capture with their rows, in this order.
            part_done: is given the first example, and the one behind the last, of those that are complete, in order.
            choose: gives the specs whose rows are wanted in place of those that were tried; it is given the points
                whose gradients have no positions.
        """
        parts = [(start, self.examples[start : start + SORTED]) for start in range(0, len(self.examples), SORTED)]
        orders = [self.batching.order(part) for _, part in parts]
        cut = [self.batching.parts(part, order) for (_, part), order in zip(parts, orders, strict=True)]
        most = max(len(rows) for batches in cut for rows, _ in batches)
        with self.at_work():
            cap, probed = self._capture(most, choose)
            with cap:
                runner = Runner(
                    self.model, cap, self.batching, self.loss, self.options.grad_scale, decoding=probed.decoding
                )
                for (start, part), order in zip(parts, orders, strict=True):
                    for rows, batch in self.batching.batches(part, order):
                        cap.clear()
                        runner.step(batch.to(runner.device))
                        take([start + k for k in rows], cap)
                    part_done(start, start + len(part))

    def _capture(self, most: int, choose: Callable[[set[str]], Sequence[Spec]] | None) -> tuple[Capture, Probed]:
        probed = self.look(None)
        if choose is None:
            return self.enter(most, self.specs).unmasked(probed.unmasked), probed
        wanted = self.enter(1, self.specs).wanted
        points = {wanted[column][0] for column in probed.unmasked}
        cap = self.enter(most, choose(points))
        decoding = {name for name, (point, _) in cap.wanted.items() if point in {wanted[c][0] for c in probed.decoding}}
        unmasked = {name for name, (point, _) in cap.wanted.items() if point in points}
        return cap.unmasked(unmasked), replace(probed, decoding=decoding)
