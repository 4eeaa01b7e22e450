"""Build the native modules tlfast._C and tlfast._disk when torch and a C++20 compiler are there; say why if not.

TLFAST_BUILD=auto  the default: build for the CPU if that is possible, else install the pure-Python package; with the
                   CUDA kernels if a CUDA toolkit is there
TLFAST_BUILD=cpu   build for the CPU alone, and fail if that is not possible
TLFAST_BUILD=cuda  build for the CPU and CUDA, and fail if that is not possible
TLFAST_BUILD=none  install the pure-Python package
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  for which GPUs; no GPU is needed to build. Unset: machine code for H100, and PTX
                   that every GPU from A100 on compiles when it first runs
TLFAST_SANITIZE=1  AddressSanitizer and UBSan (see `make sanitize`)
TLFAST_SIMT=1      the CUDA kernels compiled for the CPU, in place of the others (see `make simt`)
TLFAST_WERROR=1    warnings of the compiler are errors

The build needs the torch that will run it, so: pip install --no-build-isolation -e .
tlfast._disk, the writer of datasets, takes from torch no more than the headers of pybind11, and runs beside any other.
The outcome is kept in tlfast/_build_info.py, which `tlfast.backend()` reads.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_build  # noqa: E402

CHOICES = ("auto", "cpu", "cuda", "none")
# Compiled as one file each: reading torch's headers takes most of a file's time. Every other file is compiled alone.
TOGETHER = {
    "with_python": (
        "cuda_status",
        "module",
        "plain",
        "py_callable",
        "py_full_call",
        "py_full_hooks",
        "py_module_call",
        "py_point_hooks",
        "py_reduce",
        "py_tap",
    ),
    "with_tensors": (
        "backward",
        "backwards",
        "capture",
        "column",
        "device",
        "factor_sums",
        "full_call",
        "keeper",
        "ledger",
        "queries",
        "recipe",
        "rows",
        "shared_inputs",
        "sketcher",
        "step_input",
        "streams",
        "tap",
        "tensor_cache",
        "weight",
        "whole",
    ),
}
# What a device needs, by the kind of build: a device that is missing is another file, and no condition in one. The
# kernels themselves are linked, or no_cuda.cpp takes their place; the CPU has no streams, so those of the tests take
# notes.
STREAMS = {
    "cuda": "csrc/autograd/streams.cpp",
    "simt": "tests/simt/streams.cpp",
    "cpu": "csrc/autograd/no_streams.cpp",
}
OLDEST_TORCH = (2, 11)
SANITIZE = os.environ.get("TLFAST_SANITIZE") == "1"
SIMT = os.environ.get("TLFAST_SIMT") == "1"
# What is built: torch (None: pure Python) and why, the CUDA toolkit (None: no CUDA), its architectures, why no CUDA.
Choice = namedtuple("Choice", ["torch", "reason", "cuda", "archs", "no_cuda"])


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
    return flags


def kind_of(choice):
    """Return which kernels of CUDA are in the build: those of a GPU, the same on the CPU, or none."""
    return "simt" if SIMT else "cuda" if choice.cuda else "cpu"


def native_sources(kind):
    """Return the files of tlfast._C; those of TOGETHER are written to build/. With sanitizers each is alone."""
    alone = {
        path.stem: str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*.cpp") if path.parent.name != "disk"
    }
    del alone["no_streams"]
    alone["streams"] = STREAMS[kind]
    if kind != "cpu":
        del alone["no_cuda"]
    made = []
    for name, stems in TOGETHER.items() if not SANITIZE else ():
        path = ROOT / "build" / "together" / kind / f"{name}.cpp"
        text = "".join(f'#include "../../../{alone.pop(stem)}"\n' for stem in stems)
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        made.append(str(path.relative_to(ROOT)))
    return sorted([*alone.values(), *made])


def extension(name, sources, choice, **more):
    """Return an extension of these sources."""
    from torch.utils.cpp_extension import include_paths

    flags = [*compile_flags(choice.torch), f"-I{ROOT / 'csrc'}"]
    # -isystem, not -I: warnings of torch's own headers are not ours to fix.
    flags += [word for path in include_paths() for word in ("-isystem", path)]
    return Extension(
        name,
        sources=sources,
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*.[hc]*")),
        language="c++",
        extra_compile_args={"cxx": flags},  # a mapping: the form that BuildExtension takes
        extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
        **more,
    )


def native_extensions(choice):
    """Return tlfast._C, against torch's libraries for the CPU, and tlfast._disk (csrc/disk), against none."""
    from torch.utils.cpp_extension import library_paths

    sources = native_sources(kind_of(choice))
    libraries = ["c10", "torch", "torch_cpu", "torch_python"]
    on_disk = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "disk").glob("*.cpp"))
    return [
        extension("tlfast._disk", on_disk, choice),  # first: it is small, and nvcc works beside it
        extension("tlfast._C", sources, choice, library_dirs=library_paths(), libraries=libraries),
    ]


def compile_simt(extension, choice):
    """Compile the CUDA kernels for the CPU and link them into the extension."""
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *compile_flags(choice.torch)]
    try:
        library = cuda_build.compile_for_cpu(command)
    except cuda_build.CannotBuildCuda as error:
        sys.exit(f"setup.py: {error}")
    extension.extra_link_args += [str(library), f"-Wl,-rpath,{library.parent}"]


def link_cuda(extension, choice):
    """Link the object of the CUDA kernels into the extension, with a CUDA runtime that nobody else sees."""
    # torch may have loaded another CUDA runtime for all to see: without this its functions would take the place of
    # ours, which are of another version.
    extension.extra_link_args += ["-Wl,--exclude-libs,libcudart_static.a"]
    extension.extra_link_args += [str(choice.cuda.runtime), "-ldl", "-lrt", "-lpthread"]
    extension.extra_objects.append(str(cuda_build.OBJECT))


def compile_cuda(choice):
    """Compile the CUDA kernels, and say what it took."""
    started = time.monotonic()
    try:
        _, new = cuda_build.compile_kernels(choice.cuda, choice.archs)
    except cuda_build.CannotBuildCuda as error:
        sys.exit(f"setup.py: {error}. TLFAST_BUILD=cpu builds without CUDA.")
    took = f"compiled in {time.monotonic() - started:.0f} s" if new else "up to date"
    print(f"tlfast: {cuda_build.SOURCE} {took}", flush=True)


def choose():
    """Return what to build, from TLFAST_BUILD and from what this machine has."""
    wanted = os.environ.get("TLFAST_BUILD", "").strip().lower() or "auto"
    if wanted not in CHOICES:
        sys.exit(f"setup.py: TLFAST_BUILD must be one of {', '.join(CHOICES)}, got {wanted!r}. Unset it for auto.")
    if wanted == "none":
        return Choice(None, "TLFAST_BUILD=none", None, (), "TLFAST_BUILD=none")
    try:
        if not any((ROOT / "csrc").glob("*/*.cpp")):
            raise CannotBuild("csrc/ holds no C++ sources")
        torch = find_torch()
        compiler = find_compiler()
    except CannotBuild as error:
        if wanted != "auto":
            sys.exit(f"setup.py: TLFAST_BUILD must be possible on this machine, got {wanted!r}, but {error}.")
        return Choice(None, str(error), None, (), "there is no native code")
    reason = f"TLFAST_BUILD={wanted}, torch {torch.__version__}, compiler {compiler}"
    if wanted == "cpu" or SIMT:
        return Choice(torch, reason, None, (), "TLFAST_SIMT=1" if SIMT else "TLFAST_BUILD=cpu")
    try:
        archs = cuda_build.parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"))
        return Choice(torch, reason, cuda_build.find_toolkit(archs), archs, "")
    except ValueError as error:
        sys.exit(f"setup.py: {error}")
    except cuda_build.CannotBuildCuda as error:
        if wanted == "cuda":
            sys.exit(f"setup.py: TLFAST_BUILD must be possible on this machine, got 'cuda', but {error}.")
        return Choice(torch, reason, None, (), str(error))


def in_words(choice):
    """Return what is built, and why, for the one who waits for it."""
    if choice.torch is None:
        return f"no native module, pure Python ({choice.reason})"
    if SIMT:
        return f"building tlfast._C for the CPU, with the CUDA kernels on the CPU too ({choice.reason})"
    if choice.cuda is None:
        why = "" if choice.no_cuda in choice.reason else f"{choice.no_cuda}; "
        return f"building tlfast._C for the CPU alone ({why}{choice.reason})"
    cuda = f"CUDA {choice.cuda.version} ({cuda_build.arch_words(choice.archs)})"
    return f"building tlfast._C for the CPU and {cuda} ({choice.reason}, {choice.cuda.nvcc})"


def build_info(choice):
    """Return the text of _build_info.py: what was built and why."""
    values = {
        "BUILT": choice.torch is not None,
        "REASON": choice.reason,
        "TORCH": None if choice.torch is None else str(choice.torch.__version__),
        "SANITIZE": SANITIZE,
        "CUDA": choice.cuda.version if choice.cuda else None,
        "CUDA_ARCHS": choice.archs,
        "CUDA_REASON": choice.no_cuda,
        "SIMT": SIMT and choice.torch is not None,
    }
    lines = ['"""How this copy of tlfast was built; written by setup.py."""', ""]
    return "\n".join([*lines, *(f"{name} = {value!r}" for name, value in values.items()), ""])


CHOICE = choose()
print(f"tlfast: {in_words(CHOICE)}", flush=True)


class BuildPython(build_py):
    """Adds _build_info.py where no extension is built (build_ext does not run then), and drops a stale extension."""

    def run(self):
        super().run()
        if CHOICE.torch is None:
            folder = ROOT / "tlfast" if self.editable_mode else Path(self.build_lib) / "tlfast"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_info.py").write_text(build_info(CHOICE))
            for stale in (*folder.glob("_C.*.so"), *folder.glob("_disk.*.so")):
                stale.unlink()


COMMANDS = {"build_py": BuildPython}
if CHOICE.torch is not None:
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        """Keeps the object files between builds, apart for each Python, torch and kind of build."""

        kernels = None  # the future of the object of the CUDA kernels

        def finalize_options(self):
            super().finalize_options()
            kind = "-".join([kind_of(CHOICE)] + ["sanitize"] * SANITIZE)
            name = f"{kind}-{sys.implementation.cache_tag}-torch{CHOICE.torch.__version__}"
            self.build_temp = str(Path("build") / name)

        def get_libraries(self, extension):
            """What setuptools asks for when an extension is compiled, before it links."""
            if self.kernels and extension.name == "tlfast._C":
                self.kernels.result()
            return super().get_libraries(extension)

        def run(self):
            info = (ROOT / "tlfast" if self.inplace else Path(self.build_lib) / "tlfast") / "_build_info.py"
            # Another kind of build must be linked anew, also where the module is newer than every source.
            self.force = self.force or not info.is_file() or info.read_text() != build_info(CHOICE)
            engine = next(one for one in self.extensions if one.name == "tlfast._C")
            if SIMT:
                compile_simt(engine, CHOICE)
            if CHOICE.cuda:
                link_cuda(engine, CHOICE)
            # nvcc works beside the C++ compiler: the object of the kernels is asked for when all is linked.
            with ThreadPoolExecutor(1) as beside:
                if CHOICE.cuda:
                    self.kernels = beside.submit(compile_cuda, CHOICE)
                super().run()
                if self.kernels:
                    self.kernels.result()
            info.parent.mkdir(parents=True, exist_ok=True)
            info.write_text(build_info(CHOICE))

    COMMANDS["build_ext"] = BuildNative

setup(ext_modules=[] if CHOICE.torch is None else native_extensions(CHOICE), cmdclass=COMMANDS)
