"""Run a TransformerLens model once and keep activations and gradients: its run_with_cache, natively, for any metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..spec import Over, Reduction
from .library import activation_cache
from .names import NamesFilter, find_names, hook_points
from .running import Kept, Run
from .theirs import Asked, with_own_names, within_layers

Metric = Callable[[Any], torch.Tensor]


def own_run_with_cache(model: Any) -> Any:
    """The model's own `run_with_cache`, also where `accelerate` or `install` has put ours in its place."""
    found = model.run_with_cache
    replaced = getattr(found, "tlfast_replaced", None)
    return found if replaced is None else replaced.__get__(model)


def run_with_cache(
    model: Any,
    *model_args: Any,
    names_filter: NamesFilter = None,
    incl_bwd: bool = False,
    metric: Metric | None = None,
    params: bool = False,
    device: Any = None,
    pos_slice: Any = None,
    dtype: torch.dtype | None = None,
    reduce: Reduction = "none",
    over: Over = "pos",
    calls: str = "sum",
    backend: str = "auto",
    remove_batch_dim: bool = False,
    gated: str = "keep",
    **model_kwargs: Any,
) -> tuple[Any, Any]:
    """Run a model and keep its activations, and its gradients under names that end in ``_grad``.

    What the model's own ``run_with_cache`` returns, value for value and key for key; faster, and with more to choose.

    Args:
        model: a TransformerBridge, a HookedTransformer or any HookedRootModule.
        model_args, model_kwargs: for the model's own ``run_with_cache``: tokens, ``return_type``, and so on.
        names_filter: None (all), a name, a short name (``("resid_post", 3)``), a glob, a predicate, or several names.
        incl_bwd: keep gradients as well; a metric implies it.
        metric: a function of the model's output that makes one number; None: the output is one (return_type="loss").
        params: make parameter gradients too, as the model's own does; without them backward takes less time.
        device: where to keep the tensors.
        pos_slice: which positions to keep, as in TransformerLens; the others' memory is given back at once.
        dtype: in which dtype to keep floating-point tensors.
        reduce, over: what to reduce them to, as in `tlfast.capture`; "pos" is each point's own position dimension.
        calls: what to keep of a point called several times in a forward: the gradients' "sum", or the "last" to fire,
            which is what TransformerLens keeps. Of the outputs it is the last in both.
        backend: "native", "python" or "auto".
        remove_batch_dim: drop a leading dimension of size 1.
        gated: a point that is switched off and was asked for by name is an error; "skip" makes it a warning.

    Returns:
        (the model's output, an ActivationCache), or (output, dict) where the model's own returns a dict.

    Raises:
        ValueError: for a bad argument, or a value that isn't one number.
        RuntimeError: if the value has no gradient.

    Example:
        loss, cache = run_with_cache(model, tokens, return_type="loss", incl_bwd=True, names_filter="blocks.*.hook_z")
    """
    kept = Kept("run_with_cache", pos_slice, reduce, over, dtype, device)
    backward = incl_bwd or metric is not None
    run, output, _, cache = _run(
        "run_with_cache", model, model_args, model_kwargs, names_filter, gated, kept, calls, backend, metric, backward,
        params, remove_batch_dim,
    )  # fmt: skip
    tensors = {**run.outputs(), **run.gradients("_grad")}
    tensors = run.asked.completed(tensors)
    if remove_batch_dim:
        tensors = {name: kept[0] if kept.dim() and kept.shape[0] == 1 else kept for name, kept in tensors.items()}
    return output, tensors if isinstance(cache, dict) else type(cache)(tensors, model, cache.has_batch_dim)


def cache_fwd_and_bwd(
    model: Any,
    tokens: Any,
    metric: Metric,
    names_filter: NamesFilter = None,
    *,
    params: bool = False,
    device: Any = None,
    pos_slice: Any = None,
    dtype: torch.dtype | None = None,
    reduce: Reduction = "none",
    over: Over = "pos",
    calls: str = "sum",
    backend: str = "auto",
    **model_kwargs: Any,
) -> tuple[float, Any, Any]:
    """The value of a metric, the activations, and the metric's gradients: two caches of the same names.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        tokens: the model's input.
        metric: a function of the model's output that makes one number.
        names_filter: None (all), a name, a short name (``("resid_post", 3)``), a glob, a predicate, or several names.
        params, device, pos_slice, dtype, reduce, over, calls, backend: as in `run_with_cache`.
        model_kwargs: for the model.

    Returns:
        (value, ActivationCache, ActivationCache). The second one's tensors are gradients; ``accumulated_resid``,
        ``decompose_resid``, ``stack_head_results`` and ``stack_activation`` work on it as on the first.

    Raises:
        ValueError: for a bad argument, or a metric that doesn't make one number.
        RuntimeError: if the metric has no gradient.

    Example:
        value, acts, grads = cache_fwd_and_bwd(model, tokens, metric, "blocks.*.hook_resid_post")
    """
    kept = Kept("cache_fwd_and_bwd", pos_slice, reduce, over, dtype, device)
    run, _, value, _ = _run(
        "cache_fwd_and_bwd", model, (tokens,), model_kwargs, names_filter, "keep", kept, calls, backend, metric, True,
        params, False,
    )  # fmt: skip
    return value.item(), activation_cache(run.outputs(), model), activation_cache(run.gradients(), model)


def _run(
    who: str,
    model: Any,
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
    names_filter: NamesFilter,
    gated: str,
    kept: Kept,
    calls: str,
    backend: str,
    metric: Metric | None,
    backward: bool,
    params: bool,
    remove_batch_dim: bool,
) -> tuple[Run, Any, Any, Any]:
    """A finished run, the model's output, the metric's value, and the cache that the model made for no point."""
    known = hook_points(who, model)
    found = find_names(who, model, names_filter, gated, known)
    if who == "run_with_cache":
        found = with_own_names(model, known, found, names_filter is None or callable(names_filter))
    found = within_layers(model, found, model_kwargs.get("start_at_layer"), model_kwargs.get("stop_at_layer"))
    run = Run(who, Asked(model, known, found), kept, calls, backend)
    with run.hooked():
        # Theirs, without a point: it knows about tokens, return types and what a cache is.
        output, cache = own_run_with_cache(model)(
            *model_args, names_filter=run.asked.left, remove_batch_dim=remove_batch_dim, **model_kwargs
        )
        value = output if metric is None else metric(output)
        if backward:
            run.backward(who, value, params)
    return run, output, value, cache


def run_as_theirs(own: Callable[..., Any], asked: Asked, model_args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a model's own ``run_with_cache(incl_bwd=True)`` returns, run by it, with taps in place of its hooks.

    Args:
        own: it, of one model.
        asked: the points, none of which has a hook of somebody's.
        model_args, options: what it was called with.
    """
    kept = Kept("run_with_cache", options.get("pos_slice"), "none", "pos", None, options.get("device"), views=True)
    run = Run("run_with_cache", asked, kept, "last", "auto")
    with run.hooked():
        # The backward is its own, too, with its rules and its errors.
        output, cache = own(*model_args, **{**options, "names_filter": asked.left})
    tensors = asked.completed({**run.outputs(), **run.gradients("_grad")})
    return output, tensors if isinstance(cache, dict) else type(cache)(tensors, asked.model, cache.has_batch_dim)
