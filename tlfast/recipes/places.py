"""Where a study looks, modules or hook points: what they put out in a forward, and its gradient in the backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backends.choice import pick_backend
from ..backends.outputs import select_output
from ..errors import broken_rule
from ..hooks.attachment import check_not_compiled, hook_input, hook_module
from ..hooks.points import as_list, find_points, is_glob, match_names
from ..spec import Points

Take = Callable[[int, torch.Tensor], None]  # the number of a place, and a tensor there


@dataclass(frozen=True)
class Place:
    """One side of one module, which may be called ``often`` in a forward.

    ``convert`` is what TransformerLens makes of a tensor there before a hook sees it.
    """

    name: str
    module: nn.Module
    side: str = "output"
    output: int | str | None = None
    often: bool = False

    @property
    def convert(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        conversion = getattr(self.module, "hook_conversion", None)
        return None if conversion is None else conversion.convert


def hook_dict_of(model: nn.Module) -> dict[str, Any]:
    """The hook points of a TransformerLens model, aliases included; {} of any other model."""
    found = getattr(model, "hook_dict", None)
    return found if isinstance(found, dict) else {}


def find_places(who: str, model: nn.Module, points: Points, side: str, output: int | str | None) -> list[Place]:
    """The places that ``points`` means, each module once unless it was asked for by two names."""
    hooks = hook_dict_of(model)
    by_module = not callable(points) and any(isinstance(point, nn.Module) for point in as_list(points))
    if not hooks or by_module or isinstance(points, nn.Module):
        found: dict[str, Any] = find_points(who, model, points)
    else:
        found = {name: hooks[name] for name in match_names(who, hooks, points)}
        asked = set() if callable(points) else {name for name in as_list(points) if not is_glob(name)}
        taken = {id(found[name]) for name in asked & found.keys()}
        once: dict[str, Any] = {}
        for name, module in found.items():
            if name in asked or id(module) not in taken:
                once[name] = module
                taken.add(id(module))
        found = once
    return [Place(name, module, side, output) for name, module in found.items()]


def layers_of(who: str, model: nn.Module, remedy: str = "See docs/recipes.md for what is read.") -> list[nn.Module]:
    """The list of modules that is as long as the model's config says; ValueError where there isn't one."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers = getattr(text, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and n_layers is not None and len(m) == n_layers]
    if len(lists) != 1:
        got = f"{len(lists)} lists of {n_layers} modules" if n_layers else f"a {type(model).__name__}"
        raise ValueError(broken_rule(who, "model", "have one list of layers", got, remedy))
    return list(lists[0])


class Enough(Exception):
    """A forward has passed the last place: what comes behind isn't looked at."""


class Watch:
    """Hooks at places while a study lasts: each run says what is to be done with activations and with gradients."""

    def __init__(self, who: str, model: nn.Module, places: list[Place]):
        check_not_compiled(who, model)
        self.who, self.places = who, places
        self._on_act: Take | None = None
        self._on_grad: Take | None = None
        self._calls = [0] * len(places)
        self._left: int | None = None  # calls until a forward has passed the last place and ends
        self._fired = [False] * len(places)
        devices = {p.device.type for p in model.parameters() if not p.is_meta}
        self._engine = engine = pick_backend(who, "auto", devices)
        self._backwards = engine.Backwards(engine.Ledger(1), "raise")
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        try:
            for number, place in enumerate(self.places):
                self._hook(number, place)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._backwards.close()
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int, place: Place) -> None:
        engine = self._engine
        keeper = engine.SinkKeeper(lambda grad: self._gradient(number, grad), "none", ())
        tap = engine.Tap(self._backwards, place.name, keeper, place.output)
        tap.set_side(place.side)
        if place.convert is not None:
            tap.set_convert(place.convert, None)
        if place.side == "input":
            self._handles += hook_input(place.module, tap)

            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                tensor, _ = select_output(args, place.output)
                self._activation(number, select_output(kwargs, place.output)[0] if tensor is None else tensor)

            self._handles.append(place.module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            self._handles += hook_module(place.module, tap, "tensor", engine)

            def after(module: nn.Module, args: Any, output: Any) -> None:
                self._activation(number, select_output(output, place.output)[0])

            self._handles.append(place.module.register_forward_hook(after))

    @torch.no_grad()
    def _activation(self, number: int, tensor: torch.Tensor | None) -> None:
        if self._on_act is None or tensor is None or torch._C._current_graph_task_id() != -1:
            return  # in a backward a checkpoint runs a part of the forward again
        self._calls[number] += 1
        convert, act = self.places[number].convert, tensor.detach()
        self._on_act(number, act if convert is None else convert(act))
        if self._left is not None and self._calls[number] == 1:
            self._left -= 1
            if self._left == 0:
                raise Enough

    def _gradient(self, number: int, grad: torch.Tensor) -> None:
        if self._on_grad is not None:
            self._fired[number] = True
            self._on_grad(number, grad)

    def forward(self, run: Callable[[], Any], on_act: Take, stop: bool = False) -> Any:
        """One forward; with ``stop`` it ends, and gives None, when every place has been called."""
        self._calls = [0] * len(self.places)
        self._on_act, self._left = on_act, len(self.places) if stop else None
        try:
            output = run()
        except Enough:
            output = None
        finally:
            self._on_act = self._left = None
        self._check_calls()
        return output

    def _check_calls(self) -> None:
        for place, n_calls in zip(self.places, self._calls, strict=True):
            if n_calls == 0 or (n_calls > 1 and not place.often):
                remedy = "Leave it out, or switch it on." if n_calls == 0 else "Take points inside of it, or around it."
                got = f"{place.name}, {n_calls} times"
                raise ValueError(broken_rule(self.who, "a point", "be called once in a forward", got, remedy))

    def backward(self, value: torch.Tensor, on_grad: Take) -> None:
        """The gradients of the sum of a metric's values."""
        self._fired = [False] * len(self.places)
        self._on_grad = on_grad
        try:
            value.sum().backward()
        finally:
            self._on_grad = None
        unreached = [place.name for place, fired in zip(self.places, self._fired, strict=True) if not fired]
        if unreached:
            rule, remedy = "be reached by the metric's gradient", "Leave out what the metric isn't made of."
            raise ValueError(broken_rule(self.who, "every point", rule, ", ".join(unreached), remedy))
