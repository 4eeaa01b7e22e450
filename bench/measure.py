"""Interleaved timing, value checks and the name of the machine: what every bench shares."""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tlfast

ROOT = Path(__file__).resolve().parents[1]
CHANGED = "+changes"  # after a commit from which the code differs
CODE = (".", ":!bench/results", ":!*.md")  # a result, or a page that quotes it, changes no figure

Sections = dict[str, float]  # what one sample returns: section ("total", "cpu", "backward", ...) -> seconds a call


class WrongResult(AssertionError):
    """A variant computed something else than the truth; nothing of it is timed."""


@dataclass
class Times:
    """The samples of one variant in one section, one a round, in seconds a call."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        """The fastest round."""
        return min(self.samples)

    def above(self, floor: Times) -> float:
        """How much is paid above the floor: the median of the differences within each round."""
        return statistics.median(a - b for a, b in zip(self.samples, floor.samples, strict=True))

    def ratio(self, other: Times) -> float:
        """How many times another variant's time: the median of the ratios within each round."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


Measured = dict[str, dict[str, Times]]  # variant -> section -> times


def interleave(samplers: Mapping[str, Callable[[], Sections]], rounds: int) -> Measured:
    """Take one sample of every variant in every round; each round starts with another variant.

    So a change of the machine's speed meets all variants alike, and none of them always runs after the same one.
    """
    names = list(samplers)
    measured: Measured = {name: {} for name in names}
    for number in range(rounds):
        first = number % len(names)
        gc.collect()
        for name in names[first:] + names[:first]:
            for section, seconds in samplers[name]().items():
                measured[name].setdefault(section, Times()).samples.append(seconds)
    return measured


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's garbage collector out of a timed stretch, as timeit does; it runs before each round."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def repeat(call: Callable[[], object], n_calls: int) -> Sections:
    """Time n_calls calls: wall and CPU seconds for each."""
    with no_collector():
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(n_calls):
            call()
        stop, cpu_stop = time.perf_counter(), time.process_time()
    return {"total": (stop - start) / n_calls, "cpu": (cpu_stop - cpu) / n_calls}


def timed(way: Callable[[Any], object], work: Any) -> Callable[[], Sections]:
    """What times one call of a way to do some work."""
    return lambda: repeat(lambda: way(work), 1)


def calls_for(call: Callable[[], object], seconds: float) -> int:
    """How many calls fill about so many seconds."""
    n_calls = 1
    while True:
        taken = repeat(call, n_calls)["total"] * n_calls
        if taken > seconds / 4:
            return max(1, round(n_calls * seconds / taken))
        n_calls *= 4


def check_close(what: str, got: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    """Raise WrongResult unless ``|got - truth| <= bound`` everywhere; NaN is never within a bound."""
    if got.shape != truth.shape:
        raise WrongResult(f"{what}: shape must be {list(truth.shape)}, got {list(got.shape)}")
    error = (got.double() - truth).abs()
    if not bool((error <= bound).all()):
        raise WrongResult(f"{what}: values must be within the computed bound, got an error of {float(error.max()):.3g}")


def check_equal(what: str, got: torch.Tensor | None, truth: torch.Tensor | None) -> None:
    """Raise WrongResult unless two gradients are the same to the bit."""
    if got is None or truth is None or not torch.equal(got, truth):
        raise WrongResult(f"{what}: the model's own gradients must be those of the bare model, to the bit")


def reduction_bound(
    grad: torch.Tensor, dim: int, reduce: str, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 sum or mean of a gradient, and how far a float32 accumulation cast to ``stored`` may be from it."""
    wide, n = grad.double(), grad.shape[dim] if reduce == "mean" else 1
    truth = wide.sum(dim) / n
    rounding = grad.shape[dim] * torch.finfo(torch.float32).eps * wide.abs().sum(dim) / n
    return truth, torch.finfo(stored).eps * truth.abs() + rounding


def cpu_model() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """The name of a processor as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str | None:
    """The commit of this checkout, with CHANGED behind it where tracked code is another; None without git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return head if head is None or changed == "" else head + CHANGED


def machine() -> dict[str, object]:
    """What the figures hold for: processor, versions, commit, threads, and how busy the machine was."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tlfast": tlfast.__version__,
        "commit": commit(),
        "backend": tlfast.backend(),
        "load": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
    }
