"""Layers whose weight gradients can be captured: what each does with its weight, and the matrices that project it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..backends.reference import accumulator
from ..errors import broken_rule
from ..projections.applying import SKETCHES, native_sketch
from ..projections.kept import once
from ..projections.projection import Projection, Role
from ..spec import Spec
from .layer_trial import conv1d_of_transformers, does_as_known
from .points import as_list, is_glob, named_points
from .queries import check_named, queries_at

_KINDS = "Linear, Conv1D of transformers, Conv1d, Conv2d, Conv3d, Embedding, LayerNorm and RMSNorm"


@dataclass(frozen=True)
class Layer:
    """What a module does with its weight [n_outputs, n_inputs]; a norm's is a vector of ``n_inputs``.

    ``kind``: linear, conv, embedding, layer_norm or rms_norm. ``window``: of a convolution, (kernel, stride, dilation,
    padding as `torch.nn.functional.pad` takes it, its mode, groups).
    """

    kind: str
    n_outputs: int
    n_inputs: int
    has_bias: bool = False
    padding_idx: int = -1
    normalized: int = 1
    eps: float = 0.0
    window: tuple[Any, ...] | None = None

    @property
    def is_norm(self) -> bool:
        return self.kind in ("layer_norm", "rms_norm")


def owns_weight(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, which a glob for weights means."""
    return any(parameter is not None for parameter in module._parameters.values())


def find_layer(who: str, name: str, module: nn.Module) -> Layer:
    """What a module does with its weight; TypeError or ValueError where that isn't known."""
    # weight_norm, spectral_norm and prune of torch.nn.utils leave such parameters.
    made = any(name in module._parameters for name in ("weight_g", "weight_orig"))
    if made or getattr(module, "parametrizations", None) or isinstance(getattr(type(module), "weight", None), property):
        rule, got = "have a weight that is a parameter", f"{name or 'the model'}, whose weight is made of others"
        raise ValueError(broken_rule(who, "points", rule, got, "Leave it out, or remove its parametrization."))
    found = linear_layer(module) or _convolution(module) or _embedding(who, name, module) or _norm(module)
    if found is None:
        got = f"{name or 'the model'}, a {type(module).__name__}"
        remedy = "Name such layers; a glob means all modules with parameters of their own."
        if type(module).__name__.endswith("Experts"):  # of transformers, and as others call them
            got += " whose parameters are of all experts in one"
            remedy = "Leave it out: which of its rows are whose tokens isn't seen. The router can be had by its output."
        raise TypeError(broken_rule(who, "points", f'be {_KINDS} with of="weight"', got, remedy))
    # T5's LayerNorm takes no mean off.
    kinds = ("layer_norm", "rms_norm") if found.kind == "layer_norm" else (found.kind,)
    known = next((replace(found, kind=kind) for kind in kinds if _does_as(module, replace(found, kind=kind))), None)
    if known is None:
        rule = f"have the weight gradient of their kind of layer, {found.kind}"
        got = f"{name or 'the model'}, a {type(module).__name__} with another"
        raise ValueError(broken_rule(who, "points", rule, got, "Leave this point out."))
    return known


def _does_as(module: nn.Module, layer: Layer) -> bool:
    kind, bias = layer.kind, layer.has_bias
    return does_as_known(module, kind, bias, layer.padding_idx, layer.normalized, layer.eps, layer.window)


def linear_layer(module: Any) -> Layer | None:
    """What a linear layer does with its weight; None for another module."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return None
    if isinstance(module, nn.Linear):
        return Layer("linear", module.out_features, module.in_features, module.bias is not None)
    if type(module) is conv1d_of_transformers():
        return Layer("linear", module.weight.shape[1], module.weight.shape[0], module.bias is not None)
    return None


def _convolution(module: Any) -> Layer | None:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return None
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = tuple(module._reversed_padding_repeated_twice)
    window = (module.kernel_size, module.stride, module.dilation, padding, mode, module.groups)
    n_inputs = module.in_channels // module.groups * torch.Size(module.kernel_size).numel()
    return Layer("conv", module.out_channels, n_inputs, module.bias is not None, window=window)


def _embedding(who: str, name: str, module: nn.Module) -> Layer | None:
    if not isinstance(module, nn.Embedding):
        return None
    if module.max_norm is not None or module.scale_grad_by_freq:
        got = "max_norm" if module.max_norm is not None else "scale_grad_by_freq"
        rule = "be an embedding whose gradient is that of each token by itself"
        raise ValueError(broken_rule(who, f"the point {name}", rule, got, "Leave this point out."))
    padding_idx = -1 if module.padding_idx is None else module.padding_idx % module.num_embeddings
    return Layer("embedding", module.embedding_dim, module.num_embeddings, padding_idx=padding_idx)


def _norm(module: nn.Module) -> Layer | None:
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not type(module).__name__.endswith("Norm"):
        return None
    rms = not isinstance(module, nn.LayerNorm) and "RMS" in type(module).__name__.upper()
    if not rms and "LayerNorm" not in type(module).__name__:
        return None
    eps: Any = next((getattr(module, a) for a in ("variance_epsilon", "eps", "epsilon") if hasattr(module, a)), None)
    eps = torch.finfo(accumulator(weight.dtype)).eps if eps is None else float(eps)  # torch takes that of the sums
    bias: Any = getattr(module, "bias", None)
    return Layer(
        "rms_norm" if rms else "layer_norm", weight.numel(), weight.numel(), isinstance(bias, torch.Tensor),
        normalized=weight.dim(), eps=eps,
    )  # fmt: skip


def weighted_modules(who: str, model: nn.Module, spec: Spec, found: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of the modules that the points of a spec for weights mean those whose weight is meant: those that are named, and
    of a glob or a predicate those with parameters of their own.

    Raises:
        ValueError: where there is none, and for a weight that several modules share: its gradient is a sum over these.
    """
    points = named_points(who, model, spec.points)
    named = set() if callable(points) else {point for point in as_list(points) if not is_glob(point)}
    kept = {name: module for name, module in found.items() if name in named or owns_weight(module)}
    if not kept:
        rule = 'match a module with a weight of its own with of="weight"'
        raise ValueError(broken_rule(who, "points", rule, "none", "Name layers."))
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in kept.items():
        shared = owners.get(id(module._parameters.get("weight")), [])
        if len(shared) > 1:
            rule, got = "have a weight of its own", f"one that is shared by {' and '.join(shared)}"
            remedy = "Leave it out: the gradient of a shared weight is a sum over the modules that use it."
            raise ValueError(broken_rule(who, f"the point {name}", rule, got, remedy))
    check_named(who, spec, kept)
    return kept


def check_queries(who: str, name: str, module: nn.Module, spec: Spec) -> None:
    """ValueError for queries of a spec that aren't as its rows are at a module."""
    if spec.queries is not None:
        layer = find_layer(who, name, module)
        queries_at(f"{who} at {name}", name, spec.queries, row_shape(layer, spec))


def row_shape(layer: Layer, spec: Spec) -> tuple[int, ...]:
    """The shape of an example's weight gradient, as a spec has it."""
    dim, n_biases = 0 if spec.projection is None else spec.projection.dim, spec.bias and layer.has_bias
    if layer.is_norm:
        return (dim or layer.n_inputs + n_biases * layer.n_outputs,)
    n, m = dim or layer.n_outputs, dim or layer.n_inputs + n_biases
    if spec.heads is None:
        return n, m
    return spec.heads[0], dim or spec.heads[1], m


def projected_name(model: nn.Module, name: str, projection: Projection) -> str:
    """By which name a module's matrices are made: bergson's is that inside the model without its head."""
    base = getattr(model, "base_model", None)
    if projection.scheme != "bergson-2" or not isinstance(base, nn.Module) or base is model:
        return name
    prefix = next((inner for inner, module in model.named_modules() if module is base), None)
    return name.removeprefix(f"{prefix}.") if prefix else name


def _row(spec: Spec) -> str:
    """What a backend's Weight makes for a spec."""
    if spec.per == "token":
        return "token norms" if spec.reduce == "norm" else "factors" if spec.queries is None else "token scores"
    return "norm" if spec.reduce == "norm" else "gradient" if spec.queries is None else "scores"


def weight_arguments(
    who: str, model: nn.Module, name: str, module: nn.Module, spec: Spec, backend: str
) -> tuple[Any, ...]:
    """What a backend's Weight is made of, for a spec at a module; TypeError or ValueError where nothing can be."""
    layer, projection = find_layer(who, name, module), spec.projection
    has_bias, per_token = spec.bias and layer.has_bias, spec.per == "token"
    at_point = f"{who} at {name}"
    n_heads = 0 if spec.heads is None else spec.heads[0]
    if spec.heads is not None and (layer.kind != "linear" or n_heads * spec.heads[1] != layer.n_outputs):
        rule, remedy = f"be (n, d) of a linear layer with n * d outputs, {layer.n_outputs} here", "Check the point."
        raise ValueError(broken_rule(at_point, "heads", rule, spec.heads, remedy))
    if layer.kind == "embedding" and projection is None and spec.reduce != "norm" and spec.queries is None:
        rule, got = "be projected", f"one of [{layer.n_inputs}, {layer.n_outputs}] for each example"
        remedy = 'Say project=. Of each token it is the gradient itself: of="grad", per="token".'
        raise ValueError(broken_rule(at_point, "the weight gradient of an embedding", rule, got, remedy))
    if per_token and layer.kind == "conv":
        rule, remedy = "be left out at a convolution", "Its windows are no tokens."
        raise ValueError(broken_rule(at_point, 'per="token"', rule, "one", remedy))
    row = _row(spec)
    queries = () if spec.queries is None else queries_at(at_point, name, spec.queries, row_shape(layer, spec))
    left = right = None
    sketches: tuple[Any, ...] = (None, None)
    scale = 1.0
    if projection is not None:
        if projection.form != "two-sided":
            rule, remedy = "be two-sided in a capture", "A one-sided one needs the whole gradient: project rows of it."
            raise ValueError(broken_rule(at_point, "project", rule, repr(projection.form), remedy))
        known = projected_name(model, name, projection)
        n_biases = layer.n_outputs if layer.is_norm else 1
        right = once(Projection.matrix, projection, known, "right", layer.n_inputs + n_biases * has_bias)
        if layer.is_norm:
            scale = projection.scale
        else:
            scale = projection.scale if row == "factors" else projection.row_scale
            names = [f"{known}.head_{head}" for head in range(n_heads)] or [known]
            columns = layer.n_outputs // max(1, n_heads)
            sides = [once(Projection.matrix, projection, one, "left", columns) for one in names]
            left = torch.stack(sides) if n_heads else sides[0]
            if projection.kind in SKETCHES and layer.kind == "linear" and not n_heads:
                # What applies them has their scale in it, and so must the matrices, for other devices and dtypes.
                left, right = projection.scale * left.double(), projection.scale * right.double()
                scale = 1.0
                columns_of: tuple[tuple[Role, int], ...] = (("left", layer.n_outputs), ("right", layer.n_inputs))
                sketches = tuple(once(native_sketch, projection, known, role, n, backend) for role, n in columns_of)
    return (
        layer.kind, row, has_bias, left, right, scale, n_heads, layer.padding_idx,
        (layer.normalized, layer.eps), layer.window, sketches, queries,
    )  # fmt: skip
