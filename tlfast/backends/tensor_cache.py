"""Whole tensors kept by the taps of one run, in plain Python: what `tlfast._C.TensorCache` does natively."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..errors import broken_rule
from .reference import accumulator
from .streams import current_stream, read_on

Change = Callable[[torch.Tensor], torch.Tensor]


class _Place:
    def __init__(self, name: str, select: Change | None):
        self.name, self.select = name, select
        self.output: torch.Tensor | None = None
        self.gradient: torch.Tensor | None = None
        self.summed = False  # the gradient is the sum so far, nothing of which was selected yet
        self.task = -1  # in which the gradient was kept
        self.dtype: torch.dtype | None = None  # of the gradients that are summed
        self.clash = ""  # why its gradients can't be added up
        self.stream: torch.cuda.Stream | None = None  # of a GPU, on which the sum was made


class TensorCache:
    """What the taps of one run keep: the outputs of their modules and the gradients there."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._outputs: dict[int, None] = {}  # the points, as they came
        self._gradients: dict[int, None] = {}
        self._lock = threading.Lock()

    def add(self, name: str, select: Change | None) -> int:
        """Make a place for one point; ``select`` makes what is kept of a tensor there."""
        self._places.append(_Place(name, select))
        return len(self._places) - 1

    def clear(self) -> None:
        """Forget what was kept; the places stay."""
        with self._lock:
            self._places = [_Place(place.name, place.select) for place in self._places]
            self._outputs, self._gradients = {}, {}

    def output(self, point: int, output: torch.Tensor | None) -> None:
        """Keep an output in place of the one before; None stands for an output that is no tensor."""
        place = self._places[point]
        place.output = place.select(output) if place.select and output is not None else output
        self._outputs.setdefault(point)

    def gradient(self, point: int, grad: torch.Tensor, sum: bool, alone: bool) -> None:
        """Keep a gradient in place of the one before; with ``sum`` add it, if it isn't ``alone`` in its backward."""
        here, task = current_stream(grad.device), torch._C._current_graph_task_id()
        with self._lock:
            place = self._places[point]
            if place.clash:
                return
            first = point not in self._gradients
            if alone and (first or place.task != task):
                sum = False  # the first of its backward, and the only one
            if sum and not first and not place.summed and place.select:  # what was selected can't be added to
                rule = "make no call inside a backward that reaches it"
                got = "another one after the first gradient"
                place.clash = broken_rule(f"capture at {place.name}", "a point", rule, got, 'Choose calls="last".')
                place.gradient = None
                return
            self._gradients.setdefault(point)
            place.summed, place.task, place.dtype = sum, task, grad.dtype
            if first or not sum:
                place.gradient = place.select(grad) if place.select and not sum else grad
                place.stream = here
                return
            assert place.gradient is not None
            if place.gradient.shape != grad.shape:  # which + would broadcast
                place.clash = broken_rule(
                    f"capture at {place.name}", "a point",
                    f"have one shape in all calls to be summed ({list(place.gradient.shape)})", list(grad.shape),
                    'Choose calls="last".',
                )  # fmt: skip
                place.gradient = None
                return
            if here is not None and place.stream is not None and here != place.stream:
                here.wait_event(place.stream.record_event())
                read_on(here, place.gradient)
            place.gradient, place.stream = place.gradient.to(accumulator(grad.dtype)) + grad, here

    @property
    def n_outputs(self) -> int:
        """How many points have had an output so far."""
        return len(self._outputs)

    def outputs(self) -> list[tuple[int, torch.Tensor | None]]:
        """(point, output) in the order in which the points came first."""
        return [(point, self._places[point].output) for point in self._outputs]

    @torch.no_grad()
    def gradients(self) -> list[tuple[int, torch.Tensor]]:
        """(point, gradient) in the order in which the points came first."""
        kept = []
        for point in self._gradients:
            place = self._places[point]
            if place.clash:
                continue
            assert place.gradient is not None
            gradient = place.gradient.detach()
            if place.summed:
                gradient = gradient.to(place.dtype)
                gradient = place.select(gradient) if place.select else gradient
            kept.append((point, gradient))
        return kept

    def clashes(self) -> list[tuple[int, str]]:
        """(point, why) of the gradients that couldn't be added up, and are not kept: one point fails no other's."""
        return [(point, self._places[point].clash) for point in self._gradients if self._places[point].clash]


def waiting(value: torch.Tensor) -> tuple[list[torch.Tensor], list[Any]]:
    """The leaves in the graph of a value, and the nodes where a hook may wait for a gradient.

    Python can't see hooks on nodes. So these are the lowest nodes, and all others run on the way to them.
    """
    leaves: list[torch.Tensor] = []
    nodes: list[Any] = []
    still: list[Any] = [value.grad_fn]
    known: set[Any] = {None, value.grad_fn}
    while still:
        node = still.pop()
        if node is None:
            continue
        if _is_leafs(node):
            leaves.append(node.variable)
            continue
        below = dict.fromkeys(following for following, _ in node.next_functions)
        if all(following is None or _is_leafs(following) for following in below):
            nodes.append(node)
        still += [following for following in below if following not in known]
        known.update(below)
    return leaves, nodes


def _is_leafs(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"
