"""Steps of a collection as CUDA graphs: one for each shape of a batch, made at its first use, kept, and replayed."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch

from ..errors import broken_rule
from ..hooks.captured import Capture
from .batches import Batch

CudaGraph = Literal["auto", "on", "off"]
GraphStep = Callable[..., Callable[..., Any]]
"""`tlfast.graph_step`: (cap, step, *example_inputs) -> a function of inputs of the same shapes."""

MOST_GRAPHS = 8  # each keeps the memory of a whole step; as many as `bucket_lengths` gives lengths


def graphs_wanted(cuda_graph: CudaGraph, devices: set[torch.device], backend: Callable[[], str]) -> bool:
    """Whether a model on these devices, captured by this backend, is to run as CUDA graphs.

    Raises:
        ValueError: where they are asked for and can't be.
    """
    on_cuda = len(devices) == 1 and next(iter(devices)).type == "cuda"
    possible = cuda_graph != "off" and on_cuda and backend() == "native"
    if cuda_graph == "on" and not possible:
        where = ", ".join(sorted(map(str, devices)))
        got = f'"on" with a model on {where}' + (f" and the {backend()} backend" if on_cuda else "")
        rule = 'be "auto" or "off" unless the model is on one CUDA device and the native code runs there'
        raise ValueError(broken_rule("collect", "cuda_graph", rule, got, "Leave it out."))
    return possible


class Replays:
    """Runs batches by replaying graphs, or eagerly once a graph could not be made: a RuntimeError of ``graph_step``.

    Args:
        cap: the capture whose rows are written.
        graph_step: makes a graph of one forward and backward, leaves rows and counts as they were, and returns the
            function that replays it, which commits one step.
        required: an error where no graph can be made, instead of a warning.
    """

    def __init__(self, cap: Capture, graph_step: GraphStep, required: bool = False):
        self.cap, self.graph_step, self.required = cap, graph_step, required
        self._graphs: OrderedDict[tuple[int, ...], Callable[..., Any]] = OrderedDict()
        self._refused = False

    def step(self, eager: Callable[[Batch], None], batch: Batch) -> None:
        """One forward and one backward of a batch that has a mask: the same rows as ``eager`` writes.

        Raises:
            ValueError: where a graph is required and can't be made.
        """
        graph = None if self._refused else self._graph(eager, batch)
        if graph is None:
            eager(batch)
        else:
            graph(batch.input_ids, batch.mask)

    def _graph(self, eager: Callable[[Batch], None], batch: Batch) -> Callable[..., Any] | None:
        shape = tuple(batch.input_ids.shape)
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            return self._graphs[shape]
        if len(self._graphs) == MOST_GRAPHS:
            self._graphs.popitem(last=False)  # before the new one needs memory
        side = batch.padding_side

        def step(input_ids: torch.Tensor, mask: torch.Tensor) -> None:
            eager(Batch(input_ids, mask, side))

        try:
            graph = self.graph_step(self.cap, step, batch.input_ids, batch.mask)
        except RuntimeError as error:
            self._refuse(error)
            return None
        self._graphs[shape] = graph
        return graph

    def _refuse(self, error: RuntimeError) -> None:
        reason = " ".join(str(error).split())
        if self.required:
            rule = 'be "auto" or "off" for a model that can\'t run inside a CUDA graph'
            remedy = 'Pass cuda_graph="auto" to go on without graphs.'
            text = broken_rule("collect", "cuda_graph", rule, f'"on": <{reason}>', remedy)
            raise ValueError(text) from error
        self._refused = True
        self._graphs.clear()
        text = f"collect: the steps run one by one, since no CUDA graph could be made of this model: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
