"""float64 gradients are rounded once on their way to 16 bits, not by way of float32."""

import numpy as np
import pytest
import torch
from backends import usable

import tlfast
import tlfast.backends.reference

HALVES = {torch.bfloat16: 8, torch.float16: 11}  # bits of the significand


def store(backend, values, dtype):
    usable(backend)
    grad, out = values.reshape(1, -1), torch.full((1, len(values)), float("nan"), dtype=dtype)
    if backend == "native":
        torch.ops.tlfast.capture(out, grad, "none", [])
    else:
        tlfast.backends.reference.capture(out, grad, "none", ())
    return out[0]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("backend", ["native", "python"])
def test_just_above_a_tie_rounds_up(backend, dtype):
    half = 2.0 ** -HALVES[dtype]  # half a unit in the last place of 1
    values = torch.tensor(
        [1 + half, 1 + half + 2.0**-40, 1 + half - 2.0**-40, 1 + 3 * half - 2.0**-40], dtype=torch.double
    )
    values = torch.cat([values, -values])
    up, right = 1 + 2 * half, torch.tensor([1.0, 0.0, 0.0, 0.0])
    right[1], right[2], right[3] = up, 1.0, up
    assert torch.equal(store(backend, values, dtype).double(), torch.cat([right, -right]).double())
    assert store(backend, values, dtype)[1] != values[1].float().to(dtype)  # two roundings give another number


@pytest.mark.sanitize
@pytest.mark.parametrize("backend", ["native", "python"])
def test_float16_as_numpy_rounds_float64(backend):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(20000) * 2.0 ** rng.integers(-30, 17, 20000)
    ties = np.arange(1, 2000, dtype=np.float16).astype(np.float64) * 2.0**-24
    ties = np.concatenate([ties + 2.0**-25, ties + 2.0**-25 + 2.0**-70, [65519.99, 65520.0, 1e-300, 0.0, -0.0, np.inf]])
    values = np.concatenate([values, ties, -ties])
    with np.errstate(over="ignore"):
        right = torch.from_numpy(values.astype(np.float16))
    assert torch.equal(
        store(backend, torch.from_numpy(values), torch.float16).view(torch.int16), right.view(torch.int16)
    )
