"""A CUDA device as tests use it, and the CPU in its place: the same bodies of tests run on both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import tlfast

CYCLES = 20_000_000  # for which a stream is kept busy: about 10 ms, far longer than the host needs to queue a step


@contextmanager
def no_wait_of_the_host() -> Iterator[None]:
    """An error for every operation that makes the host wait for the GPU, as far as torch knows of it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode itself warns that it doesn't see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device with the same strides and the same place in its memory, gaps and overlaps included."""
    n = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.as_strided(tensor.detach(), (n,), (1,), 0).to(device, copy=True)
    return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


@dataclass(frozen=True)
class Gpu:
    """A device on which the native code runs: a GPU, or the CPU (under `make simt` with the GPU's kernels)."""

    device: torch.device

    @property
    def real(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def kernels_of_a_gpu(self) -> bool:
        """Whether the kernels are those of csrc/kernel/capture_cuda.cuh."""
        from tlfast import _build_info

        return self.real or _build_info.SIMT

    def busy(self) -> None:
        """Keep the current stream busy: what is read too early or on another stream is then read before it is there."""
        if self.real:
            torch.cuda._sleep(CYCLES)

    def side_stream(self) -> Any:
        """A stream that isn't the default one, as the current one."""
        return torch.cuda.stream(torch.cuda.Stream(self.device)) if self.real else nullcontext()

    def no_wait(self) -> Any:
        """An error for what makes the host wait."""
        return no_wait_of_the_host() if self.real else nullcontext()

    def finish(self) -> None:
        """Wait for the device."""
        if self.real:
            torch.cuda.synchronize(self.device)

    def n_allocations(self, run: Callable[[], object]) -> int:
        """How often memory was asked for while ``run`` ran, of torch or by it of the driver."""
        if self.real:
            before = self._asked()
            run()
            return self._asked() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            run()
        events = profiled.profiler.kineto_results.events()
        return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)

    def _asked(self) -> int:
        stats = torch.cuda.memory_stats(self.device)
        return int(stats["allocation.all.allocated"]) + int(stats.get("num_device_alloc", 0))

    def graph_step(self, cap: Any, step: Callable[..., Any], *inputs: torch.Tensor) -> Callable[..., Any]:
        """`tlfast.graph_step`; on the CPU the step itself, so that the rest of the test runs."""
        return tlfast.graph_step(cap, step, *inputs) if self.real else step
