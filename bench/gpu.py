"""The bench of a GPU: kernels, the host's time, a step, collect; `python -m bench gpu`."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from . import gpu_collect, gpu_host, gpu_kernel, gpu_step
from .clock import Clock, CpuClock, gpu_clock
from .collect import SCRATCH, file_system
from .measure import machine
from .report import Result

PARTS = {"host": gpu_host, "kernel": gpu_kernel, "step": gpu_step, "collect": gpu_collect}


def add_part(result: Result, name: str, clock: Clock, quick: bool) -> None:
    """Run one part; time on a GPU is rare, so after one that fails the others are measured all the same."""
    try:
        found = PARTS[name].run(clock, quick)
    except Exception as error:
        traceback.print_exc()
        result.failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
        return
    result.tables += found.tables
    result.claims += found.claims


def run(
    quick: bool = False,
    clock: Clock | None = None,
    rehearse: bool = False,
    part_done: Callable[[Result], object] = lambda result: None,
    only: str = "",
) -> Result:
    """Run all parts (or the one that is named) on the GPU, or rehearse them on the CPU.

    A part where a variant computes something else than the truth, or a step waits for the GPU, is a failure of the
    result; its figures are dropped. ``part_done`` gets the result after each part: a run that is stopped has it.

    Raises:
        NoGpu: where there is no GPU that the native code runs on.
    """
    done: list[str] = []
    clock = clock or (CpuClock() if rehearse else gpu_clock())
    parts = [only] if only else list(PARTS)
    result = Result(
        f"gpu_{only}" if only else "gpu", "; ".join(PARTS[name].PREDICTION for name in parts),
        {"stored": "float32 (kernel), bfloat16 (host, step, collect)", "timed_by": clock.how, "rounds": 7,
         "rounds_of_host": 9, "rounds_of_collect": 3, "disk": file_system(SCRATCH),
         "cache_bytes": clock.cache_bytes, "cold": f"gradients in turn that hold {gpu_kernel.COLD} times the cache",
         "quick": quick, "parts": done},
        machine={**machine(), **clock.facts()},
    )  # fmt: skip
    for name in parts:
        add_part(result, name, clock, quick)
        done.append(name)
        part_done(result)
    return result
