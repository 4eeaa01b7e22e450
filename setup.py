"""Build the native module tlfast._C when torch and a C++20 compiler are there; say what was chosen and why.

TLFAST_BUILD=auto  the default: build for the CPU if that is possible, else install the pure-Python package
TLFAST_BUILD=cpu   build for the CPU, and fail if that is not possible
TLFAST_BUILD=cuda  not in this version: fails
TLFAST_BUILD=none  install the pure-Python package
TLFAST_SANITIZE=1  AddressSanitizer and UBSan (see `make sanitize`)
TLFAST_WERROR=1    warnings of the compiler are errors

The build needs the torch that will run it, so: pip install --no-build-isolation -e .
The outcome is kept in tlfast/_build_info.py, which `tlfast.backend()` reads.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 11)
SANITIZE = os.environ.get("TLFAST_SANITIZE") == "1"


class CannotBuild(Exception):
    """The reason why the native module cannot be built here."""


def find_torch():
    """Return the installed torch, or say why it does not do."""
    try:
        import torch
    except Exception as error:  # a broken torch fails in many ways, and none of them may stop the Python install
        raise CannotBuild(
            f"torch could not be imported by {sys.executable} ({type(error).__name__}: {error}); "
            "install torch first, then: pip install --no-build-isolation"
        ) from error
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        raise CannotBuild(f"torch must be {'.'.join(map(str, OLDEST_TORCH))} or newer, got {torch.__version__}")
    return torch


def find_compiler():
    """Return the C++ compiler's name after it has compiled a line of C++20 that includes Python.h."""
    command = shlex.split(os.environ.get("CXX") or "c++")  # torch's BuildExtension picks the same one
    if sys.platform == "win32":
        raise CannotBuild("the native module does not support Windows")
    if shutil.which(command[0]) is None:
        raise CannotBuild(f"no C++ compiler: {command[0]!r} was not found (set CXX, or install g++ or clang)")
    source = "#include <Python.h>\n#include <span>\nint main() { return std::span<int>().size(); }\n"
    flags = ["-std=c++20", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"]
    probe = subprocess.run([*command, *flags], input=source, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        first = next((line for line in probe.stderr.splitlines() if "error" in line), probe.stderr.strip()[:200])
        raise CannotBuild(f"{command[0]} cannot compile C++20 with Python.h: {first}")
    return " ".join(command)


def compile_flags(torch):
    """Return the flags of every source file, each with its reason."""
    from torch.utils.cpp_extension import include_paths

    flags = [
        "-std=c++20",  # what the headers of torch 2.13 are built with
        "-O3",
        "-fno-math-errno",  # lets sqrt and friends be vectorised; errno is never read
        "-fno-trapping-math",  # lets selects be vectorised; floating-point traps are never enabled
        "-ffp-contract=off",  # no fused multiply-add behind our back: the same bits on every CPU
        "-fvisibility=hidden",
        "-g0",  # Python asks for -g, which doubles the compile time and makes the module fifty times as large
        "-Wall",
        "-Wextra",
    ]
    if torch.backends.openmp.is_available() and sys.platform == "linux":
        # at::parallel_for is serial without it. Compiled only, never linked: the symbols come from the
        # OpenMP runtime that torch has loaded, so there is one thread pool, not two.
        flags.append("-fopenmp")
    if SANITIZE:
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags.append("-fno-wrapv")  # Python asks for -fwrapv, under which signed overflow would pass unseen
    if os.environ.get("TLFAST_WERROR") == "1":
        flags.append("-Werror")
    # -isystem, not -I: warnings of torch's own headers are not ours to fix.
    return flags + [word for path in include_paths() for word in ("-isystem", path)]


def native_extension(torch):
    """Return the extension tlfast._C: every csrc/*.cpp, against torch's libraries for the CPU."""
    from torch.utils.cpp_extension import library_paths

    return Extension(
        "tlfast._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")),
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu", "torch_python"],
        language="c++",
        extra_compile_args={"cxx": compile_flags(torch)},  # a mapping: the form that BuildExtension takes
        extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
    )


def choose():
    """Return (torch or None, reason) from TLFAST_BUILD and from what this machine has."""
    wanted = os.environ.get("TLFAST_BUILD", "").strip().lower() or "auto"
    if wanted not in CHOICES:
        sys.exit(f"setup.py: TLFAST_BUILD must be one of {', '.join(CHOICES)}, got {wanted!r}. Unset it for auto.")
    if wanted == "cuda":
        sys.exit("setup.py: TLFAST_BUILD must be auto, cpu or none, got 'cuda'. This version has no CUDA code yet.")
    if wanted == "none":
        return None, "TLFAST_BUILD=none"
    try:
        if not any((ROOT / "csrc").glob("*.cpp")):
            raise CannotBuild("csrc/ holds no C++ sources")
        torch = find_torch()
        compiler = find_compiler()
    except CannotBuild as error:
        if wanted == "cpu":
            sys.exit(f"setup.py: TLFAST_BUILD must be possible on this machine, got 'cpu', but {error}.")
        return None, str(error)
    return torch, f"TLFAST_BUILD={wanted}, torch {torch.__version__}, compiler {compiler}"


def write_build_info(folder, torch, reason):
    """Write _build_info.py into folder: what was built and why; and drop a native module that was not wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    version = None if torch is None else str(torch.__version__)
    lines = ['"""How this copy of tlfast was built; written by setup.py."""', ""]
    lines += [f"BUILT = {torch is not None}", f"REASON = {reason!r}", f"TORCH = {version!r}", f"SANITIZE = {SANITIZE}"]
    (folder / "_build_info.py").write_text("\n".join(lines) + "\n")
    if torch is None:
        for stale in folder.glob("_C.*.so"):
            stale.unlink()


TORCH, REASON = choose()
CHOSEN = "building tlfast._C for the CPU" if TORCH else "no native module, pure Python"
print(f"tlfast: {CHOSEN} ({REASON})", flush=True)


class BuildPython(build_py):
    """Adds _build_info.py where no extension is built (build_ext does not run then)."""

    def run(self):
        super().run()
        if TORCH is None:
            folder = ROOT / "tlfast" if self.editable_mode else Path(self.build_lib) / "tlfast"
            write_build_info(folder, TORCH, REASON)


COMMANDS = {"build_py": BuildPython}
if TORCH is not None:
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        """Keeps the object files between builds, apart for each Python, torch and kind of build."""

        def finalize_options(self):
            super().finalize_options()
            kind = "sanitize" if SANITIZE else "cpu"
            self.build_temp = str(Path("build") / f"{kind}-{sys.implementation.cache_tag}-torch{TORCH.__version__}")

        def run(self):
            super().run()
            folder = ROOT / "tlfast" if self.inplace else Path(self.build_lib) / "tlfast"
            write_build_info(folder, TORCH, REASON)

    COMMANDS["build_ext"] = BuildNative

setup(ext_modules=[] if TORCH is None else [native_extension(TORCH)], cmdclass=COMMANDS)
