"""Run a TransformerLens model once and keep activations and gradients: its run_with_cache, natively, for any metric."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import broken_rule
from ..spec import Over, Reduction
from .arguments import default_of, own_run_with_cache, told_apart, uncounted
from .library import activation_cache
from .names import NamesFilter, exact_names, find_names, hook_points
from .running import Kept, Run, tensors_of
from .theirs import Asked, with_own_names, within_layers

Metric = Callable[[Any], torch.Tensor]
_NOT_FOR_TWO_CACHES = {"incl_bwd", "remove_batch_dim", "reset_hooks_end", "clear_contexts", "return_cache_object"}


@told_apart
def run_with_cache(
    model: Any,
    *model_args: Any,
    names_filter: NamesFilter = None,
    incl_bwd: bool | None = None,
    metric: Metric | None = None,
    params: bool = False,
    device: Any = None,
    pos_slice: Any = None,
    dtype: torch.dtype | str | None = None,
    reduce: Reduction = "none",
    over: Over = "pos",
    calls: str = "sum",
    backend: str = "auto",
    remove_batch_dim: bool = False,
    gated: str = "keep",
    model_kwargs: Mapping[str, Any] | None = None,
    **more: Any,
) -> tuple[Any, Any]:
    """Run a model and keep its activations, and its gradients under names that end in ``_grad``.

    What the model's own ``run_with_cache`` returns, value for value and key for key; faster, and with more to choose.

    Args:
        model: a TransformerBridge, a HookedTransformer or any HookedRootModule.
        model_args, more: for the model's own ``run_with_cache``: tokens, ``return_type``, and so on.
        names_filter: None (all), a name, a short name (``("resid_post", 3)``), a glob, a predicate, or several names.
        incl_bwd: keep gradients as well; a metric implies it. None is what the model's own would do: False, but where a
            subclass says otherwise.
        metric: a function of the model's output that makes one number; None: the output is one (return_type="loss").
        params: make parameter gradients too, as the model's own does; without them backward takes less time, and goes
            only to the points, to hooks, and to leaves that aren't the model's parameters.
        device: where to keep the tensors.
        pos_slice: which positions to keep, as in TransformerLens; the others' memory is given back at once.
        dtype: in which dtype to keep floating-point tensors.
        reduce, over: what to reduce them to, as in `tlfast.capture`; "pos" is each point's own position dimension.
        calls: what to keep of a point called several times in a forward: the gradients' "sum", or the "last" to fire,
            which is what TransformerLens keeps. Of the outputs it is the last in both.
        backend: "native", "python" or "auto".
        remove_batch_dim: drop a leading dimension of size 1.
        gated: a point that is switched off and was asked for by name is an error; "skip" makes it a warning.
        model_kwargs: for the model as well. A keyword from ``metric`` on that the model's forward takes, too, is an
            error without them; with them, which may be empty, such a keyword is tlfast's.

    ``reset_hooks_end=False`` leaves hooks that go on filling the cache; of several calls they keep the last.

    Returns:
        (the model's output, an ActivationCache), or (output, dict) where the model's own returns a dict.

    Raises:
        ValueError: for a bad argument, or a value that isn't one number.
        RuntimeError: if the value has no gradient.

    Example:
        loss, cache = run_with_cache(model, tokens, return_type="loss", incl_bwd=True, names_filter="blocks.*.hook_z")
    """
    known = hook_points("run_with_cache", model)
    found = find_names("run_with_cache", model, names_filter, gated, known, own_sweep=True)
    found = with_own_names(model, known, found, names_filter is None or callable(names_filter))
    kept = Kept("run_with_cache", pos_slice, reduce, over, dtype, device)
    own = own_run_with_cache(model)
    default = default_of(own, "incl_bwd")
    if default is True:  # a subclass that caches gradients, but for ours here
        more["incl_bwd"] = False
    more["remove_batch_dim"] = remove_batch_dim
    asked = Asked(model, known, _within(model, found, more), exact=exact_names(model, names_filter, found))
    backward = metric is not None or (default is True if incl_bwd is None else incl_bwd)
    run = Run("run_with_cache", asked, kept, calls, backend, backward)
    output, _, cache = _run(run, own, model_args, more, model_kwargs, metric, params)
    tensors = tensors_of(cache)
    tensors.update(run.finished(remove_batch_dim))
    if more.get("clear_contexts", False):
        for point in run.points:
            point.clear_context()
    if not more.get("reset_hooks_end", True):
        run.leave_hooks(tensors, remove_batch_dim)
    return output, cache


@told_apart
def cache_fwd_and_bwd(
    model: Any,
    tokens: Any,
    metric: Metric,
    names_filter: NamesFilter = None,
    *,
    params: bool = False,
    device: Any = None,
    pos_slice: Any = None,
    dtype: torch.dtype | str | None = None,
    reduce: Reduction = "none",
    over: Over = "pos",
    calls: str = "sum",
    backend: str = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
    **more: Any,
) -> tuple[float, Any, Any]:
    """The value of a metric, the activations, and the metric's gradients: two caches of the same names.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        tokens: the model's input.
        metric: a function of the model's output that makes one number.
        names_filter: None (all), a name, a short name (``("resid_post", 3)``), a glob, a predicate, or several names.
        params, device, pos_slice, dtype, reduce, over, calls, backend, model_kwargs: as in `run_with_cache`.
        more: for the model.

    Returns:
        (value, ActivationCache, ActivationCache). The second one's tensors are gradients; ``accumulated_resid``,
        ``decompose_resid``, ``stack_head_results`` and ``stack_activation`` work on it as on the first.

    Raises:
        ValueError: for a bad argument, or a metric that doesn't make one number.
        RuntimeError: if the metric has no gradient.

    Example:
        value, acts, grads = cache_fwd_and_bwd(model, tokens, metric, "blocks.*.hook_resid_post")
    """
    for name in _NOT_FOR_TWO_CACHES & more.keys():
        raise ValueError(broken_rule("cache_fwd_and_bwd", name, "be left out", repr(more[name]), "Use run_with_cache."))
    kept = Kept("cache_fwd_and_bwd", pos_slice, reduce, over, dtype, device)
    known = hook_points("cache_fwd_and_bwd", model)
    found = find_names("cache_fwd_and_bwd", model, names_filter, "keep", known)
    own = own_run_with_cache(model)
    if default_of(own, "incl_bwd") is True:
        more["incl_bwd"] = False
    asked = Asked(model, known, _within(model, found, more), exact=exact_names(model, names_filter, found))
    run = Run("cache_fwd_and_bwd", asked, kept, calls, backend, backward=True)
    _, value, _ = _run(run, own, (tokens,), more, model_kwargs, metric, params)
    return value.item(), activation_cache(run.outputs(), model), activation_cache(run.gradients(), model)


def _within(model: Any, found: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return within_layers(model, found, options.get("start_at_layer"), options.get("stop_at_layer"))


def _run(
    run: Run,
    own: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    model_kwargs: Mapping[str, Any] | None,
    metric: Metric | None,
    params: bool,
) -> tuple[Any, Any, Any]:
    """Run the model and the backward: its output, the metric's value, and the cache that it made for no point."""
    with run.hooked():
        # Theirs, without a point: it knows about tokens, return types and what a cache is.
        output, cache = own(*args, names_filter=run.asked.left, **kwargs, **(model_kwargs or {}))
        ran_backward = not own.__module__.startswith("transformer_lens.") and run.has_gradients()
        if ran_backward and metric is not None:
            raise ValueError(
                broken_rule(
                    run.who, "metric", "be left out with a model whose run_with_cache runs a backward of its own",
                    type(run.asked.model).__name__, "Use tlfast.transformer_lens.capture.",
                )
            )  # fmt: skip
        value = output if metric is None else metric(output)
        if run.anchor is not None and not ran_backward:
            run.backward(value, params)
    _report_clashes(run)
    return output, value, cache


def _report_clashes(run: Run) -> None:
    """A point whose gradients can't be added up fails a run that asked for it, and no run that swept it up."""
    clashes = run.clashes()
    for name in clashes.keys() & run.asked.exact:
        raise ValueError(clashes[name])
    for why in dict.fromkeys(clashes.values()):
        warnings.warn(f"{run.who}: left out a gradient. {why}", stacklevel=5)


@uncounted
def run_as_theirs(
    own: Callable[..., Any], asked: Asked, model_args: tuple[Any, ...], options: dict[str, Any], caches_gradients: bool
) -> Any:
    """What a model's own ``run_with_cache(incl_bwd=True)`` returns, run by it, with taps in place of its hooks.

    Args:
        own: it, of one model.
        asked: the points, all of TransformerLens' own class.
        model_args, options: what it was called with.
        caches_gradients: whether it knows incl_bwd.
    """
    kept = Kept("run_with_cache", options.get("pos_slice"), "none", "pos", None, options.get("device"), as_theirs=True)
    run = Run("run_with_cache", asked, kept, "last", "auto", backward=True)
    if not caches_gradients:
        options = {name: given for name, given in options.items() if name not in ("incl_bwd", "pos_slice", "device")}
    with run.hooked():
        # The backward is its own, too, with its rules and its errors.
        output, cache = own(*model_args, **{**options, "names_filter": asked.left})
        if not caches_gradients:
            run.backward(output, params=True)
    tensors_of(cache).update(run.finished(bool(options.get("remove_batch_dim", False))))
    return output, cache
