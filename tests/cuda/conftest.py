"""The devices of these tests: a GPU where there is one, and the CPU; under `make simt` that has the GPU's kernels."""

import pytest
import torch
from backends import usable
from gpu_device import Gpu


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.simt), pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request):
    """A device with the native code."""
    usable("native")
    return Gpu(torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda"))
