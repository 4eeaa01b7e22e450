"""One cached run of a model: what is kept of a tensor, the taps on the points, the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import steps as python_steps
from .. import tensor_cache as python_cache
from ..attachment import CachingHooks, caching_id
from ..errors import broken_rule
from ..ops import pick_native, reduce_into
from ..reference import normal_dims, reduced_shape
from ..spec import REDUCTIONS, Over, Reduction, one_of, parse_over, stored_dtype
from .handles import ListedTap, convert_at
from .library import position_slice
from .names import position_dim

Select = Callable[[torch.Tensor], torch.Tensor]


class Kept:
    """What is kept of a tensor: which positions, reduced over what, in which dtype, on which device."""

    def __init__(self, who: str, pos_slice: Any, reduce: Reduction, over: Over, dtype: Any, device: Any):
        one_of(who, "reduce", reduce, REDUCTIONS)
        self.who, self.reduce, self.over = who, reduce, over
        self.dtype, self.device = stored_dtype(who, dtype), device
        if reduce != "none" and over != "pos":
            parse_over(who, over)
        self.slice = None if pos_slice is None else position_slice(pos_slice)
        self.everything = pos_slice is None and reduce == "none" and dtype is None and device is None

    def at(self, model: nn.Module, name: str, point: Any) -> Select | None:
        """A function that makes what is kept of a tensor at this point; None where it is all of it."""
        if self.everything:
            return None

        def select(tensor: torch.Tensor) -> torch.Tensor:
            dim = position_dim(model, name, point, tensor.dim())
            if self.slice is not None and dim is not None:
                # A slice is a view that would keep all of the tensor alive.
                tensor = self.slice.apply(tensor, dim=dim).clone()
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

    def __init__(self, who: str, model: nn.Module, found: dict[str, Any], kept: Kept, calls: str, backend: str):
        one_of(who, "calls", calls, ("sum", "last"))
        one_of(who, "backend", backend, ("auto", "native", "python"))
        self.native = pick_native(who, backend, set())  # holding a tensor is the same on every device
        self.step: Any = python_steps.Step(1, "nan") if self.native is None else self.native.Step(1, "nan")
        self.cache: Any = python_cache.TensorCache() if self.native is None else self.native.TensorCache()
        # Shared by all taps: backward(inputs=[anchor]) goes through every point and to no parameter.
        self.anchor = torch.zeros((), requires_grad=True)
        self.model, self.kept, self.calls = model, kept, calls
        self.names: list[list[str]] = []
        self.points: list[Any] = []
        places: dict[int, int] = {}
        for name, point in found.items():
            place = places.setdefault(id(point), len(self.points))
            if place == len(self.points):
                self.points.append(point)
                self.names.append([])
            self.names[place].append(name)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The taps are on their points inside; LensHandles among the points' hooks, and no others go."""
        make = python_cache.CachingTap if self.native is None else self.native.Tap.to_cache
        handle_id = caching_id(self.native)
        listed: list[ListedTap] = []
        try:
            for point, names in zip(self.points, self.names, strict=True):
                select = self.kept.at(self.model, names[0], point)
                tap = make(self.step, names[0], self.cache, select, self.calls, self.anchor)
                convert_at(point, tap)
                listed.append(ListedTap(point, CachingHooks(point, tap, self.native, handle_id), permanent=False))
            yield
        finally:
            self.step.close()
            for handle in listed:
                handle.remove()

    def backward(self, who: str, value: Any, params: bool) -> None:
        """The gradients of one scalar."""
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                broken_rule(who, "the value", "be one number", got, 'Pass metric=, or return_type="loss".')
            )
        if not value.requires_grad:
            raise RuntimeError(
                broken_rule(
                    who, "the value", "require grad", "one without a graph",
                    "Enable gradients; for a frozen model use tlfast.freeze(model).",
                )
            )  # fmt: skip
        value.backward(inputs=None if params else [self.anchor])

    def outputs(self) -> dict[str, Any]:
        return {name: tensor for place, tensor in self.cache.outputs() for name in self.names[place]}

    def gradients(self, suffix: str = "") -> dict[str, torch.Tensor]:
        return {name + suffix: tensor for place, tensor in self.cache.gradients() for name in self.names[place]}
