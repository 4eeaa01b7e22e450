"""A model and what goes through it: what is asked for is checked, and then tried, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import broken_rule
from ..hooks.captured import Capture
from ..hooks.freeze import at_work, starts_at_inputs
from ..hooks.options import CaptureOptions, TapOptions, taken
from ..hooks.step_inputs import has_functions
from ..projections.kept import keeping
from ..spec import Spec
from .batches import Batching, bucket_lengths
from .checks import (
    alone_with,
    as_mapping,
    check_collate,
    check_differentiable,
    check_left_alone,
    check_positions,
    check_tokens,
    check_used,
    positions_of,
    wanted_specs,
    width_of,
)
from .determinism import deterministic
from .examples import ExampleReader, FieldSource
from .graph_cache import CudaGraph
from .loss import check_causal, next_token_loss
from .losses import OF_ONE_TOKEN, loss_called, name_of, preference_loss, response_loss
from .options import CollectOptions
from .packing import check_packs
from .probe import Probe, Probed
from .skipped import BadExamples
from .stored_examples import MadeAnew, stored_in
from .tasks import check_task, is_encoder_decoder

BATCH_EXAMPLES = 16  # in a batch of examples without tokens, where nobody says how many


def _buckets(width: int | None, longest: int) -> tuple[int, ...]:
    return bucket_lengths(longest) if width is None else (width,)


class Work:
    """A model, the specs that are wanted of it, and, once they are read, the examples.

    Args:
        model: any module.
        options: which rows are wanted, and how.
    """

    squeezes = False  # whether captures leave padding out of rows of tokens, or whoever reads them does

    def __init__(self, model: nn.Module, options: CollectOptions) -> None:
        self.model, self.options, self.loss = model, options, loss_called(options.loss)
        check_left_alone(model)
        self.specs = wanted_specs(model, options)
        check_differentiable(model)
        named = name_of(self.loss)
        if named is not None:
            check_task(model, named)
        self.devices = {p.device for p in model.parameters()}
        self.bad = BadExamples(options.bad_examples, options.skipped)
        self._projections: dict[Any, Any] = {}  # that all captures of this run share

    def read(
        self, batches: Iterable[Any], with_graphs: bool, spool_in: str | None = None, kept_in: str | None = None
    ) -> None:
        """Read the examples, and decide how they become batches.

        ``spool_in`` is the folder in which they are spooled; None: where temporary files lie. ``kept_in`` is the folder
        of a dataset where they may lie from a run before; None: nowhere.
        """
        options = self.options
        apart = frozenset({"labels"} if is_encoder_decoder(self.model) else ())
        reader = ExampleReader(
            self.bad,
            1 if name_of(self.loss) in OF_ONE_TOKEN else 2,
            options.seq_len or self.most_tokens(),
            as_mapping(options.fields),
            options.keep_fields,
            options.pad_id,
            apart,
            options.size,
            options.collate is None,
            spool_in,
        )
        self._may_be_unused = batches.may_be_unused if isinstance(batches, MadeAnew) else ()
        self.stored = None if kept_in is None else stored_in(kept_in, batches, reader, self.bad, options.fingerprint)
        if self.stored is None or options.overwrite or not self.stored.restore():
            reader.read(batches.together() if isinstance(batches, MadeAnew) else batches)
        self.examples = reader.examples
        has_tokens = reader.source is None or reader.source.rules.has_tokens
        check_tokens(name_of(self.loss), reader.source)
        longest = max(self.examples.lengths())
        if has_tokens and not is_encoder_decoder(self.model):
            check_positions(self.specs, self.examples)
        width = width_of(self.specs, longest, options.seq_len) if has_tokens else None
        plain = reader.source is None and options.collate is None
        if with_graphs and not plain and options.cuda_graph == "on":
            rule, got = 'be "auto" or "off" for examples with fields', '"on"'
            raise ValueError(broken_rule("collect", "cuda_graph", rule, got, "Leave it out."))
        per_token = any(spec.per == "token" for spec in self.specs)
        if per_token and not has_tokens:
            rule, remedy = 'have input_ids for per="token"', "Leave per= out: a row is an example."
            raise ValueError(broken_rule("collect", "examples", rule, "none", remedy))
        buckets = _buckets(width or (longest if per_token else None), longest) if with_graphs and plain else None
        most = options.batch_examples or (None if has_tokens or options.size is not None else BATCH_EXAMPLES)
        self.batching = Batching(
            options.batch_tokens, width, options.padding_side, options.pad_id, buckets, most,
            reader.sizes or None, reader.source, options.collate, one_width=per_token,
            at_inputs=not has_tokens and options.embedding is None
            and (starts_at_inputs(self.model) or is_encoder_decoder(self.model)),
            next_in_text=self.next_in_text() if self._may_ask_across_texts(reader.source) else None,
        )  # fmt: skip

    def _may_ask_across_texts(self, source: FieldSource | None) -> bool:
        """Whether an example may be of several texts, and the loss ask for the token after each position."""
        names = () if source is None else source.rules.names
        return "position_ids" in names and ("labels" not in names or name_of(self.loss) is None)

    def next_in_text(self) -> bool:
        """Whether the last token of a text has no next one, where an example is of several."""
        return True

    def most_tokens(self) -> int | None:
        """The tokens that an example may have where nobody says; None: any number."""
        return positions_of(self.model)

    def graphs_possible(self, wanted: CudaGraph) -> CudaGraph:
        """Whether steps may run as CUDA graphs; ValueError where they must, and what a step gives isn't in a graph."""
        if not has_functions(self.specs) and all(spec.at is None for spec in self.specs):
            return wanted
        if wanted == "on":
            rule, got = 'be "auto" or "off" where ref is a function, or there is an at=', '"on"'
            raise ValueError(broken_rule("collect", "cuda_graph", rule, got, "Leave it out."))
        return "off"

    @property
    def kept_types(self) -> dict[str, str]:
        """The types of the fields that the row table keeps, by name."""
        source = self.batching.source
        return {} if source is None else {name: source.rules.kept_type(name) for name in self.options.keep_fields}

    def _check_pairs(self) -> None:
        """ValueError where the two texts of a pair aren't kept apart."""
        first = self.examples[0]
        fields = {} if self.batching.source is None else self.batching.source.fetch([first.id])[0]
        if "position_ids" not in fields or self.options.collate is not None:
            rule, got = "be made by preference_pair for loss preference", ", ".join(fields) or "tokens alone"
            remedy = "tlfast.collecting.packing has it; collate= has no place beside it."
            raise ValueError(broken_rule("collect", "examples", rule, got, remedy))
        check_packs(self.model, [{"input_ids": first.input_ids, "position_ids": fields["position_ids"].numpy()}])

    def enter(self, rows: int, specs: Sequence[Spec]) -> Capture:
        """A capture of the model, for so many rows."""
        kind: Any = Capture
        if self.options.lens:
            from ..transformer_lens.capturing import LensCapture as kind
        with keeping(self._projections):
            made: Capture = kind(self.model, CaptureOptions(specs=specs, rows=rows, **taken(TapOptions, self.options)))
        return made if self.squeezes else made.as_written()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model as it must be for all that it does here, and torch deterministic; both as before afterwards."""
        check_left_alone(self.model)
        with (
            alone_with(self.model),
            at_work(self.model, self.options.embedding, self.batching.at_inputs),
            deterministic(self.options.deterministic, self.devices),
        ):
            yield

    def look(self, most: int | None) -> Probed:
        """Try a few examples, at work: `Probe.look`. ``most`` are the examples of a unit at most; None: any number."""
        options = self.options
        probe = Probe(
            self.model, self.enter, self.specs, self.batching, self.loss, self.examples, options.grad_scale, most
        )
        if options.collate is not None:
            check_collate(self.batching, self.examples)
        if self.loss is preference_loss:
            self._check_pairs()
        probed = probe.look()
        check_used(self.batching.use, (*options.keep_fields, *self._may_be_unused))
        if self.loss in (next_token_loss, response_loss) and not self.batching.use.read - {"labels"}:
            check_causal(self.model, self.batching, self.examples)
        return probed
