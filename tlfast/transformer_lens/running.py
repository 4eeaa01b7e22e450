"""One cached run of a model: what is kept of a tensor, the taps on the points, the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from ..backends.choice import pick_backend, reduce_into
from ..backends.reference import normal_dims, reduced_shape
from ..errors import broken_rule
from ..spec import (
    REDUCTIONS,
    Over,
    Reduction,
    one_of,
    parse_over,
    stored_dtype,
)
from .caching_taps import CachingTaps, leave, take
from .handles import ListedTap, OwnHooks
from .library import position_slice
from .names import is_by_head, position_dim
from .theirs import Asked, is_bridge, is_hooked, of_users_classes, users_classes

Select = Callable[[torch.Tensor], torch.Tensor]
Found = list[tuple[int, Any]]  # places of points, and what was kept there


class Kept:
    """What is kept of a tensor: which positions, reduced over what, in which dtype, on which device."""

    def __init__(
        self, who: str, pos_slice: Any, reduce: Reduction, over: Over, dtype: Any, device: Any, as_theirs: bool = False
    ):
        one_of(who, "reduce", reduce, REDUCTIONS)
        self.who, self.reduce, self.over = who, reduce, over
        self.dtype, self.device = stored_dtype(who, dtype), device
        if reduce != "none" and over != "pos":
            parse_over(who, over)
        self.slice = None if pos_slice is None else position_slice(pos_slice)
        self.as_theirs = as_theirs  # a view of a slice, for one: what changes the tensor in place shows there
        self.everything = pos_slice is None and reduce == "none" and dtype is None and device is None

    def at(self, model: nn.Module, known: dict[str, Any], name: str, point: Any) -> Select | None:
        """A function that makes what is kept of a tensor at this point; None where it is all of it."""
        if self.everything:
            return None
        by_head = is_by_head(known, name, point)

        def select(tensor: torch.Tensor) -> torch.Tensor:
            dim = position_dim(model, name, point, by_head, tensor.dim())
            if self.slice is not None and dim is not None:
                tensor = self.slice.apply(tensor, dim=dim)
                # A slice is a view that would keep all of the tensor alive.
                tensor = tensor if self.as_theirs else tensor.clone()
            if tensor.is_floating_point():
                if self.reduce != "none":
                    over = dim if self.over == "pos" else self.over
                    tensor = tensor if over is None else self._reduced(tensor, over)
                elif self.dtype is not None:
                    tensor = tensor.to(self.dtype)
            return tensor.to(self.device)

        return select

    def _reduced(self, tensor: torch.Tensor, over: Over) -> torch.Tensor:
        shape = reduced_shape(tensor.shape, normal_dims(self.who, parse_over(self.who, over), tensor.dim()))
        out = torch.empty(shape, dtype=self.dtype or tensor.dtype, device=tensor.device)
        return reduce_into(out, tensor, self.reduce, over)


class Run:
    """One cached run: its hook points, each with the names under which it was asked for."""

    def __init__(self, who: str, asked: Asked, kept: Kept, calls: str, backend: str, backward: bool):
        one_of(who, "calls", calls, ("sum", "last"))
        one_of(who, "backend", backend, ("auto", "native", "python"))
        self.engine = pick_backend(who, backend, set())  # holding a tensor is the same on every device
        # Shared by all taps: backward(inputs=[anchor]) goes through every point and to no parameter. Without a backward
        # there is none, and the taps keep outputs and change nothing.
        self.anchor = torch.zeros((), requires_grad=True) if backward else None
        self.who, self.asked, self.kept, self.calls = who, asked, kept, calls
        self.taps: CachingTaps  # while it runs
        self._outputs: Found = []
        self._gradients: Found = []
        self._clashes: list[tuple[int, str]] = []
        self.late: dict[int, Select] = {}  # what is made of the tensors of a point at the end, and not at once
        self.entered: dict[int, int] = {}  # how many points had an output when this one's hooks began to run
        self.names: list[list[str]] = []
        self.points: list[Any] = []
        places: dict[int, int] = {}
        for name, point in asked.found.items():
            place = places.setdefault(id(point), len(self.points))
            if place == len(self.points):
                self.points.append(point)
                self.names.append([])
            self.names[place].append(name)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The taps are on their points inside; LensHandles among the points' hooks, and no others go.

        They are listed as TransformerLens' own caching hooks would be, also among the backward hooks if there is a
        backward: its components look there to choose their path.
        """
        handles: list[ListedTap | OwnHooks | RemovableHandle] = []
        names = [names[0] for names in self.names]
        key = (*names, self.anchor is None, self.calls, self.engine.NAME) if self.kept.everything else None
        self.taps = taps = (key and take(self.asked.model, key, self.points)) or self._new_taps(names)
        self.asked.look_once()
        try:
            taps.open(self.anchor)
            # Where one of them is of a user's class, all are looked at one by one.
            left = range(len(self.points)) if users_classes(self.points) else taps.put()
            own_ways = {id(point) for point in of_users_classes([self.points[place] for place in left])}
            for place in left:
                point = self.points[place]
                if id(point) in own_ways or (self.kept.as_theirs and is_hooked(point)):
                    handles.append(OwnHooks(point, taps.tap(place), backward=self.anchor is not None))
                    continue
                if point._forward_hooks and self.anchor is not None:  # which may call other points
                    handles.append(point.register_forward_pre_hook(partial(self._entered, place)))
                handles.append(taps.hook(place, point))
            yield
            self._outputs, self._gradients = taps.cache.outputs(), taps.cache.gradients()
            self._clashes = taps.cache.clashes()
        except BaseException:
            key = None
            raise
        finally:
            self.asked.forget()
            taps.close()
            taps.take_off()
            for handle in handles:
                handle.remove()
            if key is not None:
                leave(self.asked.model, key, taps)

    def _new_taps(self, names: list[str]) -> CachingTaps:
        selects: list[Select | None] = []
        for place, (name, point) in enumerate(zip(names, self.points, strict=True)):
            select = self.kept.at(self.asked.model, self.asked.known, name, point)
            if select is not None and not self.kept.as_theirs and point._backward_hooks:  # which may change it
                self.late[place], select = select, None
            selects.append(select)
        lists = ("fwd_hooks",) if self.anchor is None else ("fwd_hooks", "bwd_hooks")
        return CachingTaps(self.engine, self.points, names, selects, self.calls, lists)

    def _entered(self, place: int, point: Any, args: Any) -> None:
        if self.taps.backwards.runs_here:
            self.entered.setdefault(place, self.taps.cache.n_outputs)

    def backward(self, value: Any, params: bool) -> None:
        """The gradients of one scalar."""
        if not isinstance(value, torch.Tensor) and hasattr(value, "backward") and not is_bridge(self.asked.model):
            value.backward()  # as a HookedRootModule takes whatever has one
            return
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                broken_rule(self.who, "the value", "be one number", got, 'Pass metric=, or return_type="loss".')
            )
        if not value.requires_grad:
            raise RuntimeError(
                broken_rule(
                    self.who, "the value", "require grad", "one without a graph",
                    "Enable gradients; for a frozen model use tlfast.freeze(model).",
                )
            )  # fmt: skip
        if params:
            value.backward()
            return
        # Towards the anchor, and to whatever else waits for a gradient: hooks, leaves that the model doesn't own.
        leaves, nodes = self.engine.waiting(value)
        own = _own_parameters(self.asked.model)
        edges = [GradientEdge(node, 0) for node in nodes]
        ways: list[Any] = [self.anchor, *(leaf for leaf in leaves if id(leaf) not in own), *edges]
        torch.autograd.backward(value, inputs=ways)

    def clashes(self) -> dict[str, str]:
        """The points whose gradients of several calls can't be added up, by the names that were asked for, and why."""
        return {name: why for place, why in self._clashes for name in self.names[place]}

    def has_gradients(self) -> bool:
        """Whether a backward has been here."""
        return bool(self.taps.cache.gradients())

    def leave_hooks(self, cache: dict[str, Any], no_batch: bool) -> None:
        """Leave hooks of TransformerLens' own kind that fill a cache, until the model's hooks are reset."""
        model, known = self.asked.model, self.asked.known
        level = getattr(model, "context_level", 0) + 1
        for point, names in zip(self.points, self.names, strict=True):
            select = self.kept.at(model, known, names[0], point)
            point.add_hook(_filling(cache, names, select, no_batch, outputs=True), dir="fwd", level=level)
            if self.anchor is not None:
                keys = [name + "_grad" for name in names]
                point.add_hook(_filling(cache, keys, select, no_batch, outputs=False), dir="bwd", level=level)

    def finished(self, no_batch: bool) -> dict[str, Any]:
        """All that a run_with_cache puts into its cache."""
        tensors = self.asked.completed({**self.outputs(), **self.gradients("_grad")})
        return {name: without_batch(kept) for name, kept in tensors.items()} if no_batch else tensors

    def outputs(self) -> dict[str, Any]:
        return self._named(self._outputs, "")

    def gradients(self, suffix: str = "") -> dict[str, torch.Tensor]:
        return self._named(self._inner_first(self._gradients), suffix)

    def _inner_first(self, kept: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """A point whose hooks call other points comes after those.

        A full backward hook fires when the gradient has come through to what its module was given, a tap before.
        """
        if not self.entered:
            return kept
        came = [place for place, _ in self._outputs]
        left = {place: number for number, place in enumerate(came)}
        order = {place: number for number, (place, _) in enumerate(kept)}
        ranks: dict[int, tuple[int, ...]] = {place: (number,) for place, number in order.items()}
        for place, first in self.entered.items():
            inside = [order[inner] for inner in came[first : left.get(place, 0)] if inner in order]
            if inside and place in order and order[place] < max(inside):
                ranks[place] = (max(inside), left[place])  # the innermost leaves first
        return sorted(kept, key=lambda pair: ranks[pair[0]])

    @torch.no_grad()
    def _named(self, kept: list[tuple[int, Any]], suffix: str) -> dict[str, Any]:
        named = {}
        for place, tensor in kept:
            if tensor is not None and place in self.late:
                tensor = self.late[place](tensor)
            for number, name in enumerate(self.names[place]):
                # Of its own under each name, as a hook of its own would have kept it.
                named[name + suffix] = tensor if number == 0 or tensor is None else tensor.detach()
        return named


def _own_parameters(model: nn.Module) -> set[int]:
    """Those of ``model.parameters()``, by identity, for a fraction of what its generators cost in a model of parts."""
    own: set[int] = set()
    modules, seen = [model], {id(model)}
    for module in modules:  # which grow
        own.update(map(id, module._parameters.values()))
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return own


def without_batch(tensor: Any) -> Any:
    """A tensor without its leading dimension, if that is of size 1."""
    return tensor[0] if tensor is not None and tensor.dim() and tensor.shape[0] == 1 else tensor


def _filling(
    cache: dict[str, Any], keys: list[str], select: Select | None, no_batch: bool, outputs: bool
) -> Callable[..., None]:
    def keep(value: Any, hook: Any) -> None:
        found = value[0] if isinstance(value, tuple) and value else value
        # No gradient is None, of an output in a tuple that nothing was made of; it isn't kept.
        if not isinstance(found, torch.Tensor) and not (outputs and found is None):
            return
        kept = found if found is None else found.detach()
        kept = kept if kept is None or select is None else select(kept)
        cache.update(dict.fromkeys(keys, without_batch(kept) if no_batch else kept))

    return keep


def tensors_of(cache: Any) -> dict[str, Any]:
    """The dictionary inside what a run_with_cache returned: a dict, or an ActivationCache around one."""
    found: dict[str, Any] = cache if isinstance(cache, dict) else cache.cache_dict
    return found
