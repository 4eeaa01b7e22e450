"""Calls of run_with_cache and its kin, and the ways to make them: theirs as it is, and ours in its place."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from lens_models import first_example
from lens_outcomes import changes, differences, marks, outcome

import tlfast.transformer_lens as lens
from tlfast.backends import python

OURS = ("ours, native", "ours, python")
WAYS = ("accelerate, native", "accelerate, python", "install, native", *OURS)
# Calls that are made in Python, too: what the backends do at a point, other tests say of each of them.
PYTHON_TOO = ("all", "a list", "one example", "a user's hooks", "two caches", "not one number", "a frozen model")
# Ours refuses in its own words, and before anything runs.
REFUSED = ("error", "grads", "warned", "random")
SLICED = {"but": ("strides",), "ours": ("strides",)}  # ours is a copy, which gives the rest of the memory back


@dataclasses.dataclass
class Call:
    """One call: a function of whatever stands for the model's own ``run_with_cache``."""

    make: Callable[[Any], Any]
    but: tuple[str, ...] = ()  # parts in which ours, as the documentation says, is another
    ours: tuple[str, ...] | None = ()  # the same for tlfast.transformer_lens.run_with_cache; None: it isn't made there
    mine: Callable[[Any], Any] | None = None  # what to call there, where it isn't the same


@contextmanager
def plain_python():
    """Python instead of native code wherever a backend is chosen."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("tlfast.") and hasattr(module, "pick_backend"):
                stack.enter_context(patch.object(module, "pick_backend", lambda *_: python))
        yield


@contextmanager
def going(way, model):
    """What stands for the model's own ``run_with_cache`` in a way to call it; without a frame between."""
    name, _, backend = way.partition(", ")
    with plain_python() if backend == "python" else nullcontext():
        if name == "theirs":
            yield model.run_with_cache
        elif name == "ours":
            yield partial(lens.run_with_cache, model, params=True, calls="last", backend=backend)
        elif name == "accelerate":
            with lens.accelerate(model):
                yield model.run_with_cache
        else:
            lens.install()
            try:
                yield model.run_with_cache
            finally:
                lens.uninstall()


def ways_of(name):
    """The ways in which a call is made. Without gradients accelerate leaves it to theirs, whatever the backend."""
    for way in WAYS:
        if way.endswith("python") and not name.endswith(PYTHON_TOO):
            continue
        if (way == "accelerate, python" and "forward" in name) or (way == "install, native" and ", all" not in name):
            continue
        yield way


def compared(model, found):
    """What differs in each way from theirs, by call and way; and how many calls gave gradients."""
    wrong, gradients, known = [], 0, marks(model)

    def seen(call, way):
        nonlocal known
        with going(way, model) as run:
            mine = way in OURS and call.mine is not None
            found = outcome(model, partial(call.mine if mine else call.make, run))
        before, known = known, marks(model)
        found.left = changes(before, known)
        if "left" in call.but:
            model.reset_hooks()
            known = marks(model)
        return found

    for name, call in found.items():
        theirs = seen(call, "theirs")
        gradients += any(str(key).endswith("_grad") for key in theirs.cache or ())
        for way in ways_of(name):
            but = call.ours if way in OURS else call.but
            if but is None:
                continue
            ours = seen(call, way)
            pair = [of_any_backward(theirs), of_any_backward(ours)] if way in OURS else [theirs, ours]
            wrong += [f"{name}; {way}: {what}" for what in differences(*pair, but)]
            if but is REFUSED and (theirs.error is None) != (ours.error is None):
                wrong.append(f"{name}; {way}: error: {theirs.error} and {ours.error}")
    return wrong, gradients


def of_any_backward(found):
    """An outcome without the place of PyTorch's warning that names whoever called backward: ours is called by us."""
    from_backward = "Full backward hook is firing"
    warned = [one[:2] if one[1].startswith(from_backward) else one for one in found.warned]
    return dataclasses.replace(found, warned=warned)


def metric(output):
    """One number, of whatever a model returns."""
    return (next(tensors_in(output)).float() ** 2).mean()


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "values"):
        yield from tensors_in(list(value.values()))


@contextmanager
def one_number(model):
    """The model returns its metric: theirs takes no other."""
    forward = type(model).forward
    with patch.dict(vars(model), forward=lambda *args, **kwargs: metric(forward(model, *args, **kwargs))):
        yield


@contextmanager
def frozen(model):
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def failing_half_way(model, name):
    """A point that takes no hook: a caching set-up fails there, after other points have theirs."""

    def refuse(*args, **kwargs):
        raise RuntimeError("no hook here")

    with patch.dict(vars(model.hook_dict[name]), add_hook=refuse):
        yield


def all_of(*makers):
    """One context of several."""

    @contextmanager
    def entered():
        with ExitStack() as stack:
            for make in makers:
                stack.enter_context(make())
            yield

    return entered


class Names:
    """Names of points that are called and switched on: their own, and aliases where there are some."""

    def __init__(self, model, args, kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            called = list(model.run_with_cache(*args, **kwargs)[1].keys())
            on = set(model.run_with_cache(*args, **kwargs, names_filter=called)[1].keys())
        self.off = [name for name in called if name not in on]
        self.own = [name for name, point in model.hook_dict.items() if name in on and name == point.name]
        aliases = [name for name in model.hook_dict if name in on and name not in self.own] or self.own
        self.alias, self.middle = aliases[len(aliases) // 2], self.own[len(self.own) // 2]
        self.several = [self.own[-1], self.alias, self.middle, self.own[0], aliases[0]]

    def some(self, name):
        return name in self.several or (("resid" in name or "_scale" in name) and name not in self.off)


def _ends(model, kwargs, loss):
    """What a call ends with: the output, or one number and a backward from there."""
    if loss is None:
        end = {"number": (partial(one_number, model), kwargs | {"incl_bwd": True})}
    else:
        end = {"loss": (nullcontext, kwargs | loss | {"incl_bwd": True})}
    return {"forward": (nullcontext, kwargs)} | end


def _call(context, args, options, **but):
    def make(run):
        with context():
            return run(*args, **options)

    return Call(make, **but)


def calls(model, args, kwargs, loss):
    """Calls by name; ``loss`` are the keywords by which the model returns one number, or None where it can't."""
    names, found = Names(model, args, kwargs), {}
    alone, alone_kwargs = first_example(args), first_example(kwargs)
    options = {
        "all": ({}, {}),
        "a list": ({"names_filter": names.several}, {}),
        "a predicate": ({"names_filter": names.some}, {}),
        "position -1": ({"pos_slice": -1}, SLICED),
        "a device": ({"device": "cpu"}, {}),
    }
    more = {
        "a name": ({"names_filter": names.alias}, {}),
        "no point": ({"names_filter": lambda name: False}, {}),
        "an empty list": ({"names_filter": []}, {}),
        "positions of a list": ({"pos_slice": (1, 3), "names_filter": names.several}, SLICED),
        "a dict": ({"return_cache_object": False} if hasattr(model, "cfg") else {}, {}),
        "a list with points that are switched off": ({"names_filter": names.several + names.off}, {"ours": None}),
        "a predicate of all": ({"names_filter": lambda name: True}, {"ours": ("warned",)}),
    }
    for end, (context, base) in _ends(model, kwargs, loss).items():
        for name, (option, but) in (options if end == "forward" else options | more).items():
            found[f"{end}, {name}"] = _call(context, args, base | option, **but)
        single = base | alone_kwargs | {"remove_batch_dim": True}
        found[f"{end}, one example"] = _call(context, alone, single)
        found[f"{end}, a list of one example"] = _call(context, alone, single | {"names_filter": names.several})
        found[f"{end}, a user's hooks"] = _with_hooks(model, context, args, base, names)
        found[f"{end}, hooks that stay"] = _staying(model, context, args, base)
    return found


def _with_hooks(model, context, args, options, names):
    """Hooks of a user at one point that change what goes through, and at another that see what comes back."""

    def make(run):
        seen = []

        def double(value, hook):
            seen.append(value.detach().clone())
            return value * 2

        backward = [(names.own[0], lambda grad, hook: seen.append(grad.clone()))]
        with context(), model.hooks([(names.middle, double)], backward):
            output, cache = run(*args, **options)
        return [output, seen], cache

    return Call(make)


def _staying(model, context, args, options):
    """Caching hooks that are left, and fill the cache again."""

    def make(run):
        with context():
            output, cache = run(*args, **options, reset_hooks_end=False)
            getattr(cache, "cache_dict", cache).clear()
            plain = {key: value for key, value in options.items() if key != "incl_bwd"}
            again = model(*args, **plain)
            if "incl_bwd" in options:
                again.backward()
        return output, cache

    return Call(make, but=("left",), ours=("left",))


def metric_calls(model, args, kwargs):
    """Gradients of a metric: by ours with it, by a model that returns it, and by caching hooks."""
    names, base = Names(model, args, kwargs), kwargs | {"incl_bwd": True}
    number, found = partial(one_number, model), {}

    def two_caches(run, **options):
        backend = run.keywords["backend"]
        value, acts, grads = lens.cache_fwd_and_bwd(
            model, *args, metric, params=True, calls="last", backend=backend, **kwargs, **options
        )
        return value, {**acts, **{f"{name}_grad": grads[name] for name in grads}}

    def valued(run, **options):
        with number():
            value, cache = run(*args, **base, **options)
        return value.item(), dict(cache.items())

    def measured(run, **options):
        output, cache = run(*args, **kwargs, metric=metric, **options)
        return metric(output).item(), dict(cache.items())

    for label, options in {"": {}, " of a list": {"names_filter": names.own[::3]}}.items():
        found[f"a metric{label}"] = Call(partial(valued, **options), mine=partial(measured, **options))
        found[f"a metric{label}, two caches"] = Call(partial(valued, **options), mine=partial(two_caches, **options))
    for label, choice in {"all": None, "a predicate": names.some, "a list": names.several}.items():
        found[f"caching hooks for {label}"] = _caching_hooks(model, args, kwargs, choice)
    return found


def _caching_hooks(model, args, kwargs, choice):
    """Hooks that fill a cache, by a context and until they are reset."""

    def make(run):
        cache, forward, backward = model.get_caching_hooks(choice, incl_bwd=True)
        with model.hooks(forward, backward):
            value = metric(model(*args, **kwargs))
            value.backward()
        added = model.add_caching_hooks(choice, incl_bwd=True)
        metric(model(*args, **kwargs)).backward()
        return value, {**cache, **{f"added {name}": kept for name, kept in added.items()}}

    return Call(make, but=("left",), ours=None)


def layer_calls(model, args, kwargs):
    """Calls that run some layers only, for models that have such an argument."""
    found = {f"stop at {layer}": _call(nullcontext, args, kwargs | {"stop_at_layer": layer}) for layer in (0, 1, -1)}
    # Ours takes the gradients of what the layer gives, with a metric.
    more = {"stop_at_layer": 1, "incl_bwd": True}
    return found | {"stop at 1, a number": _call(partial(one_number, model), args, kwargs | more, ours=None)}


def refusals(model, args, kwargs, loss):
    """Calls that theirs refuses, or that fail on the way."""
    names = Names(model, args, kwargs)
    backward, base = list(_ends(model, kwargs, loss).values())[1]
    still, free, broken = partial(frozen, model), torch.no_grad, partial(failing_half_way, model, names.middle)
    missing = {"names_filter": "no.such"}, {"names_filter": [names.own[0], "no.such"]}, {"names_filter": 3}
    return {
        "not one number": _call(nullcontext, args, kwargs | {"incl_bwd": True}, ours=REFUSED),
        "a frozen model": _call(all_of(still, backward), args, base, ours=REFUSED),
        "a frozen model, forward": _call(still, args, kwargs),
        "no gradients": _call(all_of(free, backward), args, base, ours=REFUSED),
        "no gradients, forward": _call(free, args, kwargs),
        "an unknown name": _call(backward, args, base | missing[0], ours=None),
        "an unknown name in a list": _call(backward, args, base | missing[1], ours=None),
        "a number as a filter": _call(backward, args, base | missing[2], ours=None),
        # A HookedTransformer takes the first in silence, a bridge refuses; ours keeps both, as its docstring says.
        "two examples as one": _call(backward, args, base | {"remove_batch_dim": True}, ours=None),
        "an unknown argument": _call(backward, args, base | {"no_such_argument": 1}),
        "a set-up that fails": _call(all_of(broken, backward), args, base, ours=None),
        "a set-up that fails, forward": _call(broken, args, kwargs, ours=None),
    }
