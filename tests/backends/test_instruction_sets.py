"""Every instruction set that the kernels are compiled for gives the same bits as the best one of this machine."""

import hashlib
import os
import subprocess
import sys

import pytest
from backends import usable

SETS = ["baseline", "avx2"]
PROGRAM = """
import hashlib, itertools, sys
import torch, tlfast
torch.manual_seed(0)
digest = hashlib.sha256()
dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
for shape, dtype in itertools.product([(3, 37, 65), (1, 1000, 7), (2, 5, 769)], dtypes):
    grad = torch.randn(shape, dtype=torch.float64).mul(3).to(dtype)
    grad[0, 1, 2] = float("nan")
    mask = torch.rand(shape[:2]) < 0.7
    for reduce, over in itertools.product(["none", "sum", "mean", "last", "norm", "absmax"], [0, 1, 2, (0, 1)]):
        dims = () if reduce == "none" else over if isinstance(over, tuple) else (over,)
        row = [s for d, s in enumerate(shape) if d not in dims]
        for stored in dtypes if dtype == torch.float64 else dtypes[:3]:
            for view in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2)):
                out = torch.empty(row, dtype=stored)
                tlfast.reduce_into(out, view, reduce, over, mask)
                digest.update(out.nan_to_num(nan=1e4).contiguous().view(torch.uint8).numpy().tobytes())
        for other in dtypes if reduce in ("none", "sum") else [] if reduce in ("norm", "absmax") else [dtype]:
            ref = torch.randn(shape, dtype=torch.float64).mul(3).to(other)
            for view in (ref, ref[..., :1].expand(shape)):
                out = torch.empty(row)
                tlfast.reduce_product_into(out, grad, view, reduce, over, mask)
                digest.update(out.nan_to_num(nan=1e4).contiguous().view(torch.uint8).numpy().tobytes())
from tlfast import _C
print(_C.describe().removeprefix("cpu, "), digest.hexdigest())
"""


def run(most):
    env = os.environ | {"TLFAST_CPU": most, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    backend, digest = done.stdout.strip().rsplit(" ", 1)
    assert len(digest) == len(hashlib.sha256().hexdigest())
    return backend, digest


@pytest.fixture(scope="module")
def best():
    usable("native")
    return run("")


@pytest.mark.parametrize("most", SETS)
def test_same_bits(best, most):
    backend, digest = run(most)
    order = [*SETS, "avx512"]
    found = best[0]
    assert order.index(found) >= 0
    assert backend == order[min(order.index(found), order.index(most))]
    assert digest == best[1]
