"""From the ring to the host while the model computes: two slots, a side stream, and an event for every reuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Protocol

import torch

from ..dataset.format.layout import PAGE_BYTES, Column, fields_of, payload_spans
from ..errors import broken_rule
from .pack import Block, Pack, Tokens

N_SLOTS = 2  # one is being written while the other is filled
N_COUNTERS = 3  # of each column: non-finite values, saturated values, writes

Stream = Literal["compute", "side"]
Arrived = Callable[[], tuple[Block, torch.Tensor]]
"""Waits for the rows of a unit, and returns them with its counters."""


class Streams(Protocol):
    """Two queues of work on a device, and events between them; what a queue holds is done in order, and later.

    ``device`` is where rows lie on their way from the ring to the host; None: they go there directly.
    """

    device: torch.device | None

    def run(self, stream: Stream, work: Callable[[], Any]) -> None:
        """Queue work that was enqueued by calling ``work``."""
        ...

    def record(self, stream: Stream) -> Any:
        """An event that happens when all that the stream holds by now is done."""
        ...

    def wait(self, stream: Stream, event: Any) -> None:
        """Let what is queued from now on wait for an event, on the device; None has happened already."""
        ...

    def host_wait(self, event: Any) -> None:
        """Wait for an event in the calling thread."""
        ...


class DirectStreams:
    """Everything happens at once: the CPU, and devices without streams that we know."""

    device: torch.device | None = None

    def run(self, stream: Stream, work: Callable[[], Any]) -> None:
        work()

    def record(self, stream: Stream) -> None:
        return None

    def wait(self, stream: Stream, event: None) -> None:
        pass

    def host_wait(self, event: None) -> None:
        pass


class CudaStreams:
    """One CUDA device: the stream that is current when the work is queued, and a side stream for copies to the host."""

    def __init__(self, device: torch.device):
        self.device: torch.device | None = device
        self._side = torch.cuda.Stream(device)

    def run(self, stream: Stream, work: Callable[[], Any]) -> None:
        with torch.cuda.stream(self._stream(stream)):
            work()

    def record(self, stream: Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # blocking: the thread that waits sleeps instead of polling
        event.record(self._stream(stream))
        return event

    def wait(self, stream: Stream, event: torch.cuda.Event | None) -> None:
        if event is not None:
            self._stream(stream).wait_event(event)

    def host_wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def _stream(self, stream: Stream) -> torch.cuda.Stream:
        return self._side if stream == "side" else torch.cuda.current_stream(self.device)


def streams_for(devices: set[torch.device]) -> Streams:
    """What drains rings on these devices; a model spread over several is drained by plain, blocking copies."""
    device = next(iter(devices))
    return CudaStreams(device) if len(devices) == 1 and device.type == "cuda" else DirectStreams()


class UnitMemory:
    """Room for the rows of one unit in one piece of memory, laid out as the payload of its file.

    It begins at a page, so that a unit is written from there as it is: see `dataset.write.payload`.

    Args:
        columns: what a row of each column is.
        n_rows: the examples of the largest unit.
        device: where it lies.
        pinned: whether a CUDA device copies to it by itself.
        n_tokens: the tokens of the largest unit, where columns have a row for each.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        n_rows: int,
        device: torch.device,
        pinned: bool = False,
        n_tokens: int = 0,
    ):
        self._columns, self._fields = columns, fields_of(columns)
        n_bytes = self._n_bytes(n_rows, n_tokens)
        room = torch.empty(n_bytes + PAGE_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
        start = -room.data_ptr() % PAGE_BYTES
        self.memory = room[start : start + n_bytes]

    def _n_bytes(self, n_rows: int, n_tokens: int) -> int:
        return max(stop for _, stop in payload_spans(self._columns, n_rows, n_tokens).values())

    def block(self, n_rows: int, n_tokens: int = 0) -> Block:
        """The fields of a unit of ``n_rows`` examples and ``n_tokens`` tokens, in their order in the memory."""
        block = {}
        for name, (start, stop) in payload_spans(self._columns, n_rows, n_tokens).items():
            field = self._fields[name]
            n = n_tokens if field.per == "token" else n_rows
            block[name] = self.memory[start:stop].view(field.dtype).view(n, *field.row_shape)
        return block

    def bytes_of(self, n_rows: int, n_tokens: int = 0) -> torch.Tensor:
        """All that a unit of so many examples and tokens takes, as bytes."""
        return self.memory[: self._n_bytes(n_rows, n_tokens)]


@dataclass
class _Slot:
    """Room for one unit, on the host and, where rows make a stop there, on the device; the counters beside it."""

    host: UnitMemory
    host_counters: torch.Tensor  # int64 [columns, N_COUNTERS]
    device: UnitMemory
    device_counters: torch.Tensor
    copied: Any = None  # the event after which the device's memory may be filled again, and the host's be read


class Drain:
    """Brings the rows of one unit after the other to the host, in the order of their examples.

    The memory is allocated here, once. The thread that computes waits for nothing but room on the host.

    Args:
        streams: how the device that holds the rings is driven.
        columns: what the rings hold.
        n_rows: the examples of the largest unit.
        n_tokens: the tokens of the largest unit, where columns have a row for each.
        native: see Pack.
    """

    def __init__(
        self,
        streams: Streams,
        columns: Mapping[str, Column],
        n_rows: int,
        n_tokens: int = 0,
        native: ModuleType | None = None,
    ):
        self.streams = streams
        self.pack = Pack(columns, native)
        self._n_tokens = n_tokens
        self._slots = [self._slot(columns, n_rows) for _ in range(N_SLOTS)]
        self._n_drained = 0

    def _slot(self, columns: Mapping[str, Column], n_rows: int) -> _Slot:
        def room(device: torch.device, pinned: bool) -> tuple[UnitMemory, torch.Tensor]:
            counters = torch.zeros(len(columns), N_COUNTERS, dtype=torch.int64, device=device, pin_memory=pinned)
            return UnitMemory(columns, n_rows, device, pinned, self._n_tokens), counters

        device = self.streams.device
        # A copy into memory that isn't pinned would make the device wait for the host, however it is asked for.
        host = room(torch.device("cpu"), device is not None and device.type == "cuda")
        return _Slot(*host, *(host if device is None else room(device, False)))

    def drain(
        self,
        rings: Mapping[str, torch.Tensor],
        counters: Sequence[torch.Tensor],
        places: torch.Tensor,
        wait_for_room: Callable[[], object],
        tokens: Tokens | None = None,
        first_example: int | None = None,
    ) -> Arrived:
        """Queue all that brings one unit to the host; the rings may be overwritten by what is queued after this.

        Args:
            rings: of each column the rows of the unit, in any order; see Pack.
            counters: of each column what was counted until now, int64 [N_COUNTERS], on any device.
            places: where the row of each example lies in the ring, int64 [examples], on the host.
            wait_for_room: waits until the unit before the last is written: its memory on the host is used again.
            tokens: which positions of each example are real, for columns with a row for each token.
            first_example: the number of the unit's first example, for columns that are rounded by it.

        Returns:
            A function for the thread that writes: it waits until the rows are there, and returns them by field with
            what was counted, int64 [columns, N_COUNTERS].
        """
        size = (len(places), tokens.total if tokens else 0)
        if size[1] > self._n_tokens:
            rule, remedy = f"have at most {self._n_tokens} tokens", "Make the Drain for the largest unit."
            raise ValueError(broken_rule("Drain", "a unit", rule, size[1], remedy))
        slot, streams = self._slots[self._n_drained % N_SLOTS], self.streams
        chosen = self.pack.choose(rings, places, tokens, streams.device is not None and streams.device.type == "cuda")
        roundings = self.pack.roundings(first_example, len(places), tokens)
        self._n_drained += 1

        def gather() -> None:
            self.pack.put(rings, chosen, slot.device.block(*size), roundings)
            for kept, counted in zip(slot.device_counters, counters, strict=True):
                kept.copy_(counted, non_blocking=streams.device is not None)

        def copy() -> None:
            slot.host.bytes_of(*size).copy_(slot.device.bytes_of(*size), non_blocking=True)
            slot.host_counters.copy_(slot.device_counters, non_blocking=True)

        if streams.device is None:
            wait_for_room()
            gather()
        else:
            streams.wait("compute", slot.copied)
            streams.run("compute", gather)
            gathered = streams.record("compute")
            wait_for_room()
            streams.wait("side", gathered)
            streams.run("side", copy)
            slot.copied = streams.record("side")
        copied = slot.copied

        def arrived() -> tuple[Block, torch.Tensor]:
            streams.host_wait(copied)
            block = slot.host.block(*size)
            return {
                field: block[field] for name in rings for field in self.pack.columns[name].fields(name)
            }, slot.host_counters

        return arrived
