"""What the host asks of a GPU's streams, as notes: which order would be kept where work is done later."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch


def launches_before(notes: list[str]) -> dict[int, list[set[int]]]:
    """For each launch, by stream: the launches that are done when it begins; last those that a reader there finds done.

    Notes are ``launch STREAM``, ``record STREAM EVENT`` and ``wait STREAM EVENT``; others mean nothing here. Launches
    are numbered over all streams.
    """
    done: dict[int, set[int]] = defaultdict(set)
    at_event: dict[int, set[int]] = {}
    before: dict[int, list[set[int]]] = defaultdict(list)
    n_launches = 0
    for what, stream, *event in (note.split() for note in notes):
        queue = done[int(stream)]
        if what == "launch":
            before[int(stream)].append(set(queue))
            queue.add(n_launches)
            n_launches += 1
        elif what == "record":
            at_event[int(event[0])] = set(queue)
        elif what == "wait":
            queue |= at_event.get(int(event[0]), set())
    for stream in {*done, 0}:
        before[stream].append(set(done[stream]))
    return before


class FakeEvent:
    """A number."""

    def __init__(self, number: int):
        self.number = number


class FakeStream:
    """A number, and notes of what is asked of it; what `torch.cuda.Stream` is to the Python backend."""

    def __init__(self, notes: FakeStreams, number: int, device: torch.device):
        self.notes, self.number, self.device = notes, number, device

    def record_event(self) -> FakeEvent:
        self.notes.n_events += 1
        self.notes.note(f"record {self.number} {self.notes.n_events}")
        return FakeEvent(self.notes.n_events)

    def wait_event(self, event: FakeEvent) -> None:
        self.notes.note(f"wait {self.number} {event.number}")


class FakeStreams:
    """Streams of the Python backend: one current stream, and the notes since `start_notes`."""

    def __init__(self) -> None:
        self.streams: dict[int, FakeStream] = {}
        self.current = 0
        self.n_events = 0
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.streams.setdefault(self.current, FakeStream(self, self.current, device))

    def read_on(self, stream: FakeStream, tensor: torch.Tensor) -> None:
        self.note(f"read {stream.number}")

    def launching(self, function: Any) -> Any:
        """``function`` with a note of a launch before it."""

        def noted(*args: Any) -> Any:
            self.note(f"launch {self.current}")
            return function(*args)

        return noted

    # What torch.ops.tlfast_simt has for the native backend.

    def set_stream(self, number: int) -> int:
        before, self.current = self.current, number
        return before

    def start_notes(self) -> None:
        self.notes.clear()

    def take_notes(self) -> list[str]:
        return list(self.notes)
