"""The same steps beside a busy Python thread: who waits for the GIL inside backward."""

from __future__ import annotations

import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .measure import Measured, Sections, interleave
from .report import Cell, Table
from .rivals import BARE, Attach
from .training import Job, check_variants, sampler

SWITCH_INTERVAL = 1e-4  # seconds; why: see busy_thread
BUSY = " beside a busy thread"


@contextmanager
def busy_thread() -> Iterator[threading.Event]:
    """A Python thread that never gives up the GIL by itself; it runs while the event is set.

    Who wants the GIL back waits for one switch interval, if the busy thread has woken up meanwhile. PyTorch gives the
    GIL up in every operator that Python calls, and for the whole of backward. The interval is 0.1 ms here, a fiftieth
    of Python's default: that favours those who wait often, and keeps the one wait that every backward has at its end,
    with hooks or without, small beside the backward itself.
    """
    running, ended = threading.Event(), threading.Event()

    def spin() -> None:
        while not ended.is_set():
            running.wait()
            for _ in range(200):
                pass

    thread = threading.Thread(target=spin, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    thread.start()
    try:
        yield running
    finally:
        ended.set()
        running.set()
        thread.join()
        sys.setswitchinterval(interval)


def measure(job: Job, variants: dict[str, Attach], n_steps: int, rounds: int) -> Measured:
    """Check, then time every variant alone and beside the busy thread, in the same rounds."""
    check_variants(job, variants)
    with busy_thread() as running:

        def beside(sample: Callable[[], Sections]) -> Sections:
            try:
                return sample()
            finally:
                running.clear()

        samplers: dict[str, Callable[[], Sections]] = {}
        for name, attach in variants.items():
            samplers[name] = sampler(job, attach, n_steps)
            busy = sampler(job, attach, n_steps, running.set)
            samplers[name + BUSY] = lambda busy=busy: beside(busy)  # type: ignore[misc]
        return interleave(samplers, rounds)


def backward_ratio(measured: Measured, name: str) -> float:
    """How many times longer a variant's backward takes beside the busy thread, but for the bare model's own wait.

    Every backward has to get the GIL back when it has ended; what the bare model loses by that is taken off.
    """
    alone, busy = measured[name]["backward"], measured[name + BUSY]["backward"]
    bare_alone, bare_busy = measured[BARE]["backward"], measured[BARE + BUSY]["backward"]
    rounds = zip(alone.samples, busy.samples, bare_alone.samples, bare_busy.samples, strict=True)
    return statistics.median((b - (bb - ba)) / a for a, b, ba, bb in rounds)


def cost_ratio(measured: Measured, name: str, other: str) -> float:
    """What a variant adds to the bare model's backward over what another one adds, both beside the busy thread."""
    bare = measured[BARE + BUSY]["backward"]
    return measured[name + BUSY]["backward"].above(bare) / measured[other + BUSY]["backward"].above(bare)


def table(title: str, measured: Measured, n_points: int) -> Table:
    """Forward and backward of every variant, alone and beside the busy thread."""
    rows: list[dict[str, Cell]] = []
    for name in (name for name in measured if not name.endswith(BUSY)):
        row: dict[str, Cell] = {"variant": name}
        for section in ("forward", "backward"):
            alone, busy = measured[name][section], measured[name + BUSY][section]
            row[section], row[f"{section}_busy"] = alone.median * 1e6, busy.median * 1e6
            row[f"{section}_busy_above_floor"] = busy.above(measured[BARE + BUSY][section]) * 1e6 / n_points
        row["ratio"] = measured[name + BUSY]["backward"].ratio(measured[name]["backward"])
        row["ratio_less_bare_wait"] = backward_ratio(measured, name)
        row["waits"], row["waits_busy"] = (measured[n]["waits"].median for n in (name, name + BUSY))
        rows.append(row)
    columns = ["forward", "forward_busy", "backward", "backward_busy", "ratio", "ratio_less_bare_wait", "waits"]
    return Table(
        f"{title}: us a step; us a point above the floor", BARE,
        ["variant", *columns, "waits_busy", "backward_busy_above_floor"], rows,
        "ratios and waits are those of backward; every forward is Python and shares the GIL, the bare one too; every "
        "backward waits for the GIL once it has ended, the bare one too",
    )  # fmt: skip
