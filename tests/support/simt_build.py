"""Compiles CUDA sources as C++ with the SIMT shim into a shared library, once for each content of the sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from checkout import ROOT, TESTS

HERE = TESTS / "simt"
SANITIZED = "TLFAST_SIMT_SANITIZED"  # 1 in a process that has AddressSanitizer
CACHE = ROOT / "build" / "simt"
# As setup.py compiles the kernels: no fused multiply-add, no errno in the way of sqrt.
FLAGS = (
    "-std=c++20",
    "-O2",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)
# -Werror: the shim and the kernels compile without a warning, but for #pragma unroll, which is nvcc's.
# -fno-extern-tls-init: shared memory has no constructors.
STRICT = ("-Werror", "-Wno-unknown-pragmas", "-fno-extern-tls-init")
KERNEL = ("-x", "c++", f"-I{HERE}", f"-I{ROOT / 'csrc' / 'kernel'}", "-include", "simt.h")
ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O1")


def compiler() -> str:
    """The path of g++; skips where there is none."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("g++ must be on the PATH to run the CUDA source on the CPU. Install it")
    return found


def digest_of(sources: tuple[Path, ...], flags: tuple[str, ...], command: str) -> str:
    """A name for all that the library is made of: sources, what they may include, flags, and the compiler's version."""
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((flags, version, [path.name for path in sources])).encode())
    folders = sorted({HERE, ROOT / "csrc" / "kernel", *(path.parent for path in sources)})
    included = [path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh", ".cu")]
    for path in (*sources, *sorted(included)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def changed_kernels(name: str, **changes: tuple[str, str]) -> Path:
    """`capture_simt.cpp` in a folder with a copy of the kernels in which texts, each there once, are replaced.

    Example: ``changed_kernels("few_blocks", blocks=("kMostBlocks = 1 << 30", "kMostBlocks = 2"))``.
    """
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    left = dict(changes)
    for source in (HERE / "capture_simt.cpp", *(ROOT / "csrc" / "kernel").glob("*cuda*.cu*")):
        text = source.read_text()
        for what, (before, after) in changes.items():
            if before in text:
                assert text.count(before) == 1, f"{before!r} stands more than once in {source}"
                text = text.replace(before, after)
                del left[what]
        made = folder / source.name
        if not made.exists() or made.read_text() != text:
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                file.write(text)
            os.replace(file.name, made)
    assert not left, f"the kernels have changed, and {left} is no longer in them"
    return folder / "capture_simt.cpp"


def library(*names: str, sanitize: bool = False) -> Path:
    """The shared library made of ``names`` (files of this folder, or paths) and the shim; compiled if it isn't there.

    Example: ``ctypes.CDLL(library("shim_kernels.cu"))``.
    """
    command = compiler()
    shim = tuple(HERE / name for name in ("scheduler.cpp", "fiber.cpp", "shared_memory.cpp"))
    kernels = tuple(HERE / name for name in names)
    extra = ASAN if sanitize else ()
    # The kernels' addresses are checked, as a GPU does; the handler is the shim's own, so nothing is linked for it.
    kernel_flags = (*FLAGS, *STRICT, *extra, *KERNEL, "-fsanitize=alignment")
    shim_flags = (*FLAGS, *STRICT, *extra, f"-I{HERE}")
    digest = digest_of((*shim, *kernels), kernel_flags + shim_flags, command)
    path = CACHE / f"{kernels[0].parent.name}-{kernels[0].stem}-{digest}.so"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        objects = []
        for source in (*shim, *kernels):
            objects.append(f"{folder}/{source.stem}.o")
            flags = shim_flags if source in shim else kernel_flags
            run_compiler([command, *flags, "-c", str(source), "-o", objects[-1]])
        made = f"{folder}/library.so"
        run_compiler(
            [command, "-shared", "-Wl,-z,defs", *(["-fsanitize=address"] if sanitize else []), *objects, "-o", made]
        )
        os.replace(made, path)  # two tests may build at once: the last one wins, and both are whole
    return path


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"


def run_sanitized(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process that has AddressSanitizer, as `make sanitize` does; the interpreter has not."""
    runtime = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = f"detect_leaks=0:halt_on_error=1:{os.environ.get('ASAN_OPTIONS', '')}"
    env = os.environ | {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": options, SANITIZED: "1"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=env, capture_output=True, text=True, check=False
    )
