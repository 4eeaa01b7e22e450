"""Ways to do one work, a step of each in turn: what a step costs, apart from what a way does before and after all."""

from __future__ import annotations

import ctypes
import gc
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from .measure import Measured, Times, no_collector

Way = Callable[[Any, Callable[[], None]], object]  # of a model, and of what is called where a step begins

QUIET = 3  # looks in a row at threads that do nothing, a millisecond apart: then they are done


@dataclass
class _Turn:
    """A way in a thread of its own, which stands still wherever a step begins until it is let on."""

    way: Way
    model: Any
    costs: list[tuple[float, float]] = field(default_factory=list)  # CPU and wall seconds from each stop to the next
    done: bool = False
    failed: BaseException | None = None

    def __post_init__(self) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        torch.set_num_threads(1)
        self._go.acquire()
        try:
            self.way(self.model, self._stop)
        except BaseException as error:  # raised again where the turns are taken
            self.failed = error
        self.done = True
        self._stopped.release()

    def _stop(self) -> None:
        self._stopped.release()
        self._go.acquire()

    def take(self) -> None:
        """Let the way on to its next step, or to its end, and until what it left in the background is done, too."""
        cpu, start = time.process_time(), time.perf_counter()
        self._go.release()
        self._stopped.acquire()
        stop, own = time.perf_counter(), time.thread_time()
        _wait_for_quiet()
        self.costs.append((time.process_time() - cpu - (time.thread_time() - own), stop - start))
        if self.failed is not None:
            raise self.failed


def keep_memory() -> None:
    """Let glibc give threads the memory of the main one, and keep what is freed, for the rest of the process.

    Else each has an arena of its own, whose pages go back to the system and are faulted in anew, more or less often by
    what a way happens to hold: that was a tenth of a step.
    """
    arenas, mmap_threshold, trim_threshold = -8, -3, -1  # M_ARENA_MAX and the others of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in ((arenas, 1), (mmap_threshold, 1 << 30), (trim_threshold, 1 << 30)):
        mallopt(option, value)


def _wait_for_quiet() -> None:
    """Return when no other thread of this process computes, or waits for a disk; at once where nothing tells."""
    if not os.path.isdir("/proc/self/task"):
        return
    quiet, here = 0, str(threading.get_native_id())
    while quiet < QUIET:
        time.sleep(0.001)
        busy = any(_is_busy(thread) for thread in os.listdir("/proc/self/task") if thread != here)
        quiet = 0 if busy else quiet + 1


def _is_busy(thread: str) -> bool:
    try:
        with open(f"/proc/self/task/{thread}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] in "RD"
    except OSError:  # it has ended
        return False


@contextmanager
def silent() -> Iterator[None]:
    """Without what rivals print, log and draw: around all of them, since it holds for the whole process."""
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def take_turns(model: Any, ways: Mapping[str, Way], n_steps: int, together: int = 1) -> Measured:
    """Run all ways, a step of each in turn, every way with a copy of the model; seconds for each step.

    A step begins with a forward of the model, or where a way says so. One sample is the mean of so many steps
    ``together``: those that make one unit on a disk. The first ones warm up, and are left out. So is the last step of
    all, in which a way ends: ``n_steps`` is a multiple of ``together``, and one more.

    Returns:
        By way its Times: "cpu" and "total" of steps; one sample each of "set_up", CPU time before the first step, and
        of "close", that of the last step and of the end.
    """
    turns: dict[str, _Turn] = {}
    for name, way in ways.items():
        turns[name] = _Turn(way, deepcopy(model))
        turns[name].model.register_forward_pre_hook(lambda *_, turn=turns[name]: turn._stop())
    names, number = list(turns), 0
    with no_collector(), silent():
        while not all(turn.done for turn in turns.values()):
            if number % together == 0:
                gc.collect()
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if not turns[name].done:
                    turns[name].take()
            number += 1
    return {name: _sections(name, turn.costs, n_steps, together) for name, turn in turns.items()}


def _sections(name: str, costs: list[tuple[float, float]], n_steps: int, together: int) -> dict[str, Times]:
    n_before = len(costs) - n_steps  # a way may call the model to look at it
    if n_before < 1:
        raise RuntimeError(f"bench: {name} must take {n_steps} steps, got {len(costs) - 1}")
    steps = costs[n_before:]
    sections = {"set_up": Times([sum(cpu for cpu, _ in costs[:n_before])]), "close": Times([steps[-1][0]])}
    for k, section in enumerate(("cpu", "total")):
        of_steps = [cost[k] for cost in steps]
        starts = range(together, n_steps - together, together)
        sections[section] = Times([sum(of_steps[start : start + together]) / together for start in starts])
    return sections
