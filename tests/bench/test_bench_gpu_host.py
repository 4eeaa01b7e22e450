"""The bench of a GPU counts what a step must not do, and fails where taps make it do so."""

from __future__ import annotations

import sys

import pytest
from checkout import ROOT

sys.path.append(str(ROOT))

from bench import gpu_host
from bench.clock import CpuClock
from bench.measure import WrongResult
from bench.rivals import AUTO, BARE, VARIANTS

CLOCK = CpuClock()


def test_what_a_step_must_not_do_is_counted():
    names = [
        "cudaLaunchKernel", "cudaStreamSynchronize", "cudaStreamSynchronize", "cudaMalloc", "cudaMemcpyAsync",
        "Memcpy DtoH (Device -> Pageable)", "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoD (Device -> Device)",
        "cudaDeviceSynchronize", "aten::mm",
    ]  # fmt: skip
    assert dict(gpu_host.forbidden(names)) == {"waits": 2, "allocations": 1, "pageable copies": 1}
    assert not any(gpu_host.forbidden([]).values())


@pytest.mark.parametrize("name", ["cudaStreamSynchronize", "cudaMalloc", "Memcpy DtoH (Device -> Pageable)"])
def test_a_step_that_waits_fails_the_bench(native, name):
    class Waits(CpuClock):
        n_asked = 0

        def waits(self, run):
            run()
            self.n_asked += 1
            return [name] * (self.n_asked > 1)  # the bare model comes first

    variants = {key: VARIANTS[key] for key in (BARE, AUTO)}
    with pytest.raises(WrongResult, match="must not wait, allocate or copy"):
        gpu_host.run(Waits(), quick=True, variants=variants)
    assert gpu_host.run(CLOCK, quick=True, variants=variants).claims
