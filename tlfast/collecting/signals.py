"""Signals that end a collection: SIGTERM and the first Ctrl-C between two batches, the second Ctrl-C at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(SystemExit):
    """SIGTERM came, and the collection has stopped: what it finished is kept. Uncaught it is exit code 143."""

    CODE = 128 + signal.SIGTERM  # as shells say it

    def __init__(self, text: str = "") -> None:
        super().__init__(self.CODE)
        self.text = text

    def __str__(self) -> str:
        return self.text


class LeaveAtOnce(KeyboardInterrupt):
    """Ctrl-C came a second time: nothing is waited for any more, not even for units that are being written."""


@contextmanager
def stopping() -> Iterator[Callable[[], None]]:
    """Hold back SIGTERM and Ctrl-C; what this yields is called between batches, and raises if one came.

    A program's own way to take a signal, or to ignore it, is left as it is; so are all of them outside the main
    thread, where Python takes none.

    Example:
        >>> from tlfast.collecting.signals import stopping
        >>> with stopping() as stop_if_asked:
        ...     stop_if_asked()
    """
    came: list[int] = []

    def take(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in came:
            raise LeaveAtOnce
        came.append(number)

    def stop_if_asked() -> None:
        if came:
            raise KeyboardInterrupt if signal.SIGINT in came else Terminated

    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    in_main = threading.current_thread() is threading.main_thread()
    taken = [number for number, usually in usual.items() if in_main and signal.getsignal(number) == usually]
    try:
        for number in taken:
            signal.signal(number, take)
        yield stop_if_asked
    finally:
        for number in taken:
            signal.signal(number, usual[number])
