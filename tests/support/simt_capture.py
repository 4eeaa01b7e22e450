"""The CUDA kernels on the CPU, called with tensors: what `tlfast.reduce_into` is for the other backends."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
from dataclasses import dataclass

import simt_build
import torch
from comparison import assert_captured
from op_cases import GRAD_DTYPES, REDUCTIONS, Case, left_shape, make_gradient, make_mask, make_out, make_ref

# The order of `Dtype`, `Reduction` and `Counter` in csrc/.
DTYPES = GRAD_DTYPES
REDUCTION_NUMBERS = {name: number for number, name in enumerate(REDUCTIONS)}
NONFINITE, SATURATED, WRITES = range(3)
ORDERS = (0, 1, 2, 3)
NORESERVE = 0x4000  # MAP_NORESERVE of Linux' asm-generic/mman-common.h; Python's mmap has the name from 3.13 on
FAR = 2**31 + 8  # elements: no 32 bits count them


class FlatCall(ctypes.Structure):
    """FlatCall of capture_simt.cpp, field for field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n_dims", "reduction", "grad_dtype", "out_dtype", "ref_dtype")),
        *((f"{name}_strides" if name else "sizes", ctypes.c_void_p) for name in ("", "grad", "out", "mask", "ref")),
        ("reduced", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("grad", "ref", "out", "mask", "cursor")),
        ("row_elements", ctypes.c_int64),
        ("counters", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
    )


@functools.cache
def kernels(source: str = "capture_simt.cpp") -> ctypes.CDLL:
    """The kernels as they are, or changed by `simt_build.changed_kernels`."""
    sanitize = os.environ.get(simt_build.SANITIZED) == "1"
    loaded = ctypes.CDLL(str(simt_build.library(source, sanitize=sanitize)))
    loaded.simt_last_kernel.restype = ctypes.c_void_p
    loaded.simt_message.restype = loaded.simt_error.restype = ctypes.c_char_p
    return loaded


@dataclass(frozen=True)
class Outcome:
    """What one call took: cudaError_t, and bytes of scratch."""

    error: int
    scratch_bytes: int


def far_memory(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of ``n`` elements that takes no page where it isn't touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    held = mmap.mmap(-1, n * dtype.itemsize, flags=flags)
    return torch.frombuffer(held, dtype=dtype)


def int64s(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def launch(
    out: torch.Tensor,
    grad: torch.Tensor,
    reduce: str,
    dims: tuple[int, ...],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    cursor: torch.Tensor | None = None,
    row_elements: int = 0,
    counters: torch.Tensor | None = None,
    library: ctypes.CDLL | None = None,
    ref: torch.Tensor | None = None,
) -> Outcome:
    """Call the kernels as they are, unless there is nothing to write: then nobody calls them (`Plan::run`)."""
    if out.numel() == 0:
        return Outcome(0, 0)
    n_dims = grad.dim()
    reduced = set() if reduce == "none" else {d % n_dims for d in dims}
    assert list(out.shape) == [s for d, s in enumerate(grad.shape) if d not in reduced]
    mask_strides = (0,) * n_dims if mask is None else (*mask.stride(), *(0,) * (n_dims - mask.dim()))
    other = grad if ref is None else ref
    assert other.shape == grad.shape
    held = [int64s(t) for t in (tuple(grad.shape), grad.stride(), out.stride(), mask_strides, other.stride())]
    flags = (ctypes.c_uint8 * n_dims)(*(d in reduced for d in range(n_dims)))
    call = FlatCall(
        n_dims,
        REDUCTION_NUMBERS[reduce],
        DTYPES.index(grad.dtype),
        DTYPES.index(out.dtype),
        DTYPES.index(other.dtype),
        *(ctypes.addressof(array) for array in (*held, flags)),
        scale,
        *map(address, (grad, ref, out, mask, cursor)),
        row_elements,
        address(counters),
        0,
    )
    return Outcome((library or kernels()).simt_capture(ctypes.byref(call)), call.scratch_bytes)


def capture(*args: object, order: int = 0, library: ctypes.CDLL | None = None, **kwargs: object) -> Outcome:
    """``launch`` in one of the orders of fibers, and it must go well."""
    library = library or kernels()
    library.simt_set_order(order)
    outcome = launch(*args, library=library, **kwargs)  # type: ignore[arg-type]
    assert outcome.error == 0, f"{outcome.error}: {library.simt_message().decode()}"
    return outcome


def check(case: Case, out_layout: str = "rows", order: int = 0) -> torch.Tensor:
    """Run one case into memory full of NaN: the value, the counters, and that nothing else was written."""
    grad, mask = make_gradient(case.shape, case.layout, case.grad_dtype), make_mask(case.shape, case.mask)
    ref = None if case.ref_dtype is None else make_ref(case)
    memory, out = make_out(left_shape(case), case.dtype, out_layout)
    counters = torch.full((3,), 1000)
    capture(out, grad, case.reduce, case.dims, mask, case.scale, counters=counters, order=order, ref=ref)
    result = out.clone()
    assert_captured(result, grad, case.reduce, case.dims, mask, case.scale, case, ref)
    nonfinite = int((~torch.isfinite(result)).sum())  # of normal gradients: where there was nothing to look at
    assert (counters - 1000).tolist() == [nonfinite, 0, int(out.numel() > 0)], case
    out.fill_(math.nan)
    assert torch.isnan(memory).all(), f"{case}: written outside of out"
    return result
