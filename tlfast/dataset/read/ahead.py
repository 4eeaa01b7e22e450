"""Reading ahead: what comes next is read by threads, while what was read is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 2  # parts that are being read: the disk has one to go on with when the other ends; one more is given out

Part = TypeVar("Part")
Read = TypeVar("Read")


def read_ahead(parts: Iterable[Part], read: Callable[[Part], Read]) -> Iterator[Read]:
    """Yield what ``read`` returns of each part, in order; the next ``AHEAD`` are being read meanwhile."""
    threads = ThreadPoolExecutor(AHEAD, "tlfast-blocks")
    ahead: deque[Future[Read]] = deque()
    try:
        for part in parts:
            ahead.append(threads.submit(read, part))
            if len(ahead) > AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
