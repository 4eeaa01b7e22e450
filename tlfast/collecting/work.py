"""A model and what goes through it: what is asked for is checked, and then tried, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..hooks.captured import Capture
from ..hooks.options import CaptureOptions, TapOptions, taken
from ..spec import Spec
from .batches import Batching, as_examples, bucket_lengths
from .checks import alone_with, check_left_alone, positions_of, wanted_specs, width_of
from .determinism import deterministic
from .loop import at_work
from .loss import check_causal, next_token_loss
from .options import CollectOptions
from .probe import Probe, Probed
from .skipped import BadExamples


class Work:
    """A model, the specs that are wanted of it, and, once they are read, the examples.

    Args:
        model: any module.
        options: which rows are wanted, and how.
    """

    def __init__(self, model: nn.Module, options: CollectOptions) -> None:
        self.model, self.options = model, options
        check_left_alone(model)
        self.specs = wanted_specs(model, options)
        self.devices = {p.device for p in model.parameters()}
        self.bad = BadExamples(options.bad_examples, options.skipped)

    def read(self, batches: Iterable[Any], with_graphs: bool) -> None:
        """List the examples, and decide how they become batches."""
        options = self.options
        self.examples = as_examples(batches, self.bad, options.seq_len or positions_of(self.model))
        longest = max(example.length for example in self.examples)
        width = width_of(self.specs, longest, options.seq_len)
        buckets = ((width,) if width else bucket_lengths(longest)) if with_graphs else None
        self.batching = Batching(options.batch_tokens, width, options.padding_side, options.pad_id, buckets)

    def enter(self, rows: int, specs: Sequence[Spec]) -> Capture:
        """A capture of the model, for so many rows."""
        kind: Any = Capture
        if self.options.lens:
            from ..transformer_lens.capturing import LensCapture as kind
        made: Capture = kind(self.model, CaptureOptions(specs=specs, rows=rows, **taken(TapOptions, self.options)))
        return made

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model as it must be for all that it does here, and torch deterministic; both as before afterwards."""
        check_left_alone(self.model)
        with (
            alone_with(self.model),
            at_work(self.model, self.options.embedding),
            deterministic(self.options.deterministic, self.devices),
        ):
            yield

    def look(self, most: int | None) -> Probed:
        """Try a few examples, at work: `Probe.look`. ``most`` are the examples of a unit at most; None: any number."""
        options = self.options
        probe = Probe(
            self.model, self.enter, self.specs, self.batching, options.loss, self.examples, options.grad_scale, most
        )
        probed = probe.look()
        if options.loss is next_token_loss:
            check_causal(self.model, self.batching, self.examples)
        return probed
