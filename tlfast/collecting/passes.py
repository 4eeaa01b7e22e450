"""All examples through the model, batch by batch: what a batch gives is read behind it, and none is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from ..dataset.format.strict_json import sha256_of
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..spec import Spec
from .fsdp import is_sharded
from .identity import describe_collection, describe_loss
from .options import CollectOptions
from .probe import Probed
from .unit import Runner
from .work import Work

SORTED = 2048  # examples that are sorted by length at a time
# The settings of `collect` that say how the model is run.
SETTINGS = (
    "embedding", "loss", "fields", "collate", "batch_examples", "size", "batch_tokens", "seq_len", "padding_side",
    "pad_id", "grad_scale", "backend", "calls", "bad_examples", "deterministic",
)  # fmt: skip
_OF_BATCHES = ("batching", "examples", "calls", "missing")  # what a header says beside what sums are of


class Passes(Work):
    """A model and examples, checked and tried as `collect` does, without a dataset.

    Args:
        who: who asks, for errors.
        model: any module, whole in this process.
        batches: the examples, as `collect` takes them.
        options: which rows are wanted, and how.
    """

    squeezes = True

    def __init__(self, who: str, model: nn.Module, batches: Iterable[Any], options: CollectOptions) -> None:
        if is_sharded(model):
            remedy = "Give each process a whole model, and a part of the examples."
            raise ValueError(broken_rule(who, "model", "be whole in this process", "a sharded one", remedy))
        super().__init__(model, options)
        self.read(batches, with_graphs=False)
        # Nothing is kept behind a batch, so batches may have positions of their own.
        self.batching = replace(self.batching, one_width=False)
        self._probed: Probed | None = None

    def look(self, most: int | None = None) -> Probed:
        """Try a few examples, at work, the first time that it is asked."""
        if self._probed is None:
            self._probed = super().look(most)
        return self._probed

    @property
    def has_tokens(self) -> bool:
        """Whether examples have ``input_ids``."""
        return self.batching.source is None or self.batching.source.rules.has_tokens

    @cached_property
    def header(self) -> dict[str, Any]:
        """What a dataset of these rows would say of them."""
        said = describe_loss(self.loss, "", None)[0]
        return describe_collection(self.model, self.specs, said, self.batching, {}, self.options)

    @property
    def identity(self) -> str:
        """What sums over these rows are of: those of other weights, points or losses have another."""
        return sha256_of({key: value for key, value in self.header.items() if key not in _OF_BATCHES})

    @property
    def skipped(self) -> list[tuple[str, int, str]]:
        """The (source, start, reason) of bad examples."""
        return [(str(source), int(start), str(reason)) for source, start, reason in self.bad.skipped]

    @cached_property
    def most(self) -> int:
        """How many examples the largest batch has: the rows that a capture needs."""
        parts = (self.examples[start : start + SORTED] for start in range(0, len(self.examples), SORTED))
        return max(len(rows) for part in parts for rows, _ in self.batching.parts(part, self.batching.order(part)))

    def through(self, cap: Capture, decoding: Iterable[str], *, clears: bool = True) -> Iterator[tuple[list[int], int]]:
        """Take all examples through the model, at work and inside a capture; its rows are there after each step.

        Args:
            cap: of `most` rows, entered.
            decoding: its columns with a decoder's positions.
            clears: forget the rows before the next batch; False where something else takes them out.

        Yields:
            The numbers of the examples of a batch, in the order of the rows; and how many examples, from the first one
            on, are all through by then.
        """
        batching, options = self.batching, self.options
        runner = Runner(self.model, cap, batching, self.loss, options.grad_scale, decoding=decoding)
        for start in range(0, len(self.examples), SORTED):
            part = self.examples[start : start + SORTED]
            left = len(part)
            for rows, batch in batching.batches(part, batching.order(part)):
                if clears:
                    cap.clear()
                runner.step(batch.to(runner.device))
                left -= len(rows)
                yield [start + k for k in rows], start if left else start + len(part)

    def run(
        self,
        take: Callable[[Sequence[int], Capture], None],
        part_done: Callable[[int, int], None],
        choose: Callable[[set[str]], Sequence[Spec]] | None = None,
    ) -> None:
        """Try some examples, where that wasn't done yet, and take all through the model.

        Args:
            take: is given the numbers of the examples of a batch, and the capture with their rows, in this order.
            part_done: is given the first example, and the one behind the last, of those that are complete, in order.
            choose: gives the specs whose rows are wanted in place of those that were tried; it is given the points
                whose gradients have no positions.
        """
        with self.at_work():
            cap, probed = self._capture(choose)
            with cap:
                done = 0
                for numbers, complete in self.through(cap, probed.decoding):
                    take(numbers, cap)
                    if complete > done:
                        part_done(done, complete)
                        done = complete

    def _capture(self, choose: Callable[[set[str]], Sequence[Spec]] | None) -> tuple[Capture, Probed]:
        probed = self.look()
        if choose is None:
            return self.enter(self.most, self.specs).unmasked(probed.unmasked), probed
        wanted = self.enter(1, self.specs).wanted
        points = {wanted[column][0] for column in probed.unmasked}
        cap = self.enter(self.most, choose(points))
        decoding = {name for name, (point, _) in cap.wanted.items() if point in {wanted[c][0] for c in probed.decoding}}
        unmasked = {name for name, (point, _) in cap.wanted.items() if point in points}
        return cap.unmasked(unmasked), replace(probed, decoding=decoding)
