"""The CUDA step of the build, with toolkits made of shell scripts: what is found, what is refused, what is kept."""

import os
import stat
from pathlib import Path

import cuda_build
import pytest

# What nvcc 13 answers, cut to what is read; $TOP is the folder above bin.
NVCC = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88"; exit 0 ;;
  *--dryrun*) printf '#$ TOP={top}\\n#$ LIBRARIES=  "-L{top}/lib/stubs"\\n' >&2; exit 0 ;;
esac
for word in "$@"; do case "$last $word" in "-o "*) echo made > "$word" ;; esac; last=$word; done
case "$*" in *{refused}*) echo "nvcc fatal   : unsupported" >&2; exit 1 ;; esac
"""


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A checkout with one kernel file, on a machine without CUDA, whose C++ compiler is `cc`."""
    root, programs = tmp_path / "checkout", tmp_path / "programs"
    (root / "csrc" / "kernel").mkdir(parents=True)
    programs.mkdir()
    (root / cuda_build.SOURCE).write_text('#include "view.h"\n#include <cstdint>\n')
    (root / "csrc" / "kernel" / "view.h").write_text('#include "reduce.h"\n')
    (root / "csrc" / "kernel" / "reduce.h").write_text("int reduce;\n")
    (root / "csrc" / "kernel" / "other.h").write_text("int other;\n")
    monkeypatch.setattr(cuda_build, "ROOT", root)
    monkeypatch.setattr(cuda_build, "_candidates", lambda: iter(()))
    for name in ("CUDA_HOME", "CUDA_PATH", "TLFAST_WERROR"):
        monkeypatch.delenv(name, raising=False)
    program(programs / "cc", "#!/bin/sh\n")
    monkeypatch.setenv("CXX", "cc")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(cuda_build.shutil, "which", which(programs))
    return root


def which(folder):
    """Only what lies in ``folder``: this machine's own nvcc must not be found."""
    return lambda name: str(folder / name) if (folder / name).exists() else None


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(home, version="13.0", runtime="lib64", refused="nothing-at-all"):
    """A toolkit in ``home``; its runtime lies in the folder ``runtime``, and nvcc refuses calls with ``refused``."""
    nvcc = program(home / "bin" / "nvcc", NVCC.format(version=version, top=home, refused=refused))
    if runtime:
        (home / runtime).mkdir(parents=True)
        (home / runtime / "libcudart_static.a").write_text("")
    return nvcc


def calls(home):
    return (home / "bin" / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    "listed, archs",
    [
        (None, ("sm_90", "compute_80")),
        (" ", ("sm_90", "compute_80")),
        ("8.0;9.0+PTX", ("sm_80", "sm_90", "compute_90")),
        ("8.6 9.0a, 12.0", ("sm_86", "sm_90a", "sm_120")),
        ("10.0f+PTX;10.0f", ("sm_100f", "compute_100f")),
    ],
)
def test_lists_of_gpus(listed, archs):
    assert cuda_build.parse_archs(listed) == archs


@pytest.mark.parametrize("listed", ["Ampere", "8.0;Hopper+PTX", "90", "sm_90", "9.0b", "native"])
def test_other_lists_are_refused(listed):
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST must hold compute capabilities"):
        cuda_build.parse_archs(listed)


def test_flags_and_words():
    archs = cuda_build.DEFAULT_ARCHS
    assert cuda_build.gencode(archs) == ["-gencode=arch=compute_80,code=[sm_90,compute_80]"]
    assert cuda_build.arch_words(archs) == "sm_90, PTX"
    assert cuda_build.gencode(("sm_80", "sm_90", "compute_90")) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    command = cuda_build.Toolkit("nvcc", "13.0", Path("x"), None).command(archs)
    assert "-fmad=false" in command
    assert not [word for word in command if "fast" in word or "ccbin" in word]


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize("runtime", ["lib64", "lib", "targets/sbsa-linux/lib", "lib/x86_64-linux-gnu"])
def test_a_toolkit_that_is_named(tmp_path, monkeypatch, variable, runtime):
    nvcc = toolkit(tmp_path / "cuda", runtime=runtime)
    monkeypatch.setenv(variable, str(tmp_path / "cuda"))
    found = cuda_build.find_toolkit(cuda_build.DEFAULT_ARCHS)
    assert found == cuda_build.Toolkit(
        str(nvcc), "13.0", tmp_path / "cuda" / runtime / "libcudart_static.a", str(tmp_path / "programs" / "cc")
    )


def test_a_script_on_the_path_that_calls_the_real_one(tmp_path):
    nvcc = toolkit(tmp_path / "cuda")
    script = program(tmp_path / "programs" / "nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    found = cuda_build.find_toolkit(("sm_80",))
    assert (found.nvcc, found.runtime.parents[1]) == (str(script), tmp_path / "cuda")


def test_the_toolkit_that_pip_installs(tmp_path, monkeypatch):
    monkeypatch.undo()
    nvcc = toolkit(tmp_path / "nvidia" / "cu13", runtime="lib")
    (tmp_path / "nvidia" / "cublas").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert next(cuda_build._candidates()) == nvcc


def test_nothing_is_there():
    with pytest.raises(cuda_build.CannotBuildCuda, match=r"^no nvcc on the PATH$"):
        cuda_build.find_toolkit(("sm_80",))


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(runtime=None), "no libcudart_static.a beside .*/nvcc"),
        (dict(version="11.8"), r"nvcc must be 12.0 or newer, got 11.8 \(.*/nvcc\)"),
        (dict(refused="probe"), r"cannot compile build/cuda/probe.cu: nvcc fatal   : unsupported \(see build/cuda/p"),
    ],
)
def test_a_toolkit_that_will_not_do(tmp_path, monkeypatch, options, said):
    toolkit(tmp_path / "cuda", **options)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    with pytest.raises(cuda_build.CannotBuildCuda, match=said):
        cuda_build.find_toolkit(("sm_80",))


def test_a_compiler_that_nvcc_refuses_is_left_to_nvcc(tmp_path, monkeypatch):
    toolkit(tmp_path / "cuda", refused="ccbin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert cuda_build.find_toolkit(("sm_80",)).ccbin is None
    monkeypatch.setenv("CXX", "ccache cc")
    assert cuda_build.find_toolkit(("sm_80",)).ccbin is None


def test_the_object_is_kept_until_something_changes(machine, tmp_path, monkeypatch):
    toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    found = cuda_build.find_toolkit(("sm_80",))
    again = len(calls(tmp_path / "cuda"))

    def compiled(archs=("sm_80",)):
        made, new = cuda_build.compile_kernels(found, archs)
        assert (machine / made).read_text() == "made\n"
        return new

    assert compiled()
    assert not compiled()
    (machine / "csrc" / "kernel" / "other.h").write_text("int changed;\n")
    os.utime(machine / "csrc" / "kernel" / "reduce.h")
    assert not compiled(), "neither a file that is not included nor a new date is a change"
    (machine / "csrc" / "kernel" / "reduce.h").write_text("int changed;\n")
    assert compiled()
    assert compiled(("sm_80", "sm_90"))
    monkeypatch.setenv("TLFAST_WERROR", "1")
    assert compiled(("sm_80", "sm_90"))
    (machine / "build" / "cuda" / "capture_cuda.o").unlink()
    assert compiled(("sm_80", "sm_90"))
    assert len(calls(tmp_path / "cuda")) == again + 5


def test_what_is_included_by_a_flag_counts_too(machine, tmp_path):
    (machine / "simt.h").write_text('#include "csrc/kernel/other.h"\n')
    command = [str(toolkit(tmp_path / "cuda")), "-include", "simt.h"]
    made = cuda_build.FOLDER / "x.o"
    outcomes = [cuda_build.compile_object(command, cuda_build.SOURCE, made) for _ in range(2)]
    (machine / "csrc" / "kernel" / "other.h").write_text("int changed;\n")
    assert [*outcomes, cuda_build.compile_object(command, cuda_build.SOURCE, made)] == [True, False, True]


def test_a_failure_leaves_nothing_that_looks_right(machine, tmp_path, monkeypatch):
    toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    found = cuda_build.find_toolkit(("sm_80",))
    cuda_build.compile_kernels(found, ("sm_80",))
    toolkit(tmp_path / "cuda", runtime=None, refused="capture_cuda")
    (machine / "csrc" / "kernel" / "reduce.h").write_text("int broken\n")
    for _ in range(2):
        with pytest.raises(cuda_build.CannotBuildCuda, match="nvcc fatal"):
            cuda_build.compile_kernels(found, ("sm_80",))
