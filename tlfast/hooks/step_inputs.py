"""What a step gives the columns of a capture beside its gradients: masks, factors of products, positions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ..backends.plain import plain
from ..errors import broken_rule
from ..spec import STORED_DTYPES, Spec
from .positions import chosen_mask, positions_of_step, real_positions

Wanted = Mapping[str, tuple[str, Spec]]  # column -> its point and what is kept there


@dataclass(frozen=True)
class StepInputs:
    """As `Capture.batch` is given them."""

    mask: torch.Tensor | None
    masks: Mapping[str, torch.Tensor]
    refs: Mapping[str, torch.Tensor]
    at: Mapping[str, Any]
    batch: Any

    def of_columns(
        self, wanted: Wanted, unmasked: Container[str], recording: bool
    ) -> dict[str, dict[str, torch.Tensor]]:
        """What each column gets of a step, by the names that `Column` has for it.

        ``unmasked`` are the columns that the mask of the step has nothing to do with; ``recording``: the step is
        recorded, so that the host can't look at what a tensor holds.

        Raises:
            ValueError, TypeError: for what is given and means no column, or doesn't fit it, and for what isn't given.
        """
        found: dict[str, dict[str, torch.Tensor]] = {column: {} for column in wanted}
        for column, given in self.masks.items():
            if column not in wanted:
                got, remedy = repr(column), "See `names`."
                raise ValueError(broken_rule("batch", "masks", "name columns of the capture", got, remedy))
            found[column]["own_mask"] = as_mask(f"batch at {column}", given)
        for column, ref in self._refs(wanted).items():
            found[column]["ref"] = ref
        self._check_names(wanted)
        for column, (_, spec) in wanted.items():
            if spec.at is not None:
                mask = found[column].get("own_mask", None if column in unmasked else self.mask)
                found[column] |= self._positions(f"batch at {column}", spec, mask, recording)
        return found

    def _check_names(self, wanted: Wanted) -> None:
        """ValueError for positions that no column asks for, or that one asks for and aren't there."""
        asked = {spec.at: column for column, (_, spec) in wanted.items() if isinstance(spec.at, str)}
        odd = next((name for name in self.at if name not in asked), None)
        if odd is not None:
            rule = f"have names that are the at= of a Spec ({', '.join(asked) or 'there is none'})"
            raise ValueError(broken_rule("batch", "at", rule, repr(odd), "Leave it out, or say at= in the Spec."))
        absent = next((name for name in asked if name not in self.at), None)
        if absent is not None:
            rule, remedy = f"have {absent!r}, of {asked[absent]}", f"Say at={{{absent!r}: positions}}."
            raise ValueError(broken_rule("batch", "at", rule, ", ".join(self.at) or "none", remedy))

    def _positions(self, who: str, spec: Spec, mask: torch.Tensor | None, recording: bool) -> dict[str, torch.Tensor]:
        """The positions of a column in this step, or the mask that chooses them; nothing where its own are all."""
        if recording and (mask is not None or isinstance(spec.at, str)):
            rule, got = "be the same for all examples, and without a mask, in a step that is recorded", repr(spec.at)
            raise RuntimeError(broken_rule(who, "at", rule, got, "Run the step itself."))
        found = None
        if not isinstance(spec.at, str):
            if mask is not None:
                found = real_positions(who, cast("int | tuple[int, ...]", spec.at), mask)
            return {} if found is None else {"at": found}
        given = positions_of_step(who, spec.at, self.at[spec.at])
        if given.dtype == torch.bool:
            return {"own_mask": chosen_mask(who, given, mask)}
        found = None if mask is None else real_positions(who, given, mask)
        return {"at": given if found is None else found}

    def _refs(self, wanted: Wanted) -> dict[str, torch.Tensor]:
        """What the gradients of this step are multiplied with, by column; the constants are there already."""
        found: dict[str, torch.Tensor] = {}
        for key, given in self.refs.items():
            for column in _with_ref(wanted, key):
                if column in found or wanted[column][1].ref is not None:
                    rule, got = f"give {column} one thing to multiply with", "two"
                    remedy = "Say it once: by its column, by its point, or in the Spec."
                    raise ValueError(broken_rule("batch", "refs", rule, got, remedy))
                found[column] = _as_ref(f"batch at {column}", given)
        made = _of_functions(wanted, self.batch)
        found |= made
        if self.batch is not None and not made:
            rule, remedy = "be left out where no Spec has a function for its ref", "Or say ref=function."
            raise ValueError(broken_rule("batch", "batch", rule, f"a {type(self.batch).__name__}", remedy))
        for column, (_, spec) in wanted.items():
            if spec.of == "grad*ref" and spec.ref is None and column not in found:
                remedy = f"Say refs={{{column!r}: tensor}}, or Spec(ref=...)."
                raise ValueError(broken_rule("batch", "refs", f"have one for {column}", "none", remedy))
        return found


@dataclass(frozen=True, eq=False)
class OpenBatch:
    """What holds for the backwards that begin in a block of `Capture.batch`, and the thread that has opened it."""

    mask: torch.Tensor | None
    n_expected: int  # examples; -1: unknown
    scale: float
    own: Mapping[str, Mapping[str, torch.Tensor]]  # by column: see `StepInputs.of_columns`
    thread: int = field(default_factory=threading.get_ident)

    def beside(self, another: OpenBatch) -> RuntimeError:
        """The error for another block while this one is open."""
        rule, got, remedy = "be outside of another batch of this capture", "one inside", "Leave the outer one first."
        if another.thread != self.thread:
            rule, got = "be the only one that is open in a capture", "one beside that of another thread"
            remedy = "Let threads take turns, or have a model and a capture each."
        return RuntimeError(broken_rule("batch", "the block", rule, got, remedy))

    def tell(self, backwards: Any, held: Callable[[str], Iterable[Any]]) -> None:
        """Let it hold from now on; ``held`` says which columns of the engine have a name."""
        own = [
            (column, *(given.get(name) for name in ("own_mask", "ref", "at")))
            for name, given in self.own.items()
            if given
            for column in held(name)
        ]
        backwards.set_batch(self.mask, self.n_expected, self.scale, own)


def as_mask(who: str, given: torch.Tensor) -> torch.Tensor:
    """A mask as plain memory; ValueError for what is none."""
    mask = plain(who, "mask", given)
    if mask.dtype != torch.bool or mask.dim() < 1:
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(broken_rule(who, "mask", "be boolean [B, P]", got, "Use mask.bool()."))
    return mask


def constant_ref(column: str, spec: Spec) -> torch.Tensor | None:
    """The constant that a column's gradients are multiplied with; None where it has none."""
    return _as_ref(f"capture at {column}", spec.ref) if isinstance(spec.ref, torch.Tensor) else None


def has_functions(specs: Iterable[Spec]) -> bool:
    """Whether a step must say what its batch is."""
    return any(spec.ref is not None and not isinstance(spec.ref, torch.Tensor) for spec in specs)


def _as_ref(who: str, given: Any) -> torch.Tensor:
    ref = plain(who, "ref", given)
    if ref.dtype not in STORED_DTYPES:
        rule = "be float32, bfloat16, float16 or float64"
        raise ValueError(broken_rule(who, "ref", rule, ref.dtype, "Cast it first."))
    return ref.detach()


def _with_ref(wanted: Wanted, key: str) -> list[str]:
    """The columns that a key of ``refs`` means: itself, or those of its point."""
    columns = [column for column, (_, spec) in wanted.items() if spec.of == "grad*ref"]
    meant = [column for column in columns if key in (column, wanted[column][0])]
    if not meant:
        there = ", ".join(columns) or "there is none"
        rule, remedy = 'name columns with of="grad*ref", or points of such', f"Columns with a ref: {there}."
        raise ValueError(broken_rule("batch", "refs", rule, repr(key), remedy))
    return meant


def _of_functions(wanted: Wanted, batch: Any) -> dict[str, torch.Tensor]:
    """What the functions of the specs make of a batch, by column: each is called once."""
    columns_of: dict[Any, list[str]] = {}
    for column, (_, spec) in wanted.items():
        if has_functions([spec]):
            columns_of.setdefault(spec.ref, []).append(column)
    if columns_of and batch is None:
        first = next(iter(columns_of.values()))[0]
        rule, remedy = f"be given for the function that is the ref of {first}", "Say cap.batch(batch=...)."
        raise ValueError(broken_rule("batch", "batch", rule, "none", remedy))
    found: dict[str, torch.Tensor] = {}
    for function, columns in columns_of.items():
        with torch.no_grad():
            made: Any = function(batch)
        for column in columns:
            found[column] = _as_ref(f"batch at {column}", _at_point(made, column, wanted[column][0]))
        if isinstance(made, Mapping):
            odd = next((key for key in made if key not in {wanted[column][0] for column in columns}), None)
            if odd is not None:
                rule, remedy = "return tensors for the points of its specs alone", "Leave the others out."
                raise ValueError(broken_rule("batch", "the function that is ref", rule, repr(odd), remedy))
    return found


def _at_point(made: Any, column: str, point: str) -> Any:
    if not isinstance(made, Mapping):
        if not isinstance(made, torch.Tensor):
            rule, got = "return a tensor, or a mapping of one for each point", f"a {type(made).__name__}"
            raise TypeError(broken_rule(f"batch at {column}", "the function that is ref", rule, got, "Check it."))
        return made
    if point not in made:
        rule = f"return a tensor for {point}"
        raise ValueError(
            broken_rule(f"batch at {column}", "the function that is ref", rule, "none", "Add it to the mapping.")
        )
    return made[point]
