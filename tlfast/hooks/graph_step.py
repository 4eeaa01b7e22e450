"""A step as a CUDA graph: recorded once, replayed over inputs of the same shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from ..errors import broken_rule
from .captured import Capture


class Graphs(Protocol):
    """How a device records work and repeats it."""

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run once, as the recording will: on a stream of its own."""
        ...

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what ``run`` launches, without doing it: (what does it, what ``run`` returned)."""
        ...


class CudaGraphs:
    """CUDA graphs of torch on one device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = _stream_of(device)

    def warm_up(self, run: Callable[[], Any]) -> None:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                run()
        finally:  # what comes next reads and writes the same rows, also where the step has failed
            here.wait_stream(self._stream)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        failed: BaseException | None = None
        here = torch.cuda.current_stream(self._device)
        try:
            # The outer context: where a recording breaks, torch leaves its stream the current one.
            # thread_local: another thread, such as one that writes a unit to disk, may wait for its own events.
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(here),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    out = run()
                except BaseException as error:
                    failed = error
                    raise
        except RuntimeError:
            if failed is not None:
                raise failed from None  # says more than that the recording can't be ended
            raise
        return graph.replay, out


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps memory for each, and torch's own is of the device it first saw."""
    return torch.cuda.Stream(device)


def graphs_for(device: torch.device) -> Graphs:
    """What records on this device; RuntimeError where nothing can."""
    if device.type != "cuda":
        remedy = "Call the step itself."
        raise RuntimeError(broken_rule("graph_step", "inputs[0]", "be on a CUDA device", device, remedy))
    return CudaGraphs(device)


class GraphStep:
    """A recorded step; call it with inputs to run it. Made by `graph_step`."""

    def __init__(self, cap: Capture, step: Callable[..., Any], inputs: tuple[torch.Tensor, ...], warmup: int):
        who = "graph_step"
        if cap.backend != "native":
            got = f"the {cap.backend} backend"
            raise RuntimeError(broken_rule(who, "cap", "run the native code", got, "See tlfast.backend()."))
        if cap.squeezes:  # a mask is read on the host, and a recording has none
            remedy = 'Keep padded rows: leave per= out, and reduce="none".'
            raise RuntimeError(broken_rule(who, "cap", "have rows of examples", "columns per token", remedy))
        if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
            types = [type(x).__name__ for x in inputs]
            raise TypeError(broken_rule(who, "inputs", "be one tensor or more", types, "Pass the tensors of a batch."))
        if type(warmup) is not int or warmup < 1:
            remedy = "The first run allocates what the others use."
            raise ValueError(broken_rule(who, "warmup", "be at least 1", repr(warmup), remedy))
        graphs = graphs_for(inputs[0].device)
        self._cap, self._ledger = cap, cap._ledger
        # Memory of the graph's own, which every replay reads again.
        self._inputs = tuple(x.detach().clone() for x in inputs)
        n_ids = len(cap._ids)
        try:
            for _ in range(warmup):
                self._ledger.start_trial()
                try:
                    graphs.warm_up(lambda: step(*self._inputs))
                finally:
                    self._ledger.stop_trial()
                    del cap._ids[n_ids:]
            self._ledger.start_recording(inputs[0].device)
            try:
                self._replay, out = graphs.record(lambda: step(*self._inputs))
            except BaseException:
                with suppress(RuntimeError):  # says that there is no backward; what went wrong says more
                    self._ledger.stop_recording()
                raise
            self._recording = self._ledger.stop_recording()
            # Without its history: that would keep the nodes of the parameters, whose stream is that of the recording.
            self._out = tree_map_only(torch.Tensor, torch.Tensor.detach, out)
        finally:
            del cap._ids[n_ids:]

    @property
    def n_rows(self) -> int:
        """The rows that one call writes at each point."""
        return int(self._recording.n_rows)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Copy the inputs in and run the step: its rows are committed. Returns what ``step`` returned then,
        without its history.

        Raises:
            ValueError: for inputs of other shapes or dtypes than were recorded.
            RuntimeError: where the capture has no room for the rows, or is closed. Nothing has run then.
        """
        if not self._cap._handles:
            raise RuntimeError(
                broken_rule("graph_step", "the capture", "be entered", "one that is left", "Replay inside the with.")
            )
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in self._inputs]:
            remedy = "Record a graph for each shape."
            raise ValueError(broken_rule("graph_step", "inputs", f"be {_kinds(self._inputs)}", _kinds(inputs), remedy))
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self._ledger.replay(self._recording)
        try:
            self._replay()
        except BaseException:
            self._ledger.take_back(self._recording)
            raise
        return self._out


def _kinds(tensors: tuple[torch.Tensor, ...]) -> str:
    return ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)


def graph_step(cap: Capture, step: Callable[..., Any], *inputs: torch.Tensor, warmup: int = 2) -> GraphStep:
    """Record one forward and backward inside a capture as a CUDA graph, and return what replays it.

    A replay launches the whole step at once, and no Python runs: ``step`` must do the same whatever the values are.
    Its kernels find their rows by a cursor on the device, which the last of them moves on. The rows are those of the
    step itself, to the bit where the kernels that the model launches are the same.

    Args:
        cap: an entered capture with the native backend. Rows and counts are left as they were.
        step: a function of the inputs that runs one backward. A mask is given in it, by ``cap.batch(mask=...)``, and is
            one of the inputs. Freeze the model, or its parameters' gradients add up over the replays.
        inputs: example tensors, on one CUDA device. In a call of the result they may be on the host; copies from pinned
            memory don't make it wait.
        warmup: how often the step is run before it is recorded; its rows are dropped.

    Returns:
        A function of inputs of the same shapes and dtypes. Inside ``cap.batch(ids=...)`` its rows get these ids.

    Raises:
        RuntimeError: where the step can't be recorded: no CUDA device, a step that waits for the device.
        TypeError, ValueError: for inputs that aren't tensors, and for ``warmup`` below 1.

    Example:
        >>> import torch, tlfast
        >>> def rows_of(model, batches):  # batches: int64 [B, P] of one shape, on the model's device
        ...     with tlfast.freeze(model), tlfast.capture(model, "0", rows=64) as cap:
        ...         step = tlfast.graph_step(cap, lambda tokens: model(tokens).sum().backward(), batches[0])
        ...         for batch in batches:
        ...             step(batch)
        ...     return cap["0"]
    """
    if not cap._handles:
        raise RuntimeError(
            broken_rule("graph_step", "cap", "be entered", "a capture outside its with", "Call it inside the with.")
        )
    return GraphStep(cap, step, inputs, warmup)
