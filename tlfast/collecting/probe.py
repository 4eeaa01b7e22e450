"""The first look, before anything is written: real examples, alone and as the run batches them, and what that shows."""

from __future__ import annotations

import math
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import nn

from ..backends.recipe import Recipe
from ..backends.recipe import Seen as Shown
from ..backends.reference import accumulator
from ..backends.weight import Weight
from ..dataset.format.layout import Column
from ..dataset.format.plan import Example
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..hooks.dimensions import Seen, UncoveredError, has_positions
from ..hooks.freeze import starting_modules
from ..spec import Spec
from .batches import Batch, Batching, PaddingSide
from .fields import DECODED
from .loss import Loss, next_token_loss
from .pack import column_of
from .spool import lengths_of
from .tasks import is_encoder_decoder
from .unit import Runner

Enter = Callable[[int, Sequence[Spec]], Capture]

_ENOUGH_TOKENS = 8  # fewer may give no gradient at some points: a softmax over one position has none
# How much further than in other roundings of the same example a row may be off. Over 150 kinds of causal LM, on both
# sides, in float32 and bfloat16: 0.7 times as far where padding is right, 10 times at least where it isn't.
_MARGIN = 4
_FACTORS = (0.7, 0.8, 0.9)  # of the loss; no powers of two, so that backward is rounded anew
_HOME, _TORCH = (os.path.dirname(path) + os.sep for path in (os.path.dirname(__file__), torch.__file__))
_OF_OURS = re.compile(r"(capture|collect|freeze|stream)( at \S+)?: ")  # how errors begin that hooks of ours raise
_OURS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class Probed:
    """What the first look has shown."""

    columns: dict[str, Column]
    devices: set[torch.device]
    unmasked: set[str]  # columns whose gradients have no positions for a mask to cover
    decoding: set[str]  # of these the ones whose positions are those of a decoder


@dataclass
class _Pass:
    """One forward and backward, and what came out."""

    examples: Sequence[Example]
    n_positions: int
    n_decoded: int | None = None  # positions of a decoder beside an encoder
    seen: dict[str, Seen] = field(default_factory=dict)  # by `Spec.place`; of what fired last: the first call
    sizes: dict[str, float] = field(default_factory=dict)  # by column: the norm of the row of the magnitudes
    n_terms: dict[str, int] = field(default_factory=dict)  # by place: elements of the gradient of one example
    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # by column, where the point fired
    by_mask: set[str] = field(default_factory=set)  # columns whose positions a mask chooses, not their numbers
    error: Exception | None = None
    in_loss: bool = False  # it was raised by the model's forward, or by the loss

    def row(self, column: str, example: Example) -> torch.Tensor | None:
        """The row of an example as float64; None where there is none."""
        number = next((i for i, one in enumerate(self.examples) if one is example), None)
        return None if number is None or column not in self.rows else self.rows[column][number].double()


class Probe:
    """Takes a few of the examples through the model as the run will, each alone and then together.

    Args:
        model, batching, loss, grad_scale: of the run.
        enter: (rows, specs) -> a capture as in the run.
        specs: what the run keeps.
        examples: all of them, one at least.
        most: how many examples a unit has at most; None: any number.
    """

    def __init__(
        self,
        model: nn.Module,
        enter: Enter,
        specs: Sequence[Spec],
        batching: Batching,
        loss: Loss,
        examples: Sequence[Example],
        grad_scale: float = 1.0,
        most: int | None = None,
    ):
        self.model, self.enter, self.specs, self.batching, self.loss = model, enter, specs, batching, loss
        self.grad_scale, self.most, self.examples = grad_scale, most or len(examples), examples
        kept = enter(1, specs)
        self.kept, self.summed_points = kept.wanted, kept.summed_points
        # Of rows that are added up each point's own are looked at.
        self.each = [spec.of_one for spec in specs]
        entered = enter(1, self.each)
        self.wanted, self.routed = entered.wanted, set(entered.routed)
        self.decoding = set[str]()  # columns with a decoder's positions
        first_of: dict[int, Example] = {}
        for k, size in enumerate(lengths_of(examples) if batching.sizes is None else batching.sizes):
            if size not in first_of:
                first_of[size] = examples[k]
        self.by_length = [first_of[length] for length in sorted(first_of)]
        self.short, self.other = self._pair(examples)

    def look(self) -> Probed:
        """Run the model a few times; say what is wrong with the rows, or what they will be.

        Raises:
            ValueError: if the model or a point gives no gradient, not a row for each example, or rows that depend on
                what stands beside them in a batch.
        """
        alone = [self._alone(self.short)]
        if (
            self.other is not None
            and self._size(self.other) != self._size(self.short)
            and (alone[0].seen or not alone[0].error)
        ):
            alone.append(self._alone(self.other))
        if alone[0].n_decoded is not None and all(one.n_decoded == one.n_positions for one in alone):
            alone += self._uneven(self.examples)
        try:
            unmasked = self._unmasked(alone)
        except ValueError:
            self._unmasked([*alone, *self._together(None)])  # says the same, with the sizes of one more batch
            raise
        _raise_first(alone)
        together = self._together(unmasked)
        unmasked = self._unmasked([*alone, *together])
        _raise_first(together)
        for beside in together:
            self._check_rows(alone, beside, unmasked)
        passes = [*alone[::-1], *together] if self.batching.width is None or not together else together
        rows = {column: ring for one in passes for column, ring in one.rows.items()}
        absent = ", ".join(column for column in self.wanted if column not in rows)
        if absent:  # missing="nan", and none of these examples reaches the point
            raise _no_gradient(f"no gradient at {absent} in the first examples")
        for column, points in self.summed_points.items():
            rows[column] = rows[f"{points[0]}:{self.kept[column][1].of_one.label}"]
        return Probed(
            {name: column_of(f"collect at {name}", spec, rows[name]) for name, (_, spec) in self.kept.items()},
            {ring.device for ring in rows.values()}, unmasked, self.decoding,
        )  # fmt: skip

    # Which examples.

    def _size(self, example: Example) -> int:
        return self.batching.size(example)

    @property
    def has_decoder(self) -> bool:
        """Whether a decoder reads other positions than those of the tokens."""
        return is_encoder_decoder(self.model)

    @property
    def has_tokens(self) -> bool:
        """Whether examples have positions, and not a size of another kind, if any."""
        return self.batching.source is None or self.batching.source.rules.has_tokens

    def _n_together(self, length: int) -> int:
        """How many examples a batch holds whose longest has this length."""
        return min(self.batching.n_examples(self.batching.n_positions(length)), self.most)

    def _pair(self, examples: Sequence[Example]) -> tuple[Example, Example | None]:
        """Two examples of few tokens, of different lengths if there are any; None where there is but one."""
        if len(self.by_length) == 1:
            return examples[0], examples[1] if len(examples) > 1 else None
        below = self.by_length[:-1]
        short = next((one for one in below if self._size(one) >= _ENOUGH_TOKENS), below[-1])
        longer = [one for one in self.by_length if self._size(one) > self._size(short)]
        fitting = [one for one in longer if self._n_together(self._size(one)) > 1]
        twice = [one for one in fitting if self._size(one) >= 2 * self._size(short)]  # much padding shows more
        return short, (twice[:1] or fitting[-1:] or longer[:1])[0]

    @property
    def pads(self) -> bool:
        """Whether some batch of the run is padded."""
        if not self.has_tokens:
            return False
        lengths = [self._size(example) for example in self.by_length]
        if any(self.batching.n_positions(length) > length for length in lengths):
            return True
        return len(lengths) > 1 and self._n_together(lengths[1]) > 1

    # The passes.

    def _alone(self, example: Example, factor: float = 1.0) -> _Pass:
        """An example by itself, without padding."""
        buckets = (
            None if self.batching.buckets is None else (self._size(example),)
        )  # a batch of graphs has a mask, always
        return self._pass([example], replace(self.batching, width=None, buckets=buckets), None, factor)

    def _together(self, unmasked: set[str] | None, side: PaddingSide | None = None) -> list[_Pass]:
        """The examples as the run has them in a batch; nothing where that is what `_alone` does.

        ``unmasked`` are the columns without a mask; None: all.
        """
        batching = replace(self.batching, padding_side=side or self.batching.padding_side)
        if self.other is not None and self._n_together(self._size(self.other)) > 1:
            return [self._pass([self.other, self.short], batching, unmasked)]
        if batching.n_positions(self._size(self.short)) > self._size(self.short):
            return [self._pass([self.short], batching, unmasked)]
        return []

    def _pass(
        self, examples: Sequence[Example], batching: Batching, unmasked: set[str] | None, factor: float = 1.0
    ) -> _Pass:
        done = _Pass(examples, batching.n_positions(max(map(self._size, examples))))
        batch = batching.batch(examples, done.n_positions)
        if self.has_tokens:  # a collate= may pad to more
            done.n_positions = batch.input_ids.shape[1]
        done.n_decoded = batch.n_decoded if self.has_decoder else None
        # As wide as the gradients: what the cast to the stored type rounds away has nothing to do with padding.
        cap = self.enter(len(examples), [replace(spec, dtype=None) for spec in self.each])
        columns_at: dict[str, list[str]] = {}
        for column, (point, spec) in self.wanted.items():
            columns_at.setdefault(spec.place(point), []).append(column)

        def see(place: str, grad: torch.Tensor, act: torch.Tensor | None, kept: list[torch.Tensor]) -> None:
            of_input = iter(kept)
            done.seen[place] = Seen(len(examples), done.n_positions, tuple(grad.shape))
            done.n_terms[place] = grad.numel() // max(1, len(examples))
            done.by_mask |= {column for column in columns_at[place] if cap.given(column).own_mask}
            for column in columns_at[place] if len(examples) == 1 and grad.dim() else ():
                point, spec = self.wanted[column]
                at = () if isinstance(spec.at, str) else spec.at
                if spec.of == "weight":
                    weight = Weight(*cap.weights[column])
                    recipe = Recipe(f"collect at {point}", "none", (), None, "weight", weight=weight)
                    shown = Shown(grad, next(of_input))
                else:
                    recipe = Recipe(f"collect at {point}", spec.reduce, spec.dims, None, spec.of, spec.heads, at)
                    shown = Shown(grad, act)
                size = recipe.size(shown, cap.given(column)).double().norm().item()
                scale = 1.0 if spec.of == "act" else 1 / (self.grad_scale * factor)
                done.sizes[column] = done.sizes.get(column, 0.0) + size * scale

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            done.in_loss = True
            found = self.loss(model, batch)
            done.in_loss = False
            return found

        try:
            with cap.unmasked(self.wanted if unmasked is None else unmasked).watched(see):
                runner = Runner(self.model, cap, batching, loss, self.grad_scale * factor, decoding=self.decoding)
                runner.step(batch.to(runner.device))
                missing = cap.missing
                done.rows = {column: cap.ring(column) for column in cap.names if not missing[column].any()}
        except torch.OutOfMemoryError:
            raise
        except _OURS as error:
            done.error = error
        return done

    # What they show.

    def _unmasked(self, passes: Sequence[_Pass]) -> set[str]:
        """The columns that a mask has nothing to do with; ValueError where dimensions are not what they should be.

        An `UncoveredError` names all points of its kind, where nothing else is wrong.
        """
        one_width = self.batching.width is not None or len(self.by_length) == 1
        unmasked, uncovered = set[str](), list[UncoveredError]()
        for column, (point, spec) in self.wanted.items():
            if column in self.routed:  # which has other positions, and none that are padding
                unmasked.add(column)
                continue
            place = spec.place(point)
            there = [one for one in passes if place in one.seen]
            seen, width = [one.seen[place] for one in there], one_width
            if self._decodes(there, place):
                if spec.per == "token":
                    rule, remedy = "have the positions of input_ids", 'Leave per="token" out at points of a decoder.'
                    raise ValueError(broken_rule(f"collect at {point}", "tokens", rule, "those of a decoder", remedy))
                self.decoding.add(column)
                unmasked.add(column)  # by the mask of the encoder
                seen = [replace(one.seen[place], n_positions=one.n_decoded or 0) for one in there]
                width = any(self.batching.source.rules.one_shape(name) for name in DECODED if self.batching.source)
            chooses = spec.at is not None and not any(column in one.by_mask for one in there)
            try:
                covered = not seen or has_positions(
                    point, spec, seen, self.pads, width, self._without_padding(), chooses
                )
            except UncoveredError as error:
                uncovered.append(error)
                continue
            if not covered:
                unmasked.add(column)
                if spec.at is not None and self.has_tokens:
                    rule, got = "have the positions as dimension 1 where there is an at=", ", ".join(map(str, seen))
                    raise ValueError(broken_rule(f"collect at {point}", "a gradient", rule, got, "Leave it out."))
        if uncovered:
            uncovered[0].points = tuple(dict.fromkeys(point for error in uncovered for point in error.points))
            raise uncovered[0]
        return unmasked

    def _decodes(self, passes: Sequence[_Pass], place: str) -> bool:
        """Whether the positions at a place are those of a decoder, and not of the tokens that an encoder reads."""
        sizes = [(one.seen[place].shape[1:2], one.n_decoded, one.n_positions) for one in passes]
        return any(decoded != read for _, decoded, read in sizes) and all(shape == (n,) for shape, n, _ in sizes)

    def _uneven(self, examples: Sequence[Example]) -> list[_Pass]:
        """The first example that is of other lengths in the encoder and in the decoder; none where all are alike."""
        for example in examples:
            batch = self.batching.batch([example], self.batching.n_positions(self._size(example)))
            if batch.n_decoded != example.length:
                return [self._alone(example)]
        return []

    def _without_padding(self) -> str:
        if self.batching.width is not None:
            return f"Give examples of {self.batching.width} tokens each."
        graphs = ' with cuda_graph="off" (--cuda-graph off)' if self.batching.buckets is not None else ""
        return f"Give examples of one length, or one a batch: batch_tokens=1 (--batch-tokens 1){graphs}."

    def _check_rows(self, alone: Sequence[_Pass], together: _Pass, unmasked: set[str]) -> None:
        """ValueError where a row isn't that of its example alone, by more than rounding explains."""
        side = self.batching.padding_side
        rounding = self._explained(alone)
        found = self._worst(alone, together, side, rounding)
        if found is None:
            return
        rounding = self._measured(alone, rounding)
        found = self._worst(alone, together, side, rounding)
        if found is None:
            return
        column, off, explained = found
        lengths = " and ".join(str(self._size(example)) for example in together.examples)
        got = f"a row at {column} that is off by {off:.2g} of its size, where rounding explains {explained:.2g}"
        if not self.pads:
            remedy = "The loss must be a sum over examples; batch_tokens=1 (--batch-tokens 1) takes each alone."
            got += f" (a batch of {f'{lengths} tokens' if self.has_tokens else len(together.examples)})"
            if not self.has_tokens:
                remedy = (
                    "The loss must be a sum over examples, and no mean go over what pads shorter ones (--reduce sum);"
                    " batch_examples=1 (--batch-examples 1) takes each alone."
                )
        else:
            remedy = self._without_padding()
            other: PaddingSide = "right" if side == "left" else "left"
            turned = self._together(unmasked, other)
            if all(not one.error and self._worst(alone, one, other, rounding) is None for one in turned):
                remedy = f'padding_side="{other}" (--padding-side {other}) gives the right rows. Or: {remedy}'
            if self.loss is not next_token_loss:
                remedy = f"Check that the loss is a sum over examples, and gives the model batch.mask. Or: {remedy}"
            got += f" (a batch of {lengths} tokens, padded on the {side} to {together.n_positions})"
        raise ValueError(broken_rule("collect", "a row", "be the same as with its example alone", got, remedy))

    def _explained(self, alone: Sequence[_Pass]) -> dict[str, float]:
        """How far rounding may move a row, by column, where it is rounded once and summed once."""
        largest: dict[str, float] = {}  # of gradients, and apart from them of activations, say, which have other sizes
        for one in alone:
            for column, size in one.sizes.items():
                of = self.wanted[column][1].of
                largest[of] = max(largest.get(of, 0.0), size)
        moved: dict[str, float] = {}
        for column, (point, spec) in self.wanted.items():
            for one in (one for one in alone if column in one.rows):
                dtype = one.rows[column].dtype
                # Models compute parts in float32 whatever their type is.
                eps = max(torch.finfo(accumulator(dtype)).eps, torch.finfo(torch.float32).eps)
                relative = torch.finfo(dtype).eps / 2 + math.sqrt(one.n_terms[spec.place(point)]) * eps
                moved[column] = max(moved.get(column, 0.0), relative * one.sizes[column] + eps * largest[spec.of])
        return moved

    def _measured(self, alone: Sequence[_Pass], rounding: dict[str, float]) -> dict[str, float]:
        """The same, with how far rows do move where everything is rounded in other ways."""
        noise: dict[str, float] = {}
        for number, factor in enumerate(_FACTORS):
            with _shaken(self.model, number):
                again = self._alone(self.short, factor)
            for column in alone[0].rows.keys() & again.rows.keys():
                off = _distance(alone[0].rows[column][0], again.rows[column][0], "right")
                noise[column] = max(noise.get(column, 0.0), off)
        sizes = {column: max(one.sizes.get(column, 0.0) for one in alone) for column in noise}
        # Of a row of few values, chance may make it small: so at least what is usual at the others.
        usual = median([off / alone[0].sizes[c] for c, off in noise.items() if alone[0].sizes[c]] or [0.0])
        return {
            column: least + _MARGIN * max(usual * sizes[column], noise[column] * sizes[column] / alone[0].sizes[column])
            if alone[0].sizes.get(column) and column in noise else least
            for column, least in rounding.items()
        }  # fmt: skip

    def _worst(
        self, alone: Sequence[_Pass], together: _Pass, side: str, rounding: dict[str, float]
    ) -> tuple[str, float, float] | None:
        """(column, how far off, how far rounding explains) of the row furthest off, in parts of its size; None."""
        worst = None
        for one in alone:
            for column, explained in rounding.items():
                true, found = one.row(column, one.examples[0]), together.row(column, one.examples[0])
                if true is None or found is None:
                    continue
                off, size = _distance(true, found, side), true[true.isfinite()].norm().item() or math.inf
                if not off <= explained and (worst is None or off / size > worst[1]):
                    worst = column, off / size, explained / size
        return worst


def _distance(true: torch.Tensor, found: torch.Tensor, side: str) -> float:
    """The norm of the difference of two rows, the second of which may be padded; inf where it alone isn't finite."""
    for d, n in enumerate(true.shape):
        if found.shape[d] > n:
            found = found.narrow(d, found.shape[d] - n if side == "left" else 0, n)
    finite = true.isfinite()
    off = torch.where(finite, found.double() - true.double(), 0.0).norm().item()
    return off if math.isfinite(off) else math.inf


@contextmanager
def _shaken(model: nn.Module, seed: int) -> Iterator[None]:
    """Change each value of the embeddings by one rounding at most, up or down, so that all after it is rounded anew."""
    draw = torch.Generator().manual_seed(seed)

    def shake(module: nn.Module, args: object, output: object) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        step = torch.randint(-1, 2, output.shape, generator=draw).to(output.device)
        return output + output * (step * torch.finfo(output.dtype).eps).to(output.dtype)

    modules = {module for module in model.modules() if isinstance(module, nn.Embedding)}
    handles = [module.register_forward_hook(shake) for module in {*starting_modules(model), *modules}]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _no_gradient(reason: str) -> ValueError:
    rule = "give a gradient at every point, one row for each example"
    remedy = "Check that the model can run backward, and the points."
    if "deterministic" in reason:
        remedy = 'deterministic="warn" (--deterministic warn) runs it; a resumed run may then differ in last bits.'
    return ValueError(broken_rule("collect", "model", rule, f"<{reason}>", remedy))


def _raise_first(passes: Sequence[_Pass]) -> None:
    for one in passes:
        if one.error is not None:
            if str(one.error).startswith("collect: "):  # it says already what is wrong with the loss
                raise one.error
            reason = " ".join(str(one.error).split())
            if one.in_loss and "deterministic" not in reason and not _OF_OURS.match(reason):
                rule, remedy = (
                    "take the first examples without an error",
                    "The examples must fit the model, and the loss.",
                )
                got = f"{type(one.error).__name__} in {_place_of(one.error)}: {reason[:300]}"
                raise ValueError(broken_rule("collect", "the model and the loss", rule, got, remedy)) from one.error
            raise _no_gradient(reason) from one.error


def _place_of(error: Exception) -> str:
    """The line of the model's code, or the loss's, at which an error came: the last one that isn't torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    found = next((one for one in reversed(frames) if not one.filename.startswith((_TORCH, _HOME))), frames[-1])
    return f"{found.name}, line {found.lineno} of {os.path.basename(found.filename)}"
