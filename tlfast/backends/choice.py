"""The one door to the native code: is it there, does it fit this torch, and the fused ops by themselves."""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..errors import broken_rule
from ..spec import REDUCTIONS, Over, one_of, parse_over
from . import cuda_status, python, reference
from .interface import Backend
from .plain import destination, plain


def build_reason() -> str:
    """Why there is no native module."""
    try:
        from .. import _build_info
    except ImportError:
        return "the native code was not built"
    if _build_info.BUILT:
        return "the native module that was built is gone"
    return _build_info.REASON or "the native code was not built"


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    """Import the native module; (None, why) when it is missing or was built for another torch."""
    built_for: object = None
    try:
        # The handshake comes first and needs no torch symbol: a module built for another minor version can load and
        # corrupt memory (Edge::function changed its pointer type between 2.11 and 2.13).
        from .. import _build_info

        built_for = getattr(_build_info, "TORCH", None)
    except ImportError:
        pass
    here = torch.__version__.split("+")[0].rsplit(".", 1)[0]
    if built_for and str(built_for).split("+")[0].rsplit(".", 1)[0] != here:
        return None, f"built for torch {built_for}, but torch {torch.__version__} is running"
    try:
        from .. import _C
    except ImportError as error:
        # A module that is there and can't be loaded (a missing symbol, say) has a reason of its own.
        missing = importlib.util.find_spec("tlfast._C") is None
        return None, build_reason() if missing else f"{type(error).__name__}: {error}"
    if here != _C.TORCH_VERSION:
        return None, f"built for torch {_C.TORCH_VERSION}, but torch {torch.__version__} is running"
    _register_fakes()
    return _C, ""


def _register_fakes() -> None:
    """What the native ops do to tensors without data: they write into their first argument and return nothing."""

    @torch.library.register_fake("tlfast::capture")  # type: ignore[untyped-decorator]
    def capture(
        out: torch.Tensor,
        grad: torch.Tensor,
        reduce: str,
        over: list[int],
        mask: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        dims = () if reduce == "none" else reference.normal_dims("capture", tuple(over), grad.dim())
        reference.check_capture("capture", out, grad, dims)

    @torch.library.register_fake("tlfast::capture_product")  # type: ignore[untyped-decorator]
    def capture_product(
        out: torch.Tensor,
        grad: torch.Tensor,
        ref: torch.Tensor,
        reduce: str,
        over: list[int],
        mask: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        capture(out, grad, reduce, over, mask, scale)
        reference.check_ref("capture", ref, grad, reduce)

    @torch.library.register_fake("tlfast::fire")  # type: ignore[untyped-decorator]
    def fire(
        token: torch.Tensor,
        grad: torch.Tensor,
        number: int,
        output: torch.Tensor | None = None,
        input: torch.Tensor | None = None,
    ) -> None:
        return None


@cache
def tell(reason: str, does: str = "runs") -> None:
    """Warn, once for each reason, that Python does the work; an error under TLFAST_REQUIRE_NATIVE=1."""
    if os.environ.get("TLFAST_REQUIRE_NATIVE") == "1":
        raise RuntimeError(
            broken_rule(
                "tlfast", "the native code", "be usable (TLFAST_REQUIRE_NATIVE=1)", reason,
                "Run pip install --no-build-isolation -e . again, or unset the variable.",
            )
        )  # fmt: skip
    warnings.warn(f"tlfast {does} in pure Python, slower and with the same results: {reason}", stacklevel=4)


@lru_cache(maxsize=1)
def native() -> ModuleType | None:
    """The native module, or None after one warning that says why it isn't used.

    Raises:
        RuntimeError: if it can't be used and TLFAST_REQUIRE_NATIVE=1.
    """
    module, reason = _load()
    if module is None:
        tell(reason)
    return module


def loaded() -> ModuleType | None:
    """The native module or None, without a word."""
    return _load()[0]


def backend() -> str:
    """What runs, on what, and why: ``native (cpu, avx512)``, ``native (cpu avx512, cuda sm_90)``, ``python: <reason>``.

    A part that was built or could be used says what it lacks: ``native (cpu, avx512; cuda: no driver is installed)``.
    The CUDA driver is asked for its devices, as by ``torch.cuda.is_available()``.

    Example:
        >>> import tlfast
        >>> tlfast.backend().split()[0].rstrip(":") in ("native", "python")
        True
    """
    module, reason = _load()
    return f"python: {reason}" if module is None else f"native ({cuda_status.describe(module)})"


@cache
def _lacks_cuda(module: ModuleType) -> str:
    """What the native code lacks for CUDA tensors, or ""; asked once: where such a tensor exists, nothing changes."""
    return cuda_status.missing(module)


def _not_for(who: str, devices: set[str], module: ModuleType | None) -> str:
    """Why the native code can't run on these devices, or ""."""
    unknown = sorted(devices - {"cpu", "cuda"})
    if unknown:
        return f"the native code runs on cpu and cuda, and {who} is on {', '.join(unknown)}"
    if "cuda" in devices and module is not None and (lacks := _lacks_cuda(module)):
        return f"{who} is on cuda, and the native code can't: {lacks}"
    return ""


def pick_native(who: str, wanted: str, devices: set[str]) -> ModuleType | None:
    """The native module if ``wanted`` ("auto", "native", "python") and the devices allow it, else None."""
    if wanted == "python":
        return None
    module, reason = _load()
    barred = _not_for(who, devices, module)
    if barred and wanted == "native":
        raise RuntimeError(
            broken_rule(who, "backend", "be usable", f"native: {barred}", 'Pass backend="python" or "auto".')
        )
    if barred:
        tell(barred)
        return None
    if module is None and wanted == "native":
        raise RuntimeError(broken_rule(who, "backend", "be usable", f"native: {reason}", 'Pass backend="auto".'))
    return native() if module is None else module


if TYPE_CHECKING:  # both are what is asked of a backend
    from .. import _C as _native

    _BACKENDS: tuple[Backend, Backend] = (_native, python)


def pick_backend(who: str, wanted: str, devices: set[str]) -> Backend:
    """The engine of a capture: as `pick_native`, and the one in Python where that is None."""
    return pick_native(who, wanted, devices) or python


def reduce_into(
    out: torch.Tensor,
    grad: torch.Tensor,
    reduce: str = "mean",
    over: Over = 1,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Reduce, cast and copy a gradient into a preallocated tensor, in one pass over its bytes.

    Args:
        out: where the result goes, of the gradient's shape without the reduced dimensions; float32, bfloat16 or float16
            (float64 for float64 gradients), any strides.
        grad: float32, bfloat16, float16 or float64, any strides and sizes.
        reduce: none, sum, mean, last, norm (L2: sqrt of the sum of squares) or absmax.
        over: dimensions to reduce: "pos" (1), "batch" (0), numbers, or several. Ignored by ``none``.
        mask: bool, of the gradient's leading sizes ([B, P]); False positions are left out: ``mean`` divides by the real
            ones, ``last`` is the last real one, ``none`` stores zeros there. Over no real position, ``mean`` and
            ``last`` are NaN and the others 0.
        scale: a factor on the result, applied before the cast.

    Returns:
        ``out``. Accumulation is in float32 (float64 for float64), with one rounding to the stored dtype.

    Raises:
        ValueError: for a wrong shape, dtype, layout, dimension or mask, before anything is written.
        RuntimeError: for a tensor whose value isn't all in its own memory, as a DTensor that is sharded.

    Example:
        >>> import torch, tlfast
        >>> grad = torch.arange(6.0).reshape(1, 3, 2)
        >>> tlfast.reduce_into(torch.empty(1, 2), grad, "mean", over="pos")
        tensor([[2., 3.]])
    """
    who = "reduce_into"
    if not torch.compiler.is_compiling():
        # Where the tensors are plain and small, torch's dispatcher costs more than the work.
        at_once = native()
        if at_once is not None and at_once.reduce_at_once(out, grad, reduce, over, mask, scale):
            return out
    one_of(who, "reduce", reduce, REDUCTIONS)
    dims = parse_over(who, over)
    # Before the op is called: a tensor of another class would take the call over.
    grad, memory = plain(who, "grad", grad), destination(who, "out", out)
    mask = None if mask is None else plain(who, "mask", mask)
    where = out.device.type
    module = native() if where == "cpu" else pick_native(who, "auto", {where}) if where == "cuda" else None
    if module is None:
        reference.capture(memory, grad, reduce, dims, mask, scale)
    else:
        torch.ops.tlfast.capture(memory, grad, reduce, dims, mask, scale)
    return out


def reduce_product_into(
    out: torch.Tensor,
    grad: torch.Tensor,
    ref: torch.Tensor,
    reduce: str = "sum",
    over: Over = -1,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Reduce the product of a gradient and another tensor into a preallocated tensor, in one pass over both.

    The sum over the width is what attribution patching and saliency are made of: a gradient times an activation, or
    times the difference of two. Nothing of the size of either is allocated.

    Args:
        out: where the result goes, of the gradient's shape without the reduced dimensions; float32, bfloat16 or float16
            (float64 for float64 gradients), any strides.
        grad: float32, bfloat16, float16 or float64, any strides and sizes.
        ref: what it is multiplied with: an activation, a difference of activations, a direction. Of the gradient's
            shape (``expand_as`` makes it so), in any of the four dtypes, which may be another than the gradient's.
        reduce: none (each product is kept), sum, mean or last.
        over: dimensions to reduce: "pos" (1), "batch" (0), numbers, or several. Ignored by ``none``. For heads that lie
            side by side in the last dimension, split that in both, by ``unflatten(-1, (n_heads, d_head))``, and reduce
            -1.
        mask: bool, of the gradient's leading sizes, True at real tokens, as in `reduce_into`.
        scale: a factor on the result, applied before the cast.

    Returns:
        ``out``. Both factors are converted to float32 (float64 where the gradient is that) and multiplied and added
        there, with one rounding to the stored dtype.

    Raises:
        ValueError: for a wrong shape, dtype, layout, dimension or mask, and for another reduction, before anything is
            written.
        RuntimeError: for a tensor whose value isn't all in its own memory, as a DTensor that is sharded.

    Example:
        >>> import torch, tlfast
        >>> grad, act = torch.arange(6.0).reshape(1, 3, 2), torch.full((1, 3, 2), 2.0)
        >>> tlfast.reduce_product_into(torch.empty(1, 3), grad, act)
        tensor([[ 2., 10., 18.]])
    """
    who = "reduce_product_into"
    one_of(who, "reduce", reduce, REDUCTIONS)
    reference.check_of_products(who, reduce)
    dims = parse_over(who, over)
    grad, ref, memory = plain(who, "grad", grad), plain(who, "ref", ref), destination(who, "out", out)
    mask = None if mask is None else plain(who, "mask", mask)
    where = out.device.type
    module = native() if where == "cpu" else pick_native(who, "auto", {where}) if where == "cuda" else None
    if module is None:
        reference.capture(memory, grad, reduce, dims, mask, scale, ref=ref)
    else:
        torch.ops.tlfast.capture_product(memory, grad, ref, reduce, dims, mask, scale)
    return out


_load()  # registers torch.ops.tlfast; says nothing where there is no native code, until it is asked for
