"""What the dimensions of a point's gradient are (batch, positions, neither), by their sizes in several batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..backends.reference import normal_dims
from ..errors import broken_rule
from ..spec import Spec


class UncoveredError(ValueError):
    """Where examples are padded, the positions at some ``points`` are no dimension that a mask covers."""

    points: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """The size of a gradient in a batch of B examples and P positions."""

    n_examples: int
    n_positions: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        s = "s" * (self.n_examples != 1)
        return f"{list(self.shape)} for {self.n_examples} example{s} of {self.n_positions} positions"


def has_positions(
    point: str,
    spec: Spec,
    seen: Sequence[Seen],
    pads: bool,
    one_width: bool,
    without_padding: str,
    chooses: bool = False,
) -> bool:
    """Whether dimension 1 of the gradients at a point is that of the positions, which a mask [B, P] covers.

    Args:
        point: its name.
        spec: what is kept there.
        seen: sizes of its gradients in batches of several numbers of examples and positions, as far as there are any.
        pads: some batch of the run is padded.
        one_width: all batches of the run have the same number of positions.
        without_padding: how to go without, for an error.
        chooses: of dimension 1 a few positions are kept, as many of each example.

    Raises:
        ValueError: where the sizes show that the rows would not be what was asked for; an `UncoveredError` where that
            is for padding alone.
    """
    seen = list(dict.fromkeys(seen))
    who, got = f"collect at {point}", ", ".join(map(str, seen))
    n_dims = min(len(one.shape) for one in seen)
    if n_dims == 0 or any(one.shape[0] != one.n_examples for one in seen):
        elsewhere = [d for d in range(1, n_dims) if all(one.shape[d] == one.n_examples for one in seen)]
        remedy = "Leave this point out, or choose one whose module has the batch first."
        if elsewhere and len({one.n_examples for one in seen}) > 1:
            remedy = f"Dimension {elsewhere[0]} is the batch. {remedy}"
        raise ValueError(broken_rule(who, "a gradient", "have the batch as dimension 0", got, remedy))
    if any(len(one.shape) != n_dims for one in seen):
        remedy = "Leave this point out."
        raise ValueError(broken_rule(who, "a gradient", "have as many dimensions in every batch", got, remedy))

    def follows(d: int) -> bool:
        least, most = min(seen, key=lambda one: one.n_positions), max(seen, key=lambda one: one.n_positions)
        if least.n_positions == most.n_positions:
            return least.shape[d] == least.n_positions  # one length shows no more
        return least.shape[d] != most.shape[d]

    following = [d for d in range(1, n_dims) if follows(d)]
    named = [spec.over] if isinstance(spec.over, (str, int)) else spec.over
    if spec.dims and "pos" in named and 1 not in following:
        remedy = 'reduce="none" (--reduce none) keeps all dimensions, over= (--over) takes their numbers.'
        if following:
            where = f"over={following[0]} (--over {following[0]})" + (" with examples of one length" if pads else "")
            remedy = f"The positions are dimension {following[0]}: {where}, or leave this point out."
        raise ValueError(broken_rule(who, 'over="pos"', "mean a dimension 1 that is the positions", got, remedy))
    of_weight = spec.of == "weight"  # whose rows have no positions
    covered = n_dims > 1 + of_weight and all(one.shape[1] == one.n_positions for one in seen)
    if spec.per == "token" and not covered:
        remedy = 'per="example" (--per example) keeps a row for each example.'
        raise ValueError(broken_rule(who, 'per="token"', "mean a dimension 1 that is the positions", got, remedy))
    kept = set(following) - set(normal_dims(who, spec.dims, n_dims + (spec.heads is not None)))
    if chooses or spec.per == "token":
        kept.discard(1)
    if of_weight and spec.per == "example":
        kept = set()
    if kept and not one_width:
        remedy = f"Name dimension {min(kept)} in over= too, or give examples of one length."
        raise ValueError(broken_rule(who, "rows", "have one shape for all lengths", got, remedy))
    if pads and following and (not covered or following != [1]):
        rule = "have the positions, as many as the batch has, as dimension 1 alone where examples are padded"
        error = UncoveredError(broken_rule(who, "a gradient", rule, got, without_padding))
        error.points = (point,)
        raise error
    return covered
