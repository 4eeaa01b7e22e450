"""What is asked of a collection, checked against its model before any work starts: specs, positions, width of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from threading import Lock
from typing import Any

import torch
from torch import nn

from ..dataset.format.plan import Example
from ..errors import broken_rule
from ..hooks.captured import captures_of
from ..hooks.layers import check_weight_spec, find_layer, weighted_modules
from ..hooks.points import find_points, named_points
from ..spec import Spec, SpecArguments, as_specs
from .batches import Batch, Batching
from .examples import FieldSource
from .fields import FieldUse, leaves
from .loss import places_of_padding
from .losses import OF_TOKENS
from .options import CollectOptions
from .skipped import RefusedExamples


def wanted_specs(model: nn.Module, options: CollectOptions) -> list[Spec]:
    """The specs that are asked for, with the names of their points in place of what finds them."""
    if not isinstance(model, nn.Module):
        raise TypeError(broken_rule("collect", "model", "be an nn.Module", type(model).__name__, "Pass the model."))
    given = SpecArguments(**{field.name: getattr(options, field.name) for field in fields(SpecArguments)})
    specs = as_specs("collect", options.points, given, SpecArguments(reduce=CollectOptions.reduce))
    if options.embedding is not None:
        find_points("collect", model, options.embedding, "embedding")
    find: Any = find_points
    if options.lens:
        from ..transformer_lens.names import find_names as find

        # The names that a filter means: a dataset says them.
        specs = [replace(spec, points=list(find("collect", model, spec.points))) for spec in specs]
    else:
        specs = [replace(spec, points=named_points("collect", model, spec.points)) for spec in specs]
    for spec in specs:
        found = find("collect", model, spec.points)
        if spec.of == "weight":
            for name, module in weighted_modules("collect", model, spec, found).items():
                find_layer("collect", name, module)
                check_weight_spec("collect", name, module, spec)
        if spec.of == "grad*ref" and spec.ref is None:
            remedy = "Give a tensor, or a function of the batch."
            raise ValueError(broken_rule("collect", "ref", 'be given with of="grad*ref"', "none", remedy))
        if 0 in spec.dims:
            remedy = "Reduce the batch when reading, or use capture."
            raise ValueError(broken_rule("collect", "over", "keep the batch: a row is an example", spec.over, remedy))
    return specs


def check_left_alone(model: Any) -> None:
    """RuntimeError where a capture of somebody else would take the rows too, or no gradient can be had."""
    theirs = captures_of(model)
    if theirs:
        remedy = "The rows would be in that capture too: leave its block first."
        raise RuntimeError(broken_rule("collect", "model", "be in no capture", f"{theirs[0]!r} already", remedy))
    if torch.is_inference_mode_enabled():
        remedy = "Leave that block: its tensors never have gradients. torch.no_grad() may stay."
        raise RuntimeError(broken_rule("collect", "torch.inference_mode", "be off", "on", remedy))


def check_differentiable(model: nn.Module) -> None:
    """ValueError for a model with quantised layers through which no gradient passes.

    Those of torch itself have operators without a backward; others are tried, one of each kind: torchao's lose the
    gradient where they quantise what they are given, too. Through them a gradient is zero, and nobody says so.
    """
    tried = set[tuple[type, ...]]()
    for name, module in model.named_modules():
        kind = (type(module), *(type(p) for p in module.parameters(recurse=False)))
        if type(module).__module__.startswith("torch.ao.nn.quantized") or (
            kind not in tried and _loses_gradient(module)
        ):
            _refuse_quantised(module, name)
        tried.add(kind)


def _refuse_quantised(module: nn.Module, name: str) -> None:
    weight = getattr(module, "weight", None)
    what = module if callable(weight) or weight is None or type(weight) is nn.Parameter else weight
    rule, remedy = "have layers with a backward", "Quantise weights alone, with torchao or bitsandbytes."
    got = f"{type(what).__module__}.{type(what).__qualname__} at {name}"
    raise ValueError(broken_rule("collect", "model", rule, got, remedy))


def _loses_gradient(module: nn.Module) -> bool:
    """Whether a linear layer with a weight of another kind gives an output without a graph."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__"):
        return False
    if hasattr(weight, "full_tensor") or weight.is_meta:  # in pieces on several ranks, or kept elsewhere
        return False
    try:
        with torch.enable_grad():
            given = torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
            output = type(module).forward(module, given)
    except Exception:  # whatever the class of a foreign weight raises: the model's own forward meets and tells it again
        return False
    return not output.requires_grad


_worked_on: list[Any] = []  # models, each by one thread
_claims = Lock()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Hold a model for this thread; RuntimeError where another one has it: both would change its modes and hooks."""
    with _claims:
        if any(held is model for held in _worked_on):
            got, remedy = "another one's work on it", "Wait for that, or give each thread a copy."
            raise RuntimeError(broken_rule("collect", "model", "be used by one thread at a time", got, remedy))
        _worked_on.append(model)
    try:
        yield
    finally:
        with _claims:
            _worked_on[:] = [held for held in _worked_on if held is not model]


def check_peaceful(overwrite: bool, resume: str) -> None:
    """ValueError for what one of several processes would do to the work of the others."""
    if overwrite:
        remedy = "Remove the dataset before they start."
        raise ValueError(broken_rule("collect", "overwrite", "be off where several processes collect", "on", remedy))
    if resume == "never":
        rule = 'be "auto" or "must" where several processes collect'
        remedy = "All but the first find a dataset there."
        raise ValueError(broken_rule("collect", "resume", rule, '"never"', remedy))


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a Hugging Face model has positions for; None where nobody says."""
    return _positions(model, counted=True)


def positions_once(model: nn.Module) -> int | None:
    """What earlier versions took for `positions_of`: to them all with a position of padding counted on from there."""
    return _positions(model, counted=False)


def _positions(model: nn.Module, counted: bool) -> int | None:
    said = said_positions(model)
    found = places_of_padding(model, looked_up=True, counted=counted)
    return None if said is None else min([said, *(n - place - 1 for place, n in found)])


def said_positions(model: nn.Module) -> int | None:
    """What its config says of them: of some also those up to the padding's, which no token has."""
    n_positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return n_positions if isinstance(n_positions, int) else None


def width_of(specs: Sequence[Spec], longest: int, seq_len: int | None) -> int | None:
    """The positions of every batch where a row keeps them; None where batches can be as long as their examples.

    Rows of tokens lose their padding on the way to the dataset, so a unit of them may have its own positions.
    """
    loose = [
        1 in spec.dims or spec.at is not None or spec.per == "token" or spec.of == "weight" for spec in specs
    ]  # fmt: skip
    return None if all(loose) else seq_len or longest


def check_positions(specs: Sequence[Spec], examples: Sequence[Example]) -> None:
    """RefusedExamples for positions of tokens that one of them hasn't, before any of them goes through the model."""
    for spec in specs:
        wanted = () if spec.at is None or isinstance(spec.at, str) else spec.at
        for position in (wanted,) if isinstance(wanted, int) else wanted:
            least = position + 1 if position >= 0 else -position
            short = next((example for example in examples if example.length < least), None)
            if short is not None:
                got = f"{position} for example {short.id}, which has {short.length}"
                remedy = "Leave such examples out (--filter), or choose another."
                raise RefusedExamples(broken_rule("collect", "at", "be tokens that every example has", got, remedy))


def as_mapping(fields: Sequence[str] | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The fields that are asked for, each with its key; names alone are keys, and the order of a tuple's parts."""
    return fields if fields is None or isinstance(fields, Mapping) else {name: name for name in fields}


def check_tokens(loss: str | None, source: FieldSource | None) -> None:
    """ValueError for a loss of tokens, by its name, where examples have none."""
    if loss in OF_TOKENS and source is not None and not source.rules.has_tokens:
        rule, got = f"have input_ids for loss {loss}", ", ".join(source.rules.names)
        remedy = "Tokenize text first; loss= may be of what they have."
        raise ValueError(broken_rule("collect", "examples", rule, got, remedy))


def check_used(use: FieldUse, keep_fields: Sequence[str]) -> None:
    """ValueError for a field that neither the model nor the loss has asked for, and that isn't kept."""
    unused = sorted(use.given - use.read - {*keep_fields})
    if unused:
        rule, got = "be used by the model or the loss, or be kept", ", ".join(unused)
        remedy = "keep_fields= stores small ones in the row table, fields= says which to take, loss= may need them."
        raise ValueError(broken_rule("collect", "fields of the examples", rule, got, remedy))


def check_collate(batching: Batching, examples: Sequence[Example]) -> None:
    """ValueError where collate= makes another batch of the same examples when it is called again."""
    first = examples[:2]
    n_positions = batching.n_positions(max(map(batching.size, first)))
    once, again = (batching.batch(first, n_positions) for _ in range(2))
    if not _same(once, again):
        rule, got = "make the same batch of the same examples each time", "another one"
        remedy = "Let nothing random be in it: draw masks and crops before."
        raise ValueError(broken_rule("collect", "collate", rule, got, remedy))


def _same(one: Batch, other: Batch) -> bool:
    pairs = [(one.input_ids, other.input_ids), (one.mask, other.mask)]
    here, there = (dict(leaves(batch.fields.peek())) for batch in (one, other))
    pairs += [(here[name], there.get(name)) for name in here]
    return here.keys() == there.keys() and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b for a, b in pairs
    )
