"""What to keep at which points: the reductions, the dimensions they run over, the stored dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import nn

from .errors import broken_rule

Reduction = Literal["none", "sum", "mean", "last", "norm", "absmax"]
Of = Literal["grad", "act", "grad*act"]
Side = Literal["output", "input"]
Calls = Literal["raise", "sum", "last", "stack"]
Missing = Literal["raise", "nan"]
Attach = Literal["auto", "tensor", "full"]
Backend = Literal["auto", "native", "python"]

Points = str | nn.Module | Sequence[str | nn.Module] | Callable[[str], bool]
Over = str | int | Sequence[str | int]

REDUCTIONS: tuple[str, ...] = get_args(Reduction)
SOURCES: tuple[str, ...] = get_args(Of)
SIDES: tuple[str, ...] = get_args(Side)
OF_PRODUCTS: tuple[str, ...] = ("none", "sum", "mean", "last")  # the reductions that products have
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_DTYPES}
NAMED_DIMS = {"batch": 0, "pos": 1}


def one_of(who: str, argument: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``allowed``; ValueError otherwise."""
    if value not in allowed:
        raise ValueError(
            broken_rule(who, argument, f"be one of {', '.join(allowed)}", repr(value), "Check the spelling.")
        )
    return str(value)


def parse_over(who: str, over: Over) -> tuple[int, ...]:
    """Turn ``over`` ("pos", "batch", ints, or several of them) into a tuple of dimension numbers."""
    items: tuple[object, ...] = tuple(over) if isinstance(over, Iterable) and not isinstance(over, str) else (over,)
    dims: list[int] = []
    for item in items:
        if isinstance(item, str):
            if item not in NAMED_DIMS:
                raise ValueError(
                    broken_rule(
                        who, "over", 'be "batch", "pos" or dimension numbers', repr(item), "Write -1 for the last one."
                    )
                )
            dims.append(NAMED_DIMS[item])
        elif isinstance(item, int) and not isinstance(item, bool):
            dims.append(item)
        else:
            raise TypeError(
                broken_rule(
                    who, "over", 'be "batch", "pos" or dimension numbers', repr(item), "Write -1 for the last one."
                )
            )
    if not dims:
        raise ValueError(
            broken_rule(who, "over", "name at least one dimension", repr(over), 'Use reduce="none" to keep everything.')
        )
    return tuple(dims)


def stored_dtype(who: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that rows are stored as (None: the gradient's), given as it is or by its name."""
    found = DTYPE_NAMES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if found is None or (isinstance(found, torch.dtype) and found in STORED_DTYPES):
        return found
    got = repr(dtype) if isinstance(dtype, str) else dtype
    rule = f"be one of {', '.join(DTYPE_NAMES)} or None"
    raise ValueError(broken_rule(who, "dtype", rule, got, "Choose one of these."))


@dataclass(frozen=True)
class Spec:
    """What to keep at some points.

    Args:
        points: a name, a glob (``*`` stays within one part of a dotted name, ``**`` crosses dots), a module of the
            model, a list of these, or a predicate on names.
        reduce: none, sum, mean, last, norm (L2) or absmax.
        over: the dimensions to reduce: "pos" (1), "batch" (0), numbers, or several; ignored by ``none``. A row is one
            example, or one backward where the batch is reduced too.
        dtype: the stored dtype, or its name; None keeps the gradient's.
        output: which output of the module (index of a tuple, key of a mapping); None is the first tensor. With
            ``side="input"`` which input: the place of a positional one, or the name of one by keyword.
        name: the second part of the column's name where several specs cover one point; default: the reduction. What is
            not of the gradient at the output always has one; default: "act", "grad*act", "input", "input:act", ...
        of: "grad", the gradient with respect to the output; "act", the output itself; or "grad*act", their product
            element by element, which is reduced (none, sum, mean or last) where it is made. Summed over all but the
            batch it is the first-order estimate of what setting the output to zero takes off the metric (attribution
            patching: Nanda, 2023).
        side: "output", or "input": what a module is given. The gradient there is that through this module alone.
            The input of an attention's output projection is the heads' result, that of an MLP's second matrix its
            hidden layer.

    Raises:
        ValueError: for an unknown reduction, dimension, dtype, source or side, and for a norm or maximum of products.

    Example:
        >>> import tlfast
        >>> tlfast.Spec("blocks.*.hook_resid_post", reduce="mean", over="pos").dims
        (1,)
        >>> tlfast.Spec("transformer.h.*", of="grad*act", reduce="sum", over=(1, 2)).label
        'grad*act'
    """

    points: Points
    reduce: Reduction = "none"
    over: Over = "pos"
    dtype: torch.dtype | str | None = None
    output: int | str | None = None
    name: str | None = None
    of: Of = "grad"
    side: Side = "output"

    def __post_init__(self) -> None:
        one_of("Spec", "reduce", self.reduce, REDUCTIONS)
        check_source("Spec", self.of, self.reduce)
        one_of("Spec", "side", self.side, SIDES)
        parse_over("Spec", self.over)
        object.__setattr__(self, "dtype", stored_dtype("Spec", self.dtype))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that are reduced; () for ``none``."""
        return () if self.reduce == "none" else parse_over("Spec", self.over)

    @property
    def label(self) -> str:
        """What tells this spec's columns from another spec's at the same point."""
        if self.name or self.is_plain:
            return self.name or self.reduce
        return ":".join(["input"] * (self.side == "input") + [self.of] * (self.of != "grad"))

    @property
    def is_plain(self) -> bool:
        """Whether it is of the gradient at the output, whose column has the name of the point if it is the only one."""
        return self.of == "grad" and self.side == "output"

    def place(self, point: str) -> str:
        """Which tap it needs: that of the point, or the one at its input."""
        return point if self.side == "output" else f"{point}:input"


def check_source(who: str, of: str, reduce: str) -> None:
    """ValueError for what nothing can be made of, or that can't be reduced so."""
    one_of(who, "of", of, SOURCES)
    if of == "grad*act" and reduce not in OF_PRODUCTS:
        remedy = 'Keep each product by "none", and reduce these by reduce_into.'
        raise ValueError(broken_rule(who, "reduce", "be none, sum, mean or last of products", repr(reduce), remedy))


def sources_of(who: str, of: str | Sequence[str], reduce: str) -> list[Of]:
    """The sources meant by "grad,act", or by a list of words; TypeError or ValueError for anything else."""
    given: object = of
    if not isinstance(given, (str, Sequence)):
        rule = f"be one of {', '.join(SOURCES)}, or a list of them"
        raise TypeError(broken_rule(who, "of", rule, repr(given), 'Say of="act".'))
    words = [part.strip() for part in of.split(",")] if isinstance(of, str) else list(of)
    for word in words or [""]:
        check_source(who, word, reduce)
    return cast(list[Of], list(dict.fromkeys(words)))


def as_specs(
    who: str,
    points: Points | Spec | Sequence[Spec],
    reduce: Reduction,
    over: Over,
    dtype: torch.dtype | str | None,
    output: int | str | None,
    of: str | Sequence[str] = "grad",
    side: Side = "output",
) -> list[Spec]:
    """The specs meant by ``points``: itself, a list of specs, or those made of the rest, one for each source."""
    if isinstance(points, Spec) or (isinstance(points, Sequence) and not isinstance(points, str)):
        given: Sequence[object] = [points] if isinstance(points, Spec) else points
        specs = [p for p in given if isinstance(p, Spec)]
        if specs and len(specs) != len(given):
            raise TypeError(
                broken_rule(who, "points", "be all names or all Specs", list(given), "Wrap the names in a Spec.")
            )
        if specs and (of, side) != ("grad", "output"):
            got, remedy = f"{of!r} and {side!r} beside them", "Say them in each Spec."
            raise ValueError(broken_rule(who, "of and side", "be left out where points are Specs", got, remedy))
        if specs:
            return specs
    one_of(who, "reduce", reduce, REDUCTIONS)  # in the words of the caller, who wrote no Spec
    one_of(who, "side", side, SIDES)
    parse_over(who, over)
    stored_dtype(who, dtype)
    sources = sources_of(who, of, reduce)
    return [Spec(cast(Points, points), reduce, over, dtype, output, of=source, side=side) for source in sources]
