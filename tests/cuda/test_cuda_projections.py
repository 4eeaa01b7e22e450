"""Sketches on a GPU, by torch's operations: the bits of the native code on the CPU."""

from __future__ import annotations

import pytest
import torch

from tlfast import Projection
from tlfast.projections import projector

SKETCHES = [
    Projection(64, "count-sketch"),
    Projection(48, "count-sketch", nonzeros=3),
    Projection(64, "hadamard"),
    Projection(50, "hadamard", form="one-sided"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projection", SKETCHES, ids=str)
def test_a_gpu_makes_the_bits_of_the_cpu(gpu, projection, dtype):
    role, x = projection.roles[0], torch.randn(37, 1_003, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = projector(projection, "h.0", role, 1_003, dtype, backend="native")(x)
    there = projector(projection, "h.0", role, 1_003, dtype, gpu.device, backend="python")
    assert torch.equal(there(x.to(gpu.device)).cpu(), wanted)


@pytest.mark.parametrize("projection", [Projection(64), Projection(50, "normal")], ids=str)
def test_a_gpu_has_the_same_matrix(gpu, projection):
    made = projector(projection, "h.0", "left", 1_003, device=gpu.device)
    assert torch.equal(made.kept.cpu(), projector(projection, "h.0", "left", 1_003).kept)
