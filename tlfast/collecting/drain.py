"""From the ring to the host while the model computes: two slots, a side stream, and an event for every reuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ..dataset.format.layout import PAGE_BYTES, Column, payload_spans

N_SLOTS = 2  # one is being written while the other is filled
N_COUNTERS = 3  # of each column: non-finite values, saturated values, writes

Stream = Literal["compute", "side"]
Block = dict[str, torch.Tensor]
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

    It begins at a page, so that a unit is written from there as it is: see `dataset.streaming`.

    Args:
        columns: what a row of each column is.
        n_rows: the rows of the largest unit.
        device: where it lies.
        pinned: whether a CUDA device copies to it by itself.
    """

    def __init__(self, columns: Mapping[str, Column], n_rows: int, device: torch.device, pinned: bool = False):
        self._columns = columns
        n_bytes = n_rows * sum(column.row_bytes for column in columns.values())
        room = torch.empty(n_bytes + PAGE_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
        start = -room.data_ptr() % PAGE_BYTES
        self.memory = room[start : start + n_bytes]

    def block(self, n_rows: int) -> Block:
        """The columns of a unit of ``n_rows``, in their order in the memory."""
        spans = payload_spans(self._columns, n_rows)
        return {
            name: self.memory[start:stop].view(self._columns[name].dtype).view(n_rows, *self._columns[name].row_shape)
            for name, (start, stop) in spans.items()
        }

    def bytes_of(self, n_rows: int) -> torch.Tensor:
        """All that a unit of ``n_rows`` takes, as bytes."""
        return self.memory[: n_rows * sum(column.row_bytes for column in self._columns.values())]


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
    """

    def __init__(self, streams: Streams, columns: Mapping[str, Column], n_rows: int):
        self.streams = streams
        self._slots = [self._slot(columns, n_rows) for _ in range(N_SLOTS)]
        self._n_drained = 0

    def _slot(self, columns: Mapping[str, Column], n_rows: int) -> _Slot:
        def room(device: torch.device, pinned: bool) -> tuple[UnitMemory, torch.Tensor]:
            counters = torch.zeros(len(columns), N_COUNTERS, dtype=torch.int64, device=device, pin_memory=pinned)
            return UnitMemory(columns, n_rows, device, pinned), counters

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
    ) -> Arrived:
        """Queue all that brings one unit to the host; the rings may be overwritten by what is queued after this.

        Args:
            rings: of each column the rows of the unit, in any order.
            counters: of each column what was counted until now, int64 [N_COUNTERS], on any device.
            places: where the row of each example lies in the ring, int64 [examples], on the host.
            wait_for_room: waits until the unit before the last is written: its memory on the host is used again.

        Returns:
            A function for the thread that writes: it waits until the rows are there, and returns them with what was
            counted, int64 [columns, N_COUNTERS].
        """
        slot, n, streams = self._slots[self._n_drained % N_SLOTS], len(places), self.streams
        self._n_drained += 1

        def gather() -> None:
            there = {ring.device: places.to(ring.device, non_blocking=True) for ring in rings.values()}
            block = slot.device.block(n)
            for name, ring in rings.items():
                out = block[name]
                if out.device == ring.device:
                    torch.index_select(ring, 0, there[ring.device], out=out)
                else:
                    out.copy_(ring.index_select(0, there[ring.device]))
            for kept, counted in zip(slot.device_counters, counters, strict=True):
                kept.copy_(counted, non_blocking=streams.device is not None)

        def copy() -> None:
            slot.host.bytes_of(n).copy_(slot.device.bytes_of(n), non_blocking=True)
            slot.host_counters.copy_(slot.device_counters, non_blocking=True)

        if streams.device is None:
            wait_for_room()
            gather()
        else:
            places = places.pin_memory() if streams.device.type == "cuda" else places
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
            block = slot.host.block(n)
            return {name: block[name] for name in rings}, slot.host_counters

        return arrived
