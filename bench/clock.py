"""How work on a device is timed and repeated: CUDA events and graphs on a GPU; the same code rehearsed on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

import tlfast
import tlfast.backends.choice
import tlfast.backends.cuda_status

from .measure import Sections, no_collector, repeat

MOST_CALLS = 200  # in one graph: enough to hide the replay's own launch, few enough for small graphs
Step = Callable[[torch.Tensor], object]


class NoGpu(RuntimeError):
    """There is no GPU to measure, or the native code can't run on it."""


class Clock(Protocol):
    """What a bench of the GPU asks of the device that it runs on."""

    device: torch.device
    how: str  # in words, for the settings of the result
    cache_bytes: int  # the last cache before the memory

    def finish(self) -> None:
        """Wait until the device has done what was queued."""
        ...

    def nothing(self) -> None:
        """Launch a kernel that does nothing."""
        ...

    def sampler(self, call: Callable[[], object], seconds: float) -> Callable[[], Sections]:
        """What times ``call``: device seconds a call (total) and seconds of the thread that queues it (host)."""
        ...

    def graph_step(self, cap: Any, step: Step, tokens: torch.Tensor) -> Step:
        """`tlfast.graph_step`, or what stands for it."""
        ...

    def graphed(self, step: Step, tokens: torch.Tensor) -> Step:
        """A step without a capture as a graph."""
        ...

    def waits(self, run: Callable[[], object]) -> list[str]:
        """The names of all calls of the CUDA runtime and all copies while ``run`` runs."""
        ...

    def facts(self) -> dict[str, object]:
        """The machine, as far as only the device knows it."""
        ...


class CudaClock:
    """One CUDA device: kernels are timed between events around replays of a graph that holds many calls."""

    how = "CUDA events around graph replays; steps by the wall clock, the GPU idle before and after"

    def __init__(self, device: torch.device):
        self.device = device
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def nothing(self) -> None:
        torch.cuda._sleep(0)  # a kernel of torch that spins for so many cycles: the one nearest to an empty one

    def sampler(self, call: Callable[[], object], seconds: float) -> Callable[[], Sections]:
        one = self._recorded(call, 1)
        n_calls = max(1, min(MOST_CALLS, round(seconds / max(self._replay_time(one, 1), 1e-9))))
        replay = self._recorded(call, n_calls)

        def sample() -> Sections:
            replay()  # the first replay after other work uploads the graph
            device = self._replay_time(replay, n_calls)
            self.finish()
            with no_collector():
                start = time.perf_counter()
                for _ in range(min(n_calls, 50)):  # far fewer than a stream holds before the host must wait
                    call()
                host = (time.perf_counter() - start) / min(n_calls, 50)
            self.finish()
            return {"total": device, "host": host}

        return sample

    def _recorded(self, call: Callable[[], object], n_calls: int) -> Callable[[], None]:
        here, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            call()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(n_calls):
                call()
        return graph.replay

    def _replay_time(self, replay: Callable[[], None], n_calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / n_calls

    def graph_step(self, cap: Any, step: Step, tokens: torch.Tensor) -> Step:
        from tlfast.hooks.graph_step import graph_step

        return graph_step(cap, step, tokens)

    def graphed(self, step: Step, tokens: torch.Tensor) -> Step:
        static = tokens.clone()
        replay = self._recorded(lambda: step(static), 1)

        def run(given: torch.Tensor) -> None:
            static.copy_(given, non_blocking=True)
            replay()

        return run

    def waits(self, run: Callable[[], object]) -> list[str]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
            run()
        return [event.name for event in profiled.events()]

    def facts(self) -> dict[str, object]:
        native = tlfast.backends.choice.loaded()
        properties = torch.cuda.get_device_properties(self.device)
        status = native.cuda_status() if native is not None else {}
        return {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_GiB": round(properties.total_memory / 2**30, 1),
            "cudart_of_torch": torch.version.cuda,
            "cudart_of_tlfast": status.get("runtime"),
            "driver_for_cuda": status.get("driver"),
            "diagnosis": list(tlfast.backends.cuda_status.diagnose(native)),
        }


class CpuClock:
    """The CPU in place of a GPU: for tests, and for a rehearsal of the benches. Its figures say nothing of a GPU."""

    device = torch.device("cpu")
    how = "a rehearsal on the CPU: these figures say nothing of a GPU"
    cache_bytes = 1 << 12

    def finish(self) -> None:
        pass

    def nothing(self) -> None:
        pass

    def sampler(self, call: Callable[[], object], seconds: float) -> Callable[[], Sections]:
        def sample() -> Sections:
            total = repeat(call, 2)["total"]
            return {"total": total, "host": total}

        return sample

    def graph_step(self, cap: Any, step: Step, tokens: torch.Tensor) -> Step:
        return step

    def graphed(self, step: Step, tokens: torch.Tensor) -> Step:
        return step

    def waits(self, run: Callable[[], object]) -> list[str]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            run()
        return [event.name for event in profiled.events()]

    def facts(self) -> dict[str, object]:
        return {"gpu": None, "rehearsal": True}


def gpu_clock() -> Clock:
    """The clock of the current CUDA device; NoGpu, with the reason, where the native code can't run on one."""
    native = tlfast.backends.choice.loaded()
    lacks = tlfast.backend() if native is None else tlfast.backends.cuda_status.missing(native)
    if lacks or not torch.cuda.is_available():
        raise NoGpu(lacks or "no CUDA device (the kernels of this build run on the CPU)")
    return CudaClock(torch.device("cuda", torch.cuda.current_device()))
