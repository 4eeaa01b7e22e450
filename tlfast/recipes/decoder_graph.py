"""A decoder of Hugging Face as a graph: its layers, and one run that tells how the modules within are joined."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..backends.outputs import select_output
from ..errors import broken_rule
from .norms import Norm
from .patching import heads_of
from .places import Place, layers_of
from .projection_heads import Heads, heads_of_projections
from .residual_graph import Reader, ResidualGraph, Writer

ROUNDINGS = 16.0  # epsilons by which sums may be apart, beside the size of what was added
_ATTENTION = re.compile(r"attn|attention")
_READ = "be a decoder whose layers add to the residual stream what heads and MLPs put out, behind a norm each"
_REMEDY = "See docs/recipes.md for what is read; attribution_patching takes any model."


@dataclass(frozen=True)
class _Call:
    """One module in the run: what it was given, and what it put out, with their graph."""

    name: str
    module: nn.Module
    given: torch.Tensor
    out: torch.Tensor
    read: torch.Tensor  # the same as they were then, without a graph: a layer may add to them in place
    made: torch.Tensor

    @property
    def is_linear(self) -> bool:
        weight = getattr(self.module, "weight", None)
        sizes = {self.given.shape[-1], self.out.shape[-1]}
        leaf = next(self.module.children(), None) is None
        return leaf and isinstance(weight, torch.Tensor) and weight.dim() == 2 and set(weight.shape) == sizes


@dataclass(frozen=True)
class _Layer:
    """What a layer consists of."""

    name: str
    whole: _Call
    projections: list[_Call]  # of queries, keys and values: all that reads the first norm, but for a parallel MLP
    written: _Call  # of the heads, laid side by side
    norm: _Call
    mlp: _Call | None  # what reads; a module, or where an MLP has none the first of its matrices
    mlp_written: _Call | None
    mlp_norm: _Call | None

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads what the attention reads."""
        return self.mlp_norm is not None and _same(self.mlp_norm.given, self.norm.given)


def decoder_graph(who: str, model: nn.Module, run: Callable[[], object]) -> ResidualGraph:
    """Read a model by running it once; ``run`` takes one example of two tokens or more through it, with gradients.

    Nothing depends on a family's names but that an attention is called one. Which matrices read the norm, which write,
    what is an MLP and what lies beside the attention is seen in the run, and which columns of a projection are whose
    queries, keys and values by their gradients.

    Raises:
        ValueError: for a model that isn't of this kind.
    """
    layers = layers_of(who, model)
    names = {module: name for name, module in model.named_modules()}
    n_heads = heads_of(who, model)
    calls = _look(layers, names, run)
    found = [_layer(who, names[layer], layer, calls[number]) for number, layer in enumerate(layers)]
    shapes = [
        (type(each.written.module), *(tuple(c.out.shape) for c in (*each.projections, each.written))) for each in found
    ]
    heads: dict[Any, Heads] = {}
    for shape, each in zip(shapes, found, strict=True):  # what a head of one layer is, is a head of its like
        if shape not in heads:
            split = heads_of_projections([call.out for call in each.projections], each.written.given, n_heads)
            if split is not None:
                heads[shape] = split
    graph = ResidualGraph([], [], [], start=layers[0])
    first = found[0].norm
    graph.writers.append(Writer(Place(first.name, first.module, "input"), 0, ["input"]))
    for number, (shape, each) in enumerate(zip(shapes, found, strict=True)):
        if shape not in heads:
            raise _not_read(who, f"{each.name}, whose queries, keys and values can't be told apart")
        _add(who, graph, number, each, heads[shape], n_heads)
    last = Place(names[layers[-1]], layers[-1])
    graph.readers.append(Reader(last, len(graph.reader_names), ["logits"], len(graph.writer_names)))
    return graph


def _not_read(who: str, got: str) -> ValueError:
    return ValueError(broken_rule(who, "model", _READ, got, _REMEDY))


def _look(layers: list[nn.Module], names: dict[nn.Module, str], run: Callable[[], object]) -> list[list[_Call]]:
    """The calls of all modules within each layer, in the order in which they end."""
    found: list[list[_Call]] = [[] for _ in layers]

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = select_output(args, None)[0]
            given = select_output(kwargs, None)[0] if given is None else given
            out = select_output(output, None)[0]
            if given is not None and out is not None:
                as_they_are = given.detach().clone(), out.detach().clone()
                found[number].append(_Call(names[module], module, given, out, *as_they_are))

        return hook

    handles = [
        module.register_forward_hook(keep(number), with_kwargs=True)
        for number, layer in enumerate(layers)
        for module in layer.modules()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layer(who: str, name: str, layer: nn.Module, calls: list[_Call]) -> _Layer:
    wholes = [call for call in calls if call.module is layer]
    if len(wholes) != 1:
        raise _not_read(who, f"{name}, {len(wholes)} calls of it in a forward")
    matrices = [call for call in calls if call.is_linear]
    inside = {child: set(child.modules()) for _, child in layer.named_children()}
    attentions = [
        child
        for part, child in layer.named_children()
        if _ATTENTION.search(part) and sum(call.module in inside[child] for call in matrices) > 1
    ]
    if len(attentions) != 1:
        raise _not_read(who, f"{name} with {len(attentions)} attentions")
    own = [call for call in matrices if call.module in inside[attentions[0]]]
    *projections, written = own
    norm = _norm(calls, projections[0].given)
    if norm is None or not all(_same(call.given, norm.out) for call in projections):
        raise _not_read(who, f"{projections[0].name}, which reads no norm of its layer")
    whole = wholes[0]
    reads, writes = _mlp(who, name, inside, calls, [call for call in matrices if call not in own], whole, written)
    mlp_norm = None if reads is None else _norm(calls, reads.given)
    if reads is not None and mlp_norm is None:
        raise _not_read(who, f"{reads.name}, which reads no norm of its layer")
    made = _Layer(name, whole, projections, written, norm, reads, writes, mlp_norm)
    if not _same(norm.given, whole.given):
        raise _not_read(who, f"{norm.name}, which isn't given what {name} is")
    if mlp_norm is not None and not made.parallel:
        _check_sum(who, mlp_norm.name, mlp_norm.read, [whole.read, written.made])
    return made


def _mlp(
    who: str,
    name: str,
    inside: dict[nn.Module, set[nn.Module]],
    calls: list[_Call],
    matrices: list[_Call],
    whole: _Call,
    attention: _Call,
) -> tuple[_Call | None, _Call | None]:
    """What an MLP reads by, and what it writes by: a module, or the first and the last of its matrices."""
    terms = [whole.read, attention.made]
    if not matrices:
        _check_sum(who, name, whole.made, terms)
        return None, None
    holders = [child for child, modules in inside.items() if any(call.module in modules for call in matrices)]
    module = [call for call in calls if call.module is holders[0]] if len(holders) == 1 else []
    if len(holders) == 1 and len(module) != 1:
        raise _not_read(who, f"{name}, whose MLP is called {len(module)} times")
    reads = module[0] if module else matrices[0]
    for writes in (*module, matrices[-1]):
        if writes.made.numel() == whole.made.numel() and _apart(whole.made, [*terms, writes.made])[0] <= 1:
            return reads, writes
    got = f"{name}, which adds more to it, or less"
    rule = "add up to the residual stream"
    raise ValueError(broken_rule(who, "what heads and MLPs write", rule, got, _REMEDY))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one run are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _norm(calls: list[_Call], out: torch.Tensor) -> _Call | None:
    """The innermost module that has made this tensor."""
    found = [call for call in calls if _same(call.out, out) and not _same(call.given, out)]
    leaves = [call for call in found if next(call.module.children(), None) is None]
    return leaves[0] if len(leaves) == 1 else None


def _apart(whole: torch.Tensor, terms: list[torch.Tensor]) -> tuple[float, float]:
    """How far a tensor is from a sum: in units of what rounding allows, and by itself."""
    with torch.no_grad():
        wide = torch.promote_types(whole.dtype, torch.float32)
        parts = [term.to(wide).reshape(whole.shape) for term in (*terms, whole)]
        apart = float((torch.stack(parts[:-1]).sum(0) - parts[-1]).norm())
        bound = ROUNDINGS * torch.finfo(whole.dtype).eps * sum(float(part.norm()) for part in parts)
    return (apart / bound if bound else apart), apart


def _check_sum(who: str, name: str, whole: torch.Tensor, terms: list[torch.Tensor]) -> None:
    units, apart = _apart(whole, terms)
    if not units <= 1:
        rule = "add up to the residual stream"
        raise ValueError(broken_rule(who, "what heads and MLPs write", rule, f"{apart:.2g} apart at {name}", _REMEDY))


def _matrix(who: str, call: _Call) -> torch.Tensor:
    """The weight of a linear module as [out, in], float32 or wider, whichever way it keeps it."""
    module: Any = call.module
    weight: torch.Tensor = module.weight
    bias: Any = getattr(module, "bias", None)
    given = call.read
    for matrix in (weight.detach(), weight.detach().T):
        if matrix.shape == (call.out.shape[-1], given.shape[-1]) and matrix.dtype == given.dtype:
            made = linear(given, matrix, bias)
            if _apart(call.made, [made])[0] <= 1:
                wide: torch.Tensor = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
                return wide
    remedy = "Merge adapters into the weights, and load them without quantization."
    got = f"{call.name}, a {type(call.module).__name__}"
    raise ValueError(broken_rule(who, "every projection", "be a product with its weight", got, remedy))


def _add(who: str, graph: ResidualGraph, number: int, layer: _Layer, heads: Heads, n_heads: int) -> None:
    """The readers and writers of a layer."""
    norm = Norm(Place(layer.norm.name, layer.norm.module, often=True))
    graph.norms.append(norm)
    n_before = len(graph.writer_names)
    for call, parts in zip(layer.projections, heads, strict=True):
        names = [f"a{number}.h{head}<{kind}>" for kind, head, _ in parts]
        rows = torch.stack([columns for _, _, columns in parts])
        matrix = _matrix(who, call)
        in_order = torch.equal(rows.flatten(), torch.arange(rows.numel()))
        weight = matrix.unflatten(0, rows.shape) if in_order else matrix[rows.to(matrix.device)]
        place = Place(call.name, call.module)
        graph.readers.append(
            Reader(place, len(graph.reader_names), names, n_before, weight, norm, None if in_order else rows)
        )
    written = _matrix(who, layer.written).T.unflatten(0, (n_heads, -1))
    writers = [f"a{number}.h{head}" for head in range(n_heads)]
    graph.writers.append(Writer(Place(layer.written.name, layer.written.module, "input"), n_before, writers, written))
    if layer.mlp is None or layer.mlp_written is None or layer.mlp_norm is None:
        return
    n_seen = n_before if layer.parallel else len(graph.writer_names)
    first, names = len(graph.reader_names), [f"m{number}"]
    if layer.mlp_norm.module is layer.norm.module:
        graph.readers.append(Reader(Place(layer.mlp.name, layer.mlp.module, "input"), first, names, n_seen, norm=norm))
    else:
        place = Place(layer.mlp_norm.name, layer.mlp_norm.module, "input")
        graph.readers.append(Reader(place, first, names, n_seen))
    graph.writers.append(
        Writer(Place(layer.mlp_written.name, layer.mlp_written.module), len(graph.writer_names), names)
    )
