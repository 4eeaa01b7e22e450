"""Two streams without a device: what is queued is done later, in any order that the events allow."""

from __future__ import annotations

import threading
from collections import deque

import torch


class FakeEvent:
    """An event of a `FakeStreams`."""

    def __init__(self):
        self.done = False

    def happen(self):
        self.done = True


class FakeStreams:
    """`tlfast.collecting.drain.Streams` whose queues go on when they are told to, by ``random``.

    The head of each queue may be done at any time once the event that it waits for has happened. Work is done then
    and not when it is queued: memory that was used again too early has other values by that time.

    Args:
        random: a `random.Random`, which hypothesis may drive.
        ignored: one of the waits, as (stream or "host"), that is left out: for tests of the tests.
        lagging: the queues that are done later; the others are done at once.
    """

    device = torch.device("cpu")

    def __init__(self, random, ignored=None, lagging=("compute", "side")):
        self.random, self.ignored, self.lagging = random, ignored, lagging
        self.queues = {"compute": deque(), "side": deque()}
        self.weights = {name: random.choice((1, 20)) for name in self.queues}
        self._lock = threading.RLock()  # the thread that writes may be another one

    def run(self, stream, work):
        self._queue(stream, None, work)

    def record(self, stream):
        event = FakeEvent()
        self._queue(stream, None, event.happen)
        return event

    def wait(self, stream, event):
        if event is not None and self.ignored != stream:
            self._queue(stream, event, lambda: None)

    def host_wait(self, event):
        while self.ignored != "host" and not event.done:
            # The other thread may have done the last of it since.
            assert self.advance() or event.done, "nothing is left to do, and the event has not happened"

    def _queue(self, stream, event, work):
        with self._lock:
            self.queues[stream].append((event, work))
            while stream not in self.lagging and self.queues[stream]:
                self.advance()

    def ready(self):
        """The queues that could go on."""
        return [name for name, queue in self.queues.items() if queue and (queue[0][0] is None or queue[0][0].done)]

    def advance(self):
        """Do the head of some queue; False where there is nothing to do."""
        with self._lock:
            ready = self.ready()
            if not ready:
                return False
            chosen = self.random.choice([name for name in ready for _ in range(self.weights[name])])
            self.queues[chosen].popleft()[1]()
            return True
