"""How far a command is: a bar in a terminal, else a plain line every 30 seconds, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..dataset.errors import extra

_LINE_EVERY_S = 30.0


@contextmanager
def bar(command: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Give a function that is called with how many more ``unit`` (rows, bytes) are done; of ``total``, or who knows."""
    if sys.stderr.isatty():
        tqdm = extra("tqdm", f"tlfast {command}").tqdm
        with tqdm(total=total, unit=unit, unit_scale=True, dynamic_ncols=True) as shown:
            yield shown.update
        return
    start = last = time.monotonic()
    done = 0

    def line(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last > _LINE_EVERY_S:
            last = now
            said = f"{done} {unit}"
            if total is not None:
                said = f"{done}/{total} {unit}, {(total - done) * (now - start) / max(done, 1):.0f} s left"
            print(f"{command}: {said}", file=sys.stderr, flush=True)

    yield line
