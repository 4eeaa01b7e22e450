"""The same bits in every run: algorithms that have one order of sums, and the threads that a dataset was begun with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from ..errors import broken_rule

Deterministic = Literal["strict", "warn"]

# One of the two values with which cuBLAS sums in one order (its manual, "Results reproducibility").
_CUBLAS, _WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_MOST_THREADS = 4096  # more than any machine has: a number that was not written by us


def prepare_cuda() -> None:
    """Ask cuBLAS for one order of sums, unless the user has asked for something; it listens until it is first used."""
    os.environ.setdefault(_CUBLAS, _WORKSPACE)


@contextmanager
def deterministic(mode: Deterministic, devices: set[torch.device]) -> Iterator[None]:
    """Let torch use deterministic algorithms alone; with "warn" it warns where it has none, with "strict" it raises.

    All is as before afterwards, but for an environment variable that CUDA is asked by.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags: Any = torch.utils.deterministic  # a module with a property, which type checkers don't see
    filling, benchmark = flags.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
        # It helps to find reads of memory that nobody wrote, and costs a pass over every new tensor.
        flags.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False  # it picks algorithms by their speed of the day
        late = next((device for device in devices if device.type == "cuda" and not _multiplies(device)), None)
        if late is not None and mode == "strict":
            rule, got = "be set before CUDA multiplies for the first time", f"a model on {late} that was used already"
            remedy = f"{_CUBLAS}={_WORKSPACE} in the environment; without, a resumed run may differ in last bits."
            warnings.warn(broken_rule("collect", _CUBLAS, rule, got, remedy), RuntimeWarning, stacklevel=5)
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        flags.fill_uninitialized_memory = filling
        torch.backends.cudnn.benchmark = benchmark


def _multiplies(device: torch.device) -> bool:
    """Whether a matrix product is allowed on a device: cuBLAS may have been started before it could be asked."""
    prepare_cuda()
    try:
        torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)
    except RuntimeError as error:
        if _CUBLAS not in str(error):
            raise
        return False
    return True


def describe_machine(model: nn.Module) -> dict[str, Any]:
    """What the last bits of the rows depend on beside the data: the kind of device, and the threads of the CPU."""
    devices = {p.device for p in model.parameters() if not p.is_meta}  # meta: kept elsewhere till it is used
    kinds = {_kind(device) for device in devices or {torch.device("cpu")}}
    return {"device": ", ".join(sorted(kinds)), "threads": torch.get_num_threads()}


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.backends.cpu.get_cpu_capability().lower()})" if device.type == "cpu" else device.type


@contextmanager
def as_begun(about: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[None]:
    """Compute with the number of threads that ``about`` records; warn where it was another kind of device."""
    kind, threads, before = about.get("device"), about.get("threads"), torch.get_num_threads()
    if isinstance(kind, str) and kind != here["device"]:
        rule = f"be of the kind that began this dataset, {kind}, for the same last bits"
        remedy = "The rows made here are as right, but rounded in another way."
        warnings.warn(broken_rule("collect", "device", rule, here["device"], remedy), RuntimeWarning, stacklevel=6)
    try:
        # The sums of a matrix product on the CPU are split over the threads.
        if type(threads) is int and 1 <= threads <= _MOST_THREADS and "cpu" in here["device"]:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)
