"""The CUDA step of the build: find a toolkit, compile the kernels, keep the object; needs no torch and no GPU.

torch's own machinery is not used: it wants a torch that was built with CUDA, and this step works beside any torch,
because the kernels include no header of torch. setup.py links the object; cuda_resources.py reads the log of ptxas.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("csrc/kernel/capture_cuda.cu")
FOLDER = Path("build/cuda")
OBJECT = FOLDER / "capture_cuda.o"
# H100 as machine code, by way of A100's PTX: every other GPU from there on compiles that when it first runs. A second
# architecture would take as long as all other files of the native module together.
DEFAULT_ARCHS = ("sm_90", "compute_80")
SHIM = ("scheduler", "fiber", "shared_memory")  # what tests/simt/simt.h declares
OLDEST = (12, 0)  # the first nvcc that takes -std=c++20


class CannotBuildCuda(Exception):
    """The reason why there will be no CUDA code in this build."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile and link: what `find_toolkit` returns."""

    nvcc: str
    version: str  # "13.0"
    runtime: Path  # libcudart_static.a
    ccbin: str | None  # the host's compiler; None leaves the choice to nvcc

    def command(self, archs: tuple[str, ...]) -> list[str]:
        """The command that compiles for these architectures, without the names of the files."""
        return [
            self.nvcc,
            "-std=c++20",
            "-O3",
            "-fmad=false",  # as -ffp-contract=off on the CPU: no result depends on what the compiler fuses
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
            *[f"-ccbin={self.ccbin}" for _ in range(self.ccbin is not None)],
            *gencode(archs),
            "--threads=2",  # two architectures at a time, where so many are asked for
            "-Xptxas=-v",
        ]


def parse_archs(listed: str | None) -> tuple[str, ...]:
    """The architectures of TORCH_CUDA_ARCH_LIST: ``"8.0;9.0+PTX"`` -> ``("sm_80", "sm_90", "compute_90")``;
    ``DEFAULT_ARCHS`` where it is unset.

    Raises:
        ValueError: for what is not a compute capability.
    """
    words = re.split(r"[;,\s]+", (listed or "").strip())
    if words == [""]:
        return DEFAULT_ARCHS
    archs: list[str] = []
    for word in filter(None, words):
        # As torch writes them: 9.0a is for that chip alone, 10.0f for its family.
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if not found:
            raise ValueError(
                f'TORCH_CUDA_ARCH_LIST must hold compute capabilities such as "8.0;9.0+PTX", got {word!r}. '
                "Give numbers, or unset it for machine code of 9.0 and PTX of 8.0."
            )
        number = "".join(found.groups()[:3])
        archs += [f"sm_{number}", *[f"compute_{number}" for _ in range(bool(found[4]))]]
    return tuple(dict.fromkeys(archs))


def gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's flags for these architectures. Machine code is made by the front end of its own number; that of
    ``DEFAULT_ARCHS`` by the one of the PTX, so that there is one front end."""
    if archs == DEFAULT_ARCHS:
        return [f"-gencode=arch={archs[1]},code=[{','.join(archs)}]"]
    codes: dict[str, list[str]] = {}
    for arch in archs:
        codes.setdefault(arch.partition("_")[2], []).append(arch)
    return [f"-gencode=arch=compute_{number},code=[{','.join(code)}]" for number, code in codes.items()]


def arch_words(archs: tuple[str, ...]) -> str:
    """``("sm_80", "sm_90", "compute_90")`` -> ``"sm_80, sm_90, PTX"``."""
    return ", ".join(dict.fromkeys("PTX" if arch.startswith("compute") else arch for arch in archs))


def find_toolkit(archs: tuple[str, ...]) -> Toolkit:
    """The toolkit of CUDA_HOME, CUDA_PATH, the PATH, pip's packages or the usual place, after a trial of it.

    Raises:
        CannotBuildCuda: with what is missing.
    """
    if not (ROOT / SOURCE).is_file():
        raise CannotBuildCuda(f"{SOURCE} is not there")
    nvcc = _find_nvcc()
    ccbin = _host_compiler()
    release = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]).stdout)
    if release is None:
        raise CannotBuildCuda(f"{nvcc} --version names no release")
    if (int(release[1]), int(release[2])) < OLDEST:
        raise CannotBuildCuda(f"nvcc must be {OLDEST[0]}.{OLDEST[1]} or newer, got {release[1]}.{release[2]} ({nvcc})")
    runtime = _find_runtime(nvcc)
    first = ""
    for compiler in dict.fromkeys((ccbin, None)):  # a compiler that nvcc does not support, then the one it takes itself
        toolkit = Toolkit(nvcc, f"{release[1]}.{release[2]}", runtime, compiler)
        probe = FOLDER / "probe.cu"
        (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
        (ROOT / probe).write_text("__global__ void probe() {}\n")
        try:
            compile_object(toolkit.command(archs), probe, FOLDER / "probe.o")
            return toolkit
        except CannotBuildCuda as error:
            first = first or str(error)
    raise CannotBuildCuda(first)


def compile_kernels(toolkit: Toolkit, archs: tuple[str, ...]) -> tuple[Path, bool]:
    """The object file of the kernels, and whether it had to be made; the log of ptxas lies beside it (.log)."""
    flags = ["-Werror=all-warnings"] if os.environ.get("TLFAST_WERROR") == "1" else []
    return OBJECT, compile_object([*toolkit.command(archs), *flags], SOURCE, OBJECT)


def compile_for_cpu(command: list[str]) -> Path:
    """A library of the kernels as C++ and of the shim in tests/simt that runs them, by this C++ compiler.

    A library of its own, since to the shim every thread_local variable around it is shared memory of a kernel.
    """
    shim = [*command, "-O2", "-fPIC", "-fvisibility=default", "-Itests/simt"]
    shim += ["-fno-extern-tls-init"]  # shared memory needs no constructor
    kernels = [*shim, "-x", "c++", "-include", "tests/simt/simt.h"]
    kernels += ["-fsanitize=alignment", "-Wno-unknown-pragmas"]  # an address as a GPU wants it; nvcc's unroll
    sources = {SOURCE: kernels} | {Path("tests/simt") / f"{name}.cpp": shim for name in SHIM}
    made = [Path("build/simt/objects") / f"{source.stem}.o" for source in sources]
    for (source, by), target in zip(sources.items(), made, strict=True):
        compile_object(by, source, target)
    library = ROOT / "build/simt/libtlfast_simt.so"
    linked = _run([*command, "-shared", *map(str, made), "-o", str(library)])
    if linked.returncode != 0:
        raise CannotBuildCuda(f"{command[0]} cannot link {library}: {linked.stderr.strip()}")
    return library


def compile_object(command: list[str], source: Path, target: Path) -> bool:
    """Compile ``source`` (a path in the repository) unless ``target`` is of the same command and text; True if it ran.

    Raises:
        CannotBuildCuda: if the compiler fails; the text holds its first error.
    """
    import fcntl  # here: setup.py imports this file on every system, and compiles on some

    (ROOT / target).parent.mkdir(parents=True, exist_ok=True)
    with (ROOT / target).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make setup` begins with the kernels, before setup.py asks for them
        return _compile_alone(command, source, target)


def _compile_alone(command: list[str], source: Path, target: Path) -> bool:
    used = hashlib.sha256()
    before = [Path(name) for word, name in itertools.pairwise(command) if word == "-include"]
    for path in sorted(_included(source, *before)):
        used.update(path.encode() + (ROOT / path).read_bytes())
    stamp = json.dumps({"command": command, "sources": used.hexdigest()}, indent=1)
    note, log, made = ((ROOT / target).with_suffix(suffix) for suffix in (".json", ".log", ".new.o"))
    if (ROOT / target).is_file() and note.is_file() and note.read_text() == stamp:
        return False
    note.unlink(missing_ok=True)
    done = _run([*command, "-c", str(source), "-o", str(made)])
    log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        first = next((line for line in said if "error" in line or "fatal" in line), " ".join(said[:1]))
        raise CannotBuildCuda(f"{command[0]} cannot compile {source}: {first.strip()} (see {log.relative_to(ROOT)})")
    made.replace(ROOT / target)
    note.write_text(stamp)
    return True


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _included(*sources: Path) -> set[str]:
    """``sources`` and all that they reach by #include "..."."""
    found: set[str] = set()
    waiting = list(sources)
    while waiting:
        path = waiting.pop()
        if str(path) not in found and (ROOT / path).is_file():
            found.add(str(path))
            text = (ROOT / path).read_text(errors="replace")
            waiting += [path.parent / name for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE)]
    return found


def _candidates() -> Iterator[Path]:
    """Where nvcc may be beside the PATH: the toolkit that pip installs, and where NVIDIA's installer puts it."""
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        yield from sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)
    yield Path("/usr/local/cuda/bin/nvcc")


def _find_nvcc() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise CannotBuildCuda(f"no bin/nvcc in {variable}={home}")
            return str(nvcc)
    if on_path := shutil.which("nvcc"):
        return on_path  # maybe a script that calls the real one: so the toolkit is asked where its parts are
    for nvcc in _candidates():
        if os.access(nvcc, os.X_OK):
            return str(nvcc)
    raise CannotBuildCuda("no nvcc on the PATH")


def _host_compiler() -> str | None:
    """The compiler of the C++ files, if it is one word: nvcc takes no flags with it."""
    words = shlex.split(os.environ.get("CXX") or "c++")
    return shutil.which(words[0]) if len(words) == 1 else None


def _find_runtime(nvcc: str) -> Path:
    """libcudart_static.a, in the folders that nvcc itself would link from and in the usual ones beside them."""
    said = _run([nvcc, "--dryrun", "-x", "cu", os.devnull])
    folders = [Path(name) for name in re.findall(r'"-L([^"]+)"', said.stdout + said.stderr)]
    if top := re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.MULTILINE):
        home = Path(top[1].strip())
        folders += [home / "lib64", home / "lib", *home.glob("targets/*/lib"), *home.glob("lib/*-linux-gnu")]
    folders.append(Path(nvcc).resolve().parents[1] / "lib64")
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return (folder / "libcudart_static.a").resolve()
    raise CannotBuildCuda(f"no libcudart_static.a beside {nvcc}")


if __name__ == "__main__" and os.environ.get("TLFAST_BUILD", "auto") in ("", "auto", "cuda"):
    archs = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    compile_kernels(find_toolkit(archs), archs)  # what can't be done here, setup.py says
