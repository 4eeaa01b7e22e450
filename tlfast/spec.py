"""What to keep at which points: the reductions, the dimensions they run over, the stored dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from .errors import broken_rule
from .errors import one_of as one_of  # a name of this module, too
from .projections.projection import Projection, as_projection

Reduction = Literal["none", "sum", "mean", "last", "norm", "absmax"]
Of = Literal["grad", "act", "grad*act", "grad*ref", "weight"]
Side = Literal["output", "input"]
Per = Literal["example", "token"]
Encoding = Literal[
    "int8", "int8:64", "float8_e4m3fn", "int4:64", "int8:stochastic", "int8:64:stochastic", "float8_e4m3fn:stochastic",
    "int4:64:stochastic",
]  # fmt: skip
Calls = Literal["raise", "sum", "last", "stack"]
Missing = Literal["raise", "nan"]
Attach = Literal["auto", "tensor", "full"]
Backend = Literal["auto", "native", "python"]

Points = str | nn.Module | Sequence[str | nn.Module] | Callable[[str], bool]
Over = str | int | Sequence[str | int]
Ref = torch.Tensor | Callable[[Any], Any]
Heads = tuple[int, int]
At = int | str | Sequence[int]
Project = int | Projection
Query = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Queries = Query | Mapping[str, Query]
Normalizing = Any  # a normalizer, or a mapping from points to such: tlfast.hooks.normalizers, which stands above this

REDUCTIONS: tuple[str, ...] = get_args(Reduction)
SOURCES: tuple[str, ...] = get_args(Of)
SIDES: tuple[str, ...] = get_args(Side)
PRODUCTS: tuple[str, ...] = ("grad*act", "grad*ref")
ENCODINGS: tuple[str, ...] = get_args(Encoding)
OF_PRODUCTS: tuple[str, ...] = ("none", "sum", "mean", "last")  # the reductions that products have
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_DTYPES}
NAMED_DIMS = {"batch": 0, "pos": 1}


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
        of: "grad", the gradient with respect to the output; "act", the output itself; "grad*act", their product
            element by element; "grad*ref", that of the gradient with a tensor; or "weight", the gradient of the
            module's weight for each example, G = sum over positions of g a^T [O, I], where a is the input; of which
            reduce="norm" keeps the norm alone, never negative, and per="token" the two factors (g, a) side by side, or
            the norm of each token's.
            Products are reduced (none, sum, mean or last) where they are made. Summed over all but the batch, the first
            is the first-order estimate of what setting the output to zero takes off the metric, sum(g * a); the second,
            with ref = patched - a, of what patching adds to it (attribution patching: Nanda, 2023).
        side: "output", or "input": what a module is given. The gradient there is that through this module alone.
            The input of an attention's output projection is the heads' result, that of an MLP's second matrix its
            hidden layer.
        ref: what "grad*ref" multiplies with, of float numbers, in a shape that broadcasts to the gradient's ([D],
            [P, D], [B, 1, D], ...): a tensor, a constant that no step changes; or a function of the step's batch, which
            returns one, or a mapping of one for each point; None: each step gives it, ``cap.batch(refs=)``.
        heads: (n, d): the last dimension, of n * d, is taken as [n, d] before ``over`` is read, so that over=(1, -1) of
            [B, P, n * d] leaves [B, n].
        at: the positions to keep, of dimension 1. A number, whose dimension a row hasn't, or a list of them, [k, ...]:
            with a mask they count the real tokens of each example, from 0 or from -1, the last; without one all
            positions. Or a name, by which each step gives them: ``cap.batch(at={name: ...})``, in a collection the
            field of this name. ``over`` counts dimensions as if all positions were there, and so reduces the kept ones.
        per: "example", or "token": each real token has a row, and padding has none. Only dimensions behind the
            positions can be reduced then.
        encoding: how rows are stored in a dataset: None, as they are; "int8", "int8:64", "float8_e4m3fn" or "int4:64",
            as `tlfast.dataset.Column` has them, perhaps with ":stochastic" behind it. What is encoded are the rows as
            ``dtype`` has them, not float64.
        project: of "weight": how many numbers each side is projected to, or a `Projection`: rows are L G R^T
            [dim, dim] then, the dot product of two of which is that of the gradients, on average (Johnson and
            Lindenstrauss). None: rows are G itself. A norm has a vector for its weight, an embedding must be projected.
        bias: of "weight": with the gradient of the bias as the last column of G, where the module has one.
        queries: of "weight": rows are the dot products of G with these, [Q], and with per="token" those of each token's
            gradient. A tensor [Q, *shape of a row without queries], [Q, O, I] of a matrix G; or two factors U [Q, O, r]
            and V [Q, r, I], of which a query is the product U V: those of a query example's tokens are its gradient's.
            Of several points a mapping from the name of each. A constant that no step changes. What is computed is the
            form with the fewest multiplications: that of G first, of the query with the input first, or of the factors.
        normalizer: of "weight": what divides G, before it is projected, by the size that an optimizer has seen at each
            place: an `AdamNormalizer` or `AdafactorNormalizer` of `tlfast.hooks.normalizers`, of one point; or a
            mapping to such from the name of each, as `tlfast.read_optimizer` and `Factors.normalizers` return it, which
            may have others, too. Its tensors are part of a dataset's identity.
        summed: of "weight" with a one-sided projection: the rows of all points added up in their order, one column
            ``gradients:weight`` [dim]. Each module has a matrix of its own, so this is one projection of all weights.

    Raises:
        ValueError, TypeError: for an unknown reduction, dimension, dtype, source, side or encoding, for a norm or
            maximum of products, for a ref that isn't one or isn't read, for heads and at that are none, for
            ``per="token"`` with chosen positions or a reduction over them, and for what weight gradients don't have.

    Example:
        >>> import tlfast
        >>> tlfast.Spec("blocks.*.hook_resid_post", reduce="mean", over="pos").dims
        (1,)
        >>> tlfast.Spec("transformer.h.*", of="grad*act", reduce="sum", over=(1, 2)).label
        'grad*act'
        >>> tlfast.Spec("h.*.attn.c_proj", "sum", (1, -1), of="grad*act", side="input", heads=(12, 64), at=[-1]).at
        (-1,)
    """

    points: Points
    reduce: Reduction = "none"
    over: Over = "pos"
    dtype: torch.dtype | str | None = None
    output: int | str | None = None
    name: str | None = None
    of: Of = "grad"
    side: Side = "output"
    ref: Ref | None = None
    heads: Heads | None = None
    at: At | None = None
    per: Per = "example"
    encoding: Encoding | None = None
    project: Project | None = None
    bias: bool = False
    queries: Queries | None = None
    normalizer: Normalizing | None = None
    summed: bool = False

    def __post_init__(self) -> None:
        one_of("Spec", "reduce", self.reduce, REDUCTIONS)
        check_source("Spec", self.of, self.reduce)
        one_of("Spec", "side", self.side, SIDES)
        parse_over("Spec", self.over)
        check_ref("Spec", [self.of], self.ref)
        object.__setattr__(self, "heads", as_heads("Spec", self.heads))
        object.__setattr__(self, "at", as_positions("Spec", self.at))
        object.__setattr__(self, "dtype", stored_dtype("Spec", self.dtype))
        check_weight("Spec", [self.of], self.project, self.bias, self.normalizer, self.summed)
        if self.of == "weight":
            given = {"over": self.over, "output": self.output, "side": self.side, "at": self.at}
            check_of_weight("Spec", self.reduce, given)
        check_queries("Spec", self.of, self.reduce, self.queries)
        check_summed("Spec", self.summed, self.project, self.reduce, self.per, self.heads, self.queries)
        check_rows_kept("Spec", self.per, self.dims, self.encoding, self.dtype)
        if self.per == "token" and self.at is not None:
            rule, remedy = 'be left out with per="token"', 'Keep chosen positions by reduce="none", or all tokens.'
            raise ValueError(broken_rule("Spec", "at", rule, repr(self.at), remedy))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that are reduced; () for ``none``."""
        return () if self.reduce == "none" or self.of == "weight" else parse_over("Spec", self.over)

    @property
    def label(self) -> str:
        """What tells this spec's columns from another spec's at the same point."""
        if self.name or self.is_plain:
            return self.name or self.reduce
        kept = ["norm"] * (self.of == "weight" and self.reduce == "norm") + ["scores"] * (self.queries is not None)
        return ":".join(["input"] * (self.side == "input") + [self.of] * (self.of != "grad") + kept)

    @property
    def projection(self) -> Projection | None:
        """What projects the weight gradients."""
        return None if self.project is None else as_projection("Spec", self.project)

    @property
    def is_plain(self) -> bool:
        """Whether it is of the gradient at the output, whose column has the name of the point if it is the only one."""
        return self.of == "grad" and self.side == "output"

    @property
    def reads_act(self) -> bool:
        """Whether the output, or the input, is kept for the backward."""
        return self.of in ("act", "grad*act")

    @property
    def of_one(self) -> Spec:
        """What makes the rows of one point of those that are summed."""
        return replace(self, summed=False, name=f"{self.label}, to be summed") if self.summed else self

    def place(self, point: str) -> str:
        """Which tap it needs: that of the point, or the one at its input, or at what the layer itself puts out."""
        if self.of == "weight":
            return f"{point}:weight"
        return point if self.side == "output" else f"{point}:input"


def check_source(who: str, of: str, reduce: str) -> None:
    """ValueError for what nothing can be made of, or that can't be reduced so."""
    one_of(who, "of", of, SOURCES)
    if of in PRODUCTS and reduce not in OF_PRODUCTS:
        remedy = 'Keep each product by "none", and reduce these by reduce_into.'
        raise ValueError(broken_rule(who, "reduce", "be none, sum, mean or last of products", repr(reduce), remedy))


def check_ref(who: str, of: Sequence[str], ref: object) -> None:
    """An error for what gradients can't be multiplied with, or where none of the sources is a product with it."""
    if ref is None:
        return
    if "grad*ref" not in of:
        rule, remedy = 'be left out unless of="grad*ref"', 'Say of="grad*ref", or leave it out.'
        raise ValueError(broken_rule(who, "ref", rule, f"one with of={', '.join(of)!r}", remedy))
    if isinstance(ref, torch.Tensor):
        if ref.dtype not in STORED_DTYPES:
            raise ValueError(broken_rule(who, "ref", f"be {', '.join(DTYPE_NAMES)}", ref.dtype, "Cast it first."))
    elif not callable(ref):
        remedy = "Pass a tensor, or a function of the step's batch."
        raise TypeError(broken_rule(who, "ref", "be a tensor or a function", type(ref).__name__, remedy))


def check_weight(
    who: str, of: Sequence[str], project: object, bias: object, normalizer: object = None, summed: object = False
) -> None:
    """An error for settings of weight gradients that are none, or where none of the sources is one."""
    for argument, given in (("bias", bias), ("summed", summed)):
        if not isinstance(given, bool):
            raise TypeError(broken_rule(who, argument, "be True or False", repr(given), f"Say {argument}=True."))
    settings = {"project": project, "bias": bias or None, "normalizer": normalizer, "summed": summed or None}
    for argument, given in settings.items():
        if given is not None and "weight" not in of:
            rule, remedy = 'be left out unless of="weight"', 'Say of="weight", or leave it out.'
            raise ValueError(broken_rule(who, argument, rule, f"one with of={', '.join(of)!r}", remedy))
    if project is not None:
        as_projection(who, cast(Any, project))


def check_queries(who: str, of: str, reduce: str, queries: object) -> None:
    """An error for what are no queries of weight gradients, or where a row is none of these."""
    if queries is None:
        return
    if of != "weight" or reduce != "none":
        rule = 'be left out unless of="weight", reduce="none"'
        got = f"some with of={of!r}, reduce={reduce!r}"
        raise ValueError(broken_rule(who, "queries", rule, got, "Norms and scores are two Specs."))
    given = list(queries.values()) if isinstance(queries, Mapping) else [queries]
    names = list(queries) if isinstance(queries, Mapping) else []
    if not given or any(not isinstance(name, str) for name in names):
        rule, got = "have the names of points", repr(names)
        raise TypeError(broken_rule(who, "queries", rule, got, "Write {point: tensor}."))
    for one in given:
        parts = [one] if isinstance(one, torch.Tensor) else list(one) if isinstance(one, (tuple, list)) else []
        good = [part for part in parts if isinstance(part, torch.Tensor) and part.dtype in STORED_DTYPES]
        if len(good) != len(parts) or len(parts) != (1 if isinstance(one, torch.Tensor) else 2):
            got = str(one.dtype) if isinstance(one, torch.Tensor) else type(one).__name__
            rule, remedy = "be tensors of floats, or pairs of them", "Write queries=tensor, or (U, V)."
            raise TypeError(broken_rule(who, "queries", rule, got, remedy))


def check_summed(
    who: str, summed: bool, project: Project | None, reduce: str, per: str, heads: object, queries: object = None
) -> None:
    """ValueError for a sum over modules of rows that aren't one-sided projections of whole gradients."""
    one_sided = project is not None and as_projection(who, project).form == "one-sided"
    plain = reduce == "none" and per == "example" and heads is None and queries is None
    if summed and not (one_sided and plain):
        rule = "be left out unless rows are one-sided projections, of whole examples"
        got = f"True with project={project!r}, reduce={reduce!r}, per={per!r}"
        remedy = (
            'Say project=Projection(dim, form="one-sided") (--project dim=4096,kind=count-sketch,form=one-sided), and '
            "no reduce=, heads=, per= or queries=."
        )
        raise ValueError(broken_rule(who, "summed", rule, got, remedy))


def check_of_weight(who: str, reduce: str, given: Mapping[str, object]) -> None:
    """ValueError for what weight gradients don't have; each argument is None or its default where it isn't given."""
    if reduce not in ("none", "norm"):
        remedy = "A row is the gradient of one example's loss, summed over positions already."
        raise ValueError(broken_rule(who, "reduce", "be none or norm of weight gradients", repr(reduce), remedy))
    for argument, value in given.items():
        if value not in (None, "pos", ["pos"], "output"):  # a list is what the command makes of its default
            rule, remedy = "be left out of weight gradients", "They have no positions and one side: leave it out."
            raise ValueError(broken_rule(who, argument, rule, repr(value), remedy))


def as_heads(who: str, heads: object) -> Heads | None:
    """The number of heads and the size of each; TypeError or ValueError for what isn't that."""
    if heads is None:
        return None
    pair = [_whole(part) for part in heads] if isinstance(heads, (tuple, list)) else []
    if len(pair) != 2 or any(part is None or part < 1 for part in pair):
        remedy = "Say heads=(n_heads, d_head)."
        raise ValueError(broken_rule(who, "heads", "be (n, d), two positive numbers", repr(heads), remedy))
    return cast(Heads, tuple(pair))


def as_positions(who: str, at: object) -> int | str | tuple[int, ...] | None:
    """A position, several, or the name by which each step gives them; TypeError or ValueError for what isn't that."""
    if at is None or (isinstance(at, str) and at):
        return at
    several = isinstance(at, Sequence) and not isinstance(at, str)
    found = [_whole(part) for part in (cast("Sequence[Any]", at) if several else [at])]
    if not found or None in found:
        rule = "be a position, a list of them, or the name by which each step gives them"
        remedy = "Those of each example go into cap.batch(at={name: ...})."
        raise TypeError(broken_rule(who, "at", rule, repr(at), remedy))
    numbers = cast("list[int]", found)
    return tuple(numbers) if several else numbers[0]


def _whole(given: Any) -> int | None:
    """A whole number; None for what is none, such as a bool or a tensor."""
    if isinstance(given, (bool, torch.Tensor)):
        return None
    try:
        return index(given)
    except TypeError:
        return None


def check_rows_kept(
    who: str, per: str, dims: Sequence[int], encoding: str | None, dtype: torch.dtype | str | None
) -> None:
    """ValueError where there is no row for each token, or none that can be encoded so."""
    one_of(who, "per", per, get_args(Per))
    if per == "token" and any(dim < -1 or dim in (0, 1) for dim in dims):
        rule = 'be behind the positions with per="token": -1, or 2 and more'
        raise ValueError(broken_rule(who, "over", rule, list(dims), 'reduce="none" keeps all of a token\'s row.'))
    if encoding is None:
        return
    one_of(who, "encoding", encoding, ENCODINGS)
    if stored_dtype(who, dtype) is torch.float64:
        rule, remedy = "be float32, bfloat16 or float16 where rows are encoded", "Leave dtype= out, or encoding=."
        raise ValueError(broken_rule(who, "dtype", rule, torch.float64, remedy))


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


def _given_specs(who: str, points: object) -> list[Spec]:
    """The specs that were given in place of points; TypeError where others stand among them."""
    if isinstance(points, Spec):
        return [points]
    if not isinstance(points, Sequence) or isinstance(points, str):
        return []
    specs = [point for point in points if isinstance(point, Spec)]
    if specs and len(specs) != len(points):
        rule, remedy = "be all names or all Specs", "Wrap the names in a Spec."
        raise TypeError(broken_rule(who, "points", rule, list(points), remedy))
    return specs


@dataclass(frozen=True)
class SpecArguments:
    """What callers say beside points, of which specs are made: as in `Spec`, but ``of`` may be several sources."""

    reduce: Reduction = "none"
    over: Over = "pos"
    dtype: torch.dtype | str | None = None
    output: int | str | None = None
    of: str | Sequence[str] = "grad"
    side: Side = "output"
    ref: Ref | None = None
    heads: Heads | None = None
    at: At | None = None
    per: Per = "example"
    encoding: Encoding | None = None
    project: Project | None = None
    bias: bool = False
    normalizer: Normalizing | None = None
    summed: bool = False


def _check_nothing_beside(who: str, given: SpecArguments, defaults: SpecArguments) -> None:
    """ValueError for what is said beside Specs, and so of none of them."""
    for field in fields(SpecArguments):
        value, default = getattr(given, field.name), getattr(defaults, field.name)
        if not isinstance(value, type(default)) or value != default:
            got = f"{'one' if field.name in ('ref', 'normalizer') else repr(value)} beside them"
            rule, remedy = "be left out where points are Specs", "Say it in each Spec."
            raise ValueError(broken_rule(who, field.name, rule, got, remedy))


_NOTHING = SpecArguments()


def as_specs(
    who: str,
    points: Points | Spec | Sequence[Spec],
    given: SpecArguments = _NOTHING,
    defaults: SpecArguments = _NOTHING,
) -> list[Spec]:
    """The specs meant by ``points``: itself, a list of specs, or those made of the rest, one for each source.

    A token's row has one position: its sum, mean or last row over the positions is the row itself. ``defaults`` are the
    caller's own, which nobody has given.
    """
    if specs := _given_specs(who, points):
        _check_nothing_beside(who, given, defaults)
        return specs
    reduce, over, per, summed = given.reduce, given.over, given.per, given.summed
    project, bias, normalizer = given.project, given.bias, given.normalizer
    one_of(who, "reduce", reduce, REDUCTIONS)  # in the words of the caller, who wrote no Spec
    one_of(who, "side", given.side, SIDES)
    parse_over(who, over)
    stored_dtype(who, given.dtype)
    sources = sources_of(who, given.of, reduce)
    weight_reduce: Reduction = "norm" if reduce == "norm" else "none"  # where others are kept beside weights
    check_ref(who, sources, given.ref)
    check_weight(who, sources, project, bias, normalizer, summed)
    if "weight" in sources:
        said = parse_over(who, over) != (1,)  # more than the default, which the command says as a list
        alone = {"over": over if said else None} if sources == ["weight"] else {}
        kept = "none" if reduce == defaults.reduce or not alone else reduce  # the default is of others
        check_of_weight(who, kept, {"output": given.output, "side": given.side, "at": given.at, **alone})
        check_summed(who, summed, project, weight_reduce, per, given.heads)
    as_heads(who, given.heads)
    as_positions(who, given.at)
    if per == "token" and reduce in ("sum", "mean", "last") and parse_over(who, over) == (1,):
        reduce = "none"
    check_rows_kept(who, per, () if reduce == "none" else parse_over(who, over), given.encoding, given.dtype)
    of_all = {name: getattr(given, name) for name in ("dtype", "output", "side", "heads", "at", "per", "encoding")}
    of_others: dict[str, Any] = {"reduce": reduce, "over": over, **of_all}
    of_weight: dict[str, Any] = {
        "reduce": weight_reduce,
        "project": project,
        "bias": bias,
        "normalizer": normalizer,
        "summed": summed,
        **of_all,
    }
    return [
        Spec(
            cast(Points, points),
            of=source,
            ref=given.ref if source == "grad*ref" else None,
            **(of_weight if source == "weight" else of_others),
        )
        for source in sources
    ]
