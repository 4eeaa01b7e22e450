"""Can the native code run on CUDA tensors here, and if not, what is missing: the build, the driver, a device, torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Answers of the CUDA runtime. Source: enum cudaError in its driver_types.h.
_NOT_INITIALISED, _INSUFFICIENT_DRIVER, _NO_DEVICE = 3, 35, 100
# The oldest Linux driver for each major version of the toolkit. Source: "CUDA Toolkit and Minimum Required Driver
# Version for CUDA Minor Version Compatibility" in NVIDIA's release notes of CUDA 13.0.
_OLDEST_DRIVER = {12: 525, 13: 580}
_TORCH_FOR_CPU = "this torch is a CPU build; tensors can't be on a GPU"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def missing(native: ModuleType) -> str:
    """What keeps the native code from CUDA tensors, in words, or "" if nothing does.

    Asks the CUDA driver which devices there are, as ``torch.cuda.is_available()`` does; makes no context.
    """
    status = native.cuda_status()
    if not status["built"]:
        return f"built without CUDA: {_built('CUDA_REASON', 'the build did not say why')}"
    if status["simt"]:
        return ""
    if status["error"] or status["n_devices"] == 0:
        return _no_device(status)
    if torch.version.cuda is None:
        return "this torch is built for ROCm" if torch.version.hip else _TORCH_FOR_CPU
    found = _capabilities(native)
    archs = _built("CUDA_ARCHS", ())
    if not any(_runs_on(archs, *capability) for capability in found):
        numbers = ";".join(f"{major}.{minor}" for major, minor in found)
        return (
            f"built for {_arch_words()}, and the GPUs here are {', '.join(devices(native))}; "
            f'build again with TORCH_CUDA_ARCH_LIST="{numbers}"'
        )
    return ""


def devices(native: ModuleType) -> list[str]:
    """The kinds of GPU that are visible, ``["sm_90"]`` for H100s; ``["simt"]`` where the CPU plays the GPU."""
    if native.cuda_status()["simt"]:
        return ["simt"]
    return [f"sm_{major}{minor}" for major, minor in _capabilities(native)]


def describe(native: ModuleType) -> str:
    """What the native code runs on: ``cpu, avx2``, or ``cpu avx2, cuda sm_90``, or ``cpu, avx2; cuda: <missing>``."""
    lacks = missing(native)
    if not lacks:
        return f"{native.describe().replace(', ', ' ')}, cuda {' '.join(devices(native))}"
    # A torch without CUDA and a build without CUDA are a pair: nothing is missing that could be used.
    told = native.cuda_status()["built"] or torch.version.cuda is not None
    return f"{native.describe()}; cuda: {lacks}" if told else str(native.describe())


def diagnose(native: ModuleType | None) -> Iterator[str]:
    """Yield what there is to say about CUDA, a line each."""
    if native is None:
        yield "not built: there is no native code"
        return
    status = native.cuda_status()
    if not status["built"]:
        reason = _built("CUDA_REASON", "the build did not say why")
        remedy = "unset it" if reason.startswith("TLFAST_") else "install the CUDA toolkit"
        yield f"not built: {reason}; {remedy} and build again"
    elif status["simt"]:
        yield "the kernels run on the CPU, for tests (TLFAST_SIMT=1)"
    else:
        outcome = missing(native) or f"driver {_driver_words(status)}; {', '.join(devices(native))}"
        yield f"built with {_built('CUDA', '?')} for {_arch_words()}; {outcome}"
    if torch.version.cuda is None and not torch.version.hip:
        yield _TORCH_FOR_CPU


def _built(name: str, otherwise: Any) -> Any:
    """A value of the build's note; it is absent where tlfast runs from a clean checkout."""
    try:
        from .. import _build_info
    except ImportError:
        return otherwise
    return getattr(_build_info, name, None) or otherwise


def _arch_words() -> str:
    archs = _built("CUDA_ARCHS", ())
    return ", ".join(dict.fromkeys("PTX" if arch.startswith("compute") else arch for arch in archs))


def _capabilities(native: ModuleType) -> list[tuple[int, int]]:
    return sorted({native.cuda_capability(k) for k in range(native.cuda_status()["n_devices"])})


def _runs_on(archs: tuple[str, ...], major: int, minor: int) -> bool:
    """Machine code runs on its major version from its minor on, PTX on all that is newer; with an "a" on that chip
    alone, with an "f" on its family. Source: "GPU Compilation" in the manual of nvcc."""
    for arch in archs:
        kind, number, only = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch).groups()  # type: ignore[union-attr]
        built = divmod(int(number), 10)
        if only == "a":
            fits = built == (major, minor)
        elif kind == "compute" and not only:
            fits = built <= (major, minor)
        else:
            fits = built[0] == major and built[1] <= minor
        if fits:
            return True
    return False


def _no_device(status: dict[str, Any]) -> str:
    if status["error"] == _INSUFFICIENT_DRIVER:
        if status["driver"] == 0:
            return "no driver is installed"
        wanted = _version(status["runtime"])
        oldest = _OLDEST_DRIVER.get(status["runtime"] // 1000)
        driver = f" (driver {oldest} or newer)" if oldest else ""
        return f"driver {_driver_words(status)} found, {wanted}{driver} wanted"
    if status["error"] in (0, _NO_DEVICE):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "no GPU was found" if visible is None else f"no GPU is visible (CUDA_VISIBLE_DEVICES={visible!r})"
    if status["error"] == _NOT_INITIALISED:
        return "CUDA can't be used in a process that was forked from one that has used it; start it with spawn"
    return f"CUDA answers error {status['error']}: {status['message']}"


def _driver_words(status: dict[str, Any]) -> str:
    """``580.65.06 (CUDA 13.0)``; the first number is the kernel module's, which not every system shows."""
    try:
        shown = re.search(r"^NVRM version:.*?\s(\d+\.[\d.]+)\s", _DRIVER_FILE.read_text(), flags=re.MULTILINE)
    except OSError:
        shown = None
    cuda = _version(status["driver"])
    return f"{shown[1]} (CUDA {cuda})" if shown else f"for CUDA {cuda}"


def _version(number: int) -> str:
    """13000 -> "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"
