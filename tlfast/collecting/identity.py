"""What a collection says of its rows in dataset.json: two runs make one dataset where this is equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from ..dataset.format.plan import Example
from ..errors import broken_rule
from ..hooks.layers import weighted_modules
from ..hooks.points import as_list, find_points
from ..hooks.second_moments import describe_normalizers
from ..spec import Queries, Spec
from .batches import Batching
from .fingerprint import describe_model, examples_fingerprint
from .function_identity import called, describe_function
from .losses import SAID, name_of
from .options import CollectOptions
from .spool import lengths_of

# What of the options (`CollectOptions`) two runs of one dataset must share. One that isn't named here enters by its own
# name where it isn't its default: so a new one is safe, and changes no identity that there is.
ALWAYS = ("grad_scale", "calls", "missing")  # by their own names, their defaults too: so the first datasets say them
IN_OTHER_WORDS = {  # and which key of the header, or of dataset.json, says them
    "points": "specs", "reduce": "specs", "over": "specs", "dtype": "specs", "output": "specs", "lens": "specs",
    "of": "specs", "side": "specs", "ref": "specs", "heads": "specs",
    "at": "specs", "per": "specs", "encoding": "specs", "project": "specs", "bias": "specs",
    "normalizer": "specs", "summed": "specs",
    "loss": "loss", "identity": "loss_identity", "batch_tokens": "batching", "padding_side": "batching",
    "pad_id": "batching", "seq_len": "batching", "cuda_graph": "batching", "bad_examples": "examples",
    "skipped": "examples", "rows_per_unit": "plan", "header": "header", "fields": "examples",
    "fingerprint": "examples", "keep_fields": "fields", "batch_examples": "batching", "size": "batching",
    "collate": "collate",
}  # fmt: skip
NEXT_IN_TEXT = "within texts"  # of the next tokens of examples of several: the first such datasets say nothing
MAKES_NO_OTHER_ROWS = (
    "attach", "backend", "embedding", "units", "share", "resume", "extend", "overwrite", "staging", "non_finite",
    "disk_wait_s", "deterministic", "progress", "config",
)  # fmt: skip


def describe_options(options: CollectOptions) -> dict[str, Any]:
    """What a dataset says of the options by their own names."""
    said = {name: getattr(options, name) for name in ALWAYS}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in {*said, *IN_OTHER_WORDS, *MAKES_NO_OTHER_ROWS} and value != field.default:
            said[field.name] = value
    return said


def describe_examples(
    examples: Sequence[Example], skipped: Sequence[Sequence[Any]], fingerprint: str = ""
) -> dict[str, Any]:
    """What a dataset, or an extension of it, says of its examples and of the bad ones that were left out.

    ``fingerprint`` stands for what they are where the user vouches for it.
    """
    told = hashlib.sha256(fingerprint.encode()).hexdigest() if fingerprint else examples_fingerprint(examples)
    return {
        "tokens": sum(lengths_of(examples)),
        "sha256": told,
        "skipped": [list(entry) for entry in skipped],
    } | ({"fingerprint": fingerprint} if fingerprint else {})


def describe_loss(loss: Any, identity: Any, header: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """What a dataset says of its loss, and what of it can't be told.

    Its name, and its code; in place of that what the user vouches for: ``identity``, or the ``header`` where it names
    the loss.

    Raises:
        TypeError: for a loss that can't be called.
        ValueError: for an ``identity`` that says nothing.
    """
    name = name_of(loss)
    if name is None and not callable(loss):
        remedy = "Pass a function of model and batch."
        raise TypeError(broken_rule("collect", "loss", "be a function", type(loss).__name__, remedy))
    if not isinstance(identity, str) or (identity and name is not None):
        beside = "" if name is None else " with the default loss" if name == "next_token" else f" with loss {name}"
        got = f"{identity!r}{beside}"
        raise ValueError(broken_rule("collect", "identity", "name the loss= that is given", got, "Leave it out."))
    if name is not None:
        return {"loss": SAID[name]}, []
    module = called(getattr(loss, "__module__", type(loss).__module__))
    said = {"loss": f"{module}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"}
    if identity:
        return said | {"loss_identity": identity}, []
    if isinstance(header, Mapping) and "loss" in header:
        return said, []
    code, unknown = describe_function(loss)
    return said | {"loss_code": code}, unknown


def describe_spec(model: nn.Module, spec: Spec) -> dict[str, Any]:
    """A spec as JSON; the points that a predicate picked stand for it."""
    points = list(find_points("collect", model, spec.points)) if callable(spec.points) else as_list(spec.points)
    return {
        "points": spec.points if isinstance(spec.points, str) else points,
        "reduce": spec.reduce,
        "over": list(spec.dims),
        "dtype": None if spec.dtype is None else str(spec.dtype).removeprefix("torch."),
        "output": spec.output,
        "name": spec.name,
        **({} if spec.of == "grad" else {"of": spec.of}),
        **({} if spec.side == "output" else {"side": spec.side}),
        **({} if spec.ref is None else {"ref": describe_function(spec.ref)[0]}),
        **({} if spec.heads is None else {"heads": list(spec.heads)}),
        **({} if spec.at is None else {"at": list(spec.at) if isinstance(spec.at, tuple) else spec.at}),
        **({} if spec.per == "example" else {"per": spec.per}),
        **({} if spec.encoding is None else {"encoding": spec.encoding}),
        **({} if spec.projection is None else {"project": spec.projection.describe()}),
        **({"bias": True} if spec.bias else {}),
        **({} if spec.queries is None else {"queries": _describe_queries(spec.queries)}),
        **(
            {}
            if spec.normalizer is None
            else {"normalizer": describe_normalizers(spec.normalizer, _weighted(model, spec))}
        ),
        **({"summed": True} if spec.summed else {}),
    }


def _weighted(model: nn.Module, spec: Spec) -> list[str]:
    """The modules whose weight gradients a spec means."""
    return list(weighted_modules("collect", model, spec, find_points("collect", model, spec.points)))


def _describe_queries(queries: Queries) -> Any:
    """Queries by what is in them."""
    return describe_function(dict(queries) if isinstance(queries, Mapping) else queries)[0]


def _more_of(batching: Batching, options: CollectOptions) -> dict[str, Any]:
    """What else is said of the batches, where it isn't as it always was."""
    more: dict[str, Any] = {} if batching.buckets is None else {"buckets": list(batching.buckets)}
    if batching.batch_examples is not None:
        more["batch_examples"] = batching.batch_examples
    if batching.next_in_text:
        more["next_tokens"] = NEXT_IN_TEXT
    return more if options.size is None else more | {"size": describe_function(options.size)[0]}


def describe_collection(
    model: nn.Module,
    specs: Sequence[Spec],
    loss: Mapping[str, Any],
    batching: Batching,
    examples: Mapping[str, Any],
    options: CollectOptions,
) -> dict[str, Any]:
    """The header of dataset.json; the header that the user gives is merged into it.

    Raises:
        ValueError: where that can't be merged.
    """
    more = options.header
    identity = {
        "model": describe_model(model),
        "specs": [describe_spec(model, spec) for spec in specs],
        **loss,
        "batching": {
            "batch_tokens": batching.batch_tokens, "width": batching.width,
            "padding_side": batching.padding_side, "pad_id": batching.pad_id,
        } | _more_of(batching, options),
        "examples": dict(examples),
        **({} if options.collate is None else {"collate": describe_function(options.collate)[0]}),
        **describe_options(options),
    }  # fmt: skip
    if not isinstance(more, (Mapping, type(None))):
        raise ValueError(broken_rule("collect", "header", "be a mapping", type(more).__name__, "Give a dict."))
    for key, value in (more or {}).items():
        known = identity.get(key)
        if isinstance(known, dict) and not isinstance(value, Mapping):
            remedy = "It is merged into what is said there; or take another key."
            raise ValueError(broken_rule("collect", f"header[{key!r}]", "be a mapping", repr(value), remedy))
        identity[key] = {**known, **value} if isinstance(known, dict) else value
    return identity
