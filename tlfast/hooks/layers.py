"""Layers whose weight gradients can be captured: what each does with its weight, and the matrices that project it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..backends.reference import accumulator
from ..backends.whole import Whole
from ..errors import broken_rule
from ..projections.applying import SKETCHES, native_sketch
from ..projections.kept import once
from ..projections.projection import Projection, Role
from ..spec import Spec
from .experts import ExpertLayer, check_experts, expert_layers, is_experts
from .layer_trial import conv1d_of_transformers, does_as_known
from .points import as_list, is_glob, named_points
from .queries import check_named, queries_at
from .second_moments import AdafactorNormalizer, Normalizer, check_normalizers, normalizer_at
from .single_sided import single_sided

_KINDS = "Linear, Conv1D of transformers, Conv1d, Conv2d, Conv3d, Embedding, LayerNorm and RMSNorm"


@dataclass(frozen=True)
class Layer:
    """What a module does with its weight [n_outputs, n_inputs]; a norm's is a vector of ``n_inputs``.

    ``kind``: linear, conv, embedding, layer_norm or rms_norm. ``window``: of a convolution, (kernel, stride, dilation,
    padding as `torch.nn.functional.pad` takes it, its mode, groups). ``routed``: it gets some of the positions alone.
    """

    kind: str
    n_outputs: int
    n_inputs: int
    has_bias: bool = False
    padding_idx: int = -1
    normalized: int = 1
    eps: float = 0.0
    window: tuple[Any, ...] | None = None
    routed: bool = False

    @property
    def is_norm(self) -> bool:
        return self.kind in ("layer_norm", "rms_norm")


def owns_weight(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, which a glob for weights means."""
    return isinstance(module, ExpertLayer) or any(parameter is not None for parameter in module._parameters.values())


def find_layer(who: str, name: str, module: nn.Module) -> Layer:
    """What a module does with its weight; TypeError or ValueError where that isn't known."""
    if isinstance(module, ExpertLayer):
        return Layer("linear", module.n_outputs, module.n_inputs, module.has_bias, routed=True)
    # weight_norm, spectral_norm and prune of torch.nn.utils leave such parameters.
    made = any(name in module._parameters for name in ("weight_g", "weight_orig"))
    if made or getattr(module, "parametrizations", None) or isinstance(getattr(type(module), "weight", None), property):
        rule, got = "have a weight that is a parameter", f"{name or 'the model'}, whose weight is made of others"
        raise ValueError(broken_rule(who, "points", rule, got, "Leave it out, or remove its parametrization."))
    found = linear_layer(module) or convolution(module) or _embedding(who, name, module) or _norm(module)
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


def convolution(module: Any) -> Layer | None:
    """What a convolution does with its weight; None for another module."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return None
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding = tuple(module._reversed_padding_repeated_twice)
    window = (module.kernel_size, module.stride, module.dilation, padding, mode, module.groups)
    n_inputs = module.in_channels // module.groups * torch.Size(module.kernel_size).numel()
    return Layer("conv", module.out_channels, n_inputs, module.bias is not None, window=window)


def is_taken(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the module around one of this name takes its weight without calling it, as a MultiheadAttention does."""
    return bool(name) and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


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
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in kept.items():
        own = [module._parameters.get("weight")]
        experts = module.experts if isinstance(module, ExpertLayer) else module
        own = [*experts._parameters.values()] if is_experts(experts) else own
        sharing = [owners.get(id(one), []) for one in own]
        shared = next((names for names in sharing if len(names) > 1), None)
        if is_taken(modules, name):
            rule, got = "be modules that are called", f"{name}, whose weight a MultiheadAttention takes by itself"
            raise TypeError(broken_rule(who, "points", rule, got, "Leave it out: what it is given isn't seen."))
        if shared:
            rule, got = "have a weight of its own", f"one that is shared by {' and '.join(shared)}"
            remedy = "Leave it out: the gradient of a shared weight is a sum over the modules that use it."
            raise ValueError(broken_rule(who, f"the point {name}", rule, got, remedy))
    kept = {
        layer: one
        for name, module in kept.items()
        for layer, one in (expert_layers(name, module) if is_experts(module) else {name: module}).items()
    }
    check_experts(who, kept)
    check_named(who, spec, kept)
    check_normalizers(who, spec.normalizer, kept)
    return kept


def check_weight_spec(who: str, name: str, module: nn.Module, spec: Spec) -> None:
    """ValueError for what a spec says and a module hasn't, and for queries or a normalizer that aren't as its rows."""
    layer, at_point = find_layer(who, name, module), f"{who} at {name}"
    _check_at(at_point, layer, spec)
    if spec.queries is not None:
        queries_at(at_point, name, spec.queries, row_shape(layer, spec))
    normalizer_at(at_point, name, spec.normalizer, (layer.n_outputs, layer.n_inputs + (spec.bias and layer.has_bias)))


def row_shape(layer: Layer, spec: Spec) -> tuple[int, ...]:
    """The shape of an example's weight gradient, as a spec has it."""
    if spec.projection is not None and spec.projection.form == "one-sided":
        return (spec.projection.dim,)
    dim, n_biases = 0 if spec.projection is None else spec.projection.dim, spec.bias and layer.has_bias
    if layer.is_norm:
        return (dim or layer.n_inputs + n_biases * layer.n_outputs,)
    n, m = dim or layer.n_outputs, dim or layer.n_inputs + n_biases
    if spec.heads is None:
        return n, m
    return spec.heads[0], dim or spec.heads[1], m


def factor_size(module: nn.Module, spec: Spec) -> int | None:
    """Where a row has the factors (g, a) of a token side by side: how many numbers g has."""
    layer = linear_layer(module) if spec.of == "weight" and spec.projection is None else None
    return layer.n_outputs if layer is not None and _row(spec) == "factors" else None


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
    layer, at_point = find_layer(who, name, module), f"{who} at {name}"
    has_bias, n_heads = spec.bias and layer.has_bias, 0 if spec.heads is None else spec.heads[0]
    _check_at(at_point, layer, spec)
    normalizer = normalizer_at(at_point, name, spec.normalizer, (layer.n_outputs, layer.n_inputs + has_bias))
    parts = _Parts()
    if spec.queries is not None:
        parts.queries = queries_at(at_point, name, spec.queries, row_shape(layer, spec))
    projection, row = spec.projection, _row(spec)
    if projection is None:
        if normalizer is not None and spec.queries is not None:  # <D * G, Q> = <G, D * Q>
            parts.queries = (_whole_queries(parts.queries) * normalizer.factor.to(parts.queries[0]),)
        elif normalizer is not None:
            parts.whole = Whole(normalizer.factor, None, None, None)
    else:
        parts.project(projection, projected_name(model, name, projection), layer, spec, normalizer, backend)
    if parts.whole is not None and spec.per == "token":
        rule = 'be left out with per="token", but an AdafactorNormalizer where rows are projected without a bias'
        remedy = "What it makes of a token's gradient has no two factors."
        raise ValueError(broken_rule(at_point, "normalizer", rule, type(normalizer).__name__, remedy))
    return (
        layer.kind, row, has_bias, parts.left, parts.right, parts.scale, n_heads, layer.padding_idx,
        (layer.normalized, layer.eps), layer.window, (*parts.sketches, parts.whole), parts.queries,
    )  # fmt: skip


def engine_weight(engine: Any, made_of: tuple[Any, ...]) -> Any:
    """The Weight of a backend, of what `weight_arguments` returns."""
    *before, (left, right, whole), queries = made_of
    if whole is not None:
        whole = engine.Whole(whole.factor, whole.matrix, whole.sketch, whole.project)
    return engine.Weight(*before, (left, right, whole), queries)


@dataclass
class _Parts:
    """What a Weight is given beside its layer: matrices and what stands in their place."""

    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    scale: float = 1.0
    sketches: tuple[Any, Any] = (None, None)
    whole: Whole | None = None
    queries: tuple[torch.Tensor, ...] = ()

    def project(
        self, projection: Projection, known: str, layer: Layer, spec: Spec, normalizer: Normalizer | None, backend: str
    ) -> None:
        """Make what projects the gradients of a layer by the matrices of the name ``known``."""
        has_bias, n_heads = spec.bias and layer.has_bias, 0 if spec.heads is None else spec.heads[0]
        role: Role = "right" if projection.form == "two-sided" else "single"
        if layer.is_norm:
            self.right = once(Projection.matrix, projection, known, role, layer.n_inputs + layer.n_outputs * has_bias)
            self.scale = projection.scale
            return
        factor = None if normalizer is None else normalizer.factor
        if projection.form == "one-sided":
            columns = layer.n_outputs * (layer.n_inputs + has_bias)
            self.whole, self.scale = single_sided(projection, known, columns, factor, backend)
            return
        self.right = once(Projection.matrix, projection, known, "right", layer.n_inputs + has_bias)
        self.scale = projection.scale if _row(spec) == "factors" else projection.row_scale
        names = [f"{known}.head_{head}" for head in range(n_heads)] or [known]
        columns = layer.n_outputs // max(1, n_heads)
        sides = [once(Projection.matrix, projection, one, "left", columns) for one in names]
        self.left = torch.stack(sides) if n_heads else sides[0]
        if isinstance(normalizer, AdafactorNormalizer) and not has_bias:  # which is normalized as its factors are
            outputs, inputs = (scale.cpu() for scale in normalizer.scales)
            of_heads = outputs.view(n_heads, 1, -1) if n_heads else outputs
            self.left, self.right = self.left.double() * of_heads, self.right.double() * inputs
        elif factor is not None:
            self.whole = Whole(factor, None, None, None)
        elif projection.kind in SKETCHES and layer.kind == "linear" and not n_heads:
            # What applies them has their scale in it, and so must the matrices, for other devices and dtypes.
            self.left, self.right = projection.scale * self.left.double(), projection.scale * self.right.double()
            self.scale = 1.0
            self.sketches = (
                once(native_sketch, projection, known, "left", layer.n_outputs, backend),
                once(native_sketch, projection, known, "right", layer.n_inputs, backend),
            )


def _check_at(at_point: str, layer: Layer, spec: Spec) -> None:
    """ValueError for what a spec says and a layer hasn't."""
    projection, per_token = spec.projection, spec.per == "token"
    n_heads = 0 if spec.heads is None else spec.heads[0]
    if spec.heads is not None and (layer.kind != "linear" or n_heads * spec.heads[1] != layer.n_outputs):
        rule, remedy = f"be (n, d) of a linear layer with n * d outputs, {layer.n_outputs} here", "Check the point."
        raise ValueError(broken_rule(at_point, "heads", rule, spec.heads, remedy))
    if layer.kind == "embedding" and projection is None and spec.reduce != "norm" and spec.queries is None:
        rule, got = "be projected", f"one of [{layer.n_inputs}, {layer.n_outputs}] for each example"
        remedy = 'Say project=. Of each token it is the gradient itself: of="grad", per="token".'
        raise ValueError(broken_rule(at_point, "the weight gradient of an embedding", rule, got, remedy))
    if per_token and (layer.kind == "conv" or layer.routed):
        rule, remedy = "be left out at a convolution", "Its windows are no tokens."
        if layer.routed:
            rule, remedy = "be left out at an expert", "It has some of the tokens of each example."
        raise ValueError(broken_rule(at_point, 'per="token"', rule, "one", remedy))
    if projection is not None and projection.form == "one-sided":
        if layer.kind == "embedding":
            rule, got = "be two-sided at an embedding", repr(projection.form)
            remedy = "Its whole gradient is too large to be formed: give it a Spec of its own."
            raise ValueError(broken_rule(at_point, "project", rule, got, remedy))
        if spec.heads is not None or per_token:
            rule, remedy = (
                'be two-sided with heads= or per="token"',
                "The one matrix is of whole gradients: leave them out.",
            )
            raise ValueError(broken_rule(at_point, "project", rule, repr(projection.form), remedy))
    if spec.normalizer is not None and layer.kind not in ("linear", "conv"):
        rule, remedy = "be left out but at linear layers and convolutions", "Give this point a Spec of its own."
        raise ValueError(broken_rule(at_point, "normalizer", rule, layer.kind, remedy))


def _whole_queries(queries: Sequence[torch.Tensor]) -> torch.Tensor:
    """Queries as they are, not as products of two factors."""
    return queries[0] if len(queries) == 1 else torch.bmm(*queries)
