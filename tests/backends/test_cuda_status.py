"""What is said about CUDA on machines that this one is not: every cause has words of its own."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from native_fakes import built_with, native

import tlfast
from tlfast.backends import choice, cuda_status

NO_NVCC = dict(CUDA=None, CUDA_ARCHS=(), CUDA_REASON="no nvcc on the PATH")
OLD = dict(error=35, message="CUDA driver version is insufficient for CUDA runtime version")
NVRM = "NVRM version: NVIDIA UNIX {} 535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12.2.0\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with torch for CUDA 13, tlfast built for the default GPUs, and a driver that shows no number."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cuda_status, "_DRIVER_FILE", tmp_path / "version")
    built_with(monkeypatch)


def said(module):
    return list(cuda_status.diagnose(module))


def test_usable():
    assert cuda_status.missing(native()) == ""
    assert cuda_status.describe(native()) == "cpu avx2, cuda sm_90"
    assert cuda_status.describe(native(gpus=((9, 0), (8, 0), (9, 0)))) == "cpu avx2, cuda sm_80 sm_90"
    assert said(native()) == ["built with 13.0 for sm_80, sm_90, PTX; driver for CUDA 13.0; sm_90"]


def test_not_built(monkeypatch):
    built_with(monkeypatch, **NO_NVCC)
    module = native(built=False)
    assert cuda_status.missing(module) == "built without CUDA: no nvcc on the PATH"
    assert cuda_status.describe(module) == "cpu, avx2; cuda: built without CUDA: no nvcc on the PATH"
    assert said(module) == ["not built: no nvcc on the PATH; install the CUDA toolkit and build again"]
    built_with(monkeypatch, **{**NO_NVCC, "CUDA_REASON": "TLFAST_BUILD=cpu"})
    assert said(module) == ["not built: TLFAST_BUILD=cpu; unset it and build again"]


def test_neither_torch_nor_the_build_has_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    built_with(monkeypatch, **NO_NVCC)
    assert cuda_status.describe(native(built=False)) == "cpu, avx2"
    assert said(native(built=False)) == [
        "not built: no nvcc on the PATH; install the CUDA toolkit and build again",
        "this torch is a CPU build; tensors can't be on a GPU",
    ]


def test_no_native_code():
    assert said(None) == ["not built: there is no native code"]


def test_no_driver():
    module = native(**OLD, driver=0)
    assert cuda_status.describe(module) == "cpu, avx2; cuda: no driver is installed"
    assert said(module) == ["built with 13.0 for sm_80, sm_90, PTX; no driver is installed"]


@pytest.mark.parametrize("kernel_module", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_an_old_driver(kernel_module):
    module = native(**OLD, driver=12020)
    assert cuda_status.missing(module) == "driver for CUDA 12.2 found, 13.0 (driver 580 or newer) wanted"
    cuda_status._DRIVER_FILE.write_text(NVRM.format(kernel_module))
    assert cuda_status.missing(module) == "driver 535.104.05 (CUDA 12.2) found, 13.0 (driver 580 or newer) wanted"
    older = native(**OLD, driver=11040, runtime=12080)
    assert cuda_status.missing(older) == "driver 535.104.05 (CUDA 11.4) found, 12.8 (driver 525 or newer) wanted"
    unknown = native(**OLD, driver=13000, runtime=14010)
    assert cuda_status.missing(unknown) == "driver 535.104.05 (CUDA 13.0) found, 14.1 wanted"


@pytest.mark.parametrize("module", [native(error=100, message="no CUDA-capable device is detected"), native(gpus=())])
def test_no_device(module, monkeypatch):
    assert cuda_status.missing(module) == "no GPU was found"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_status.missing(module) == "no GPU is visible (CUDA_VISIBLE_DEVICES='')"


def test_forked():
    module = native(error=3, message="initialization error")
    assert "forked from one that has used it; start it with spawn" in cuda_status.missing(module)


def test_any_other_answer():
    assert cuda_status.missing(native(error=999, message="unknown error")) == "CUDA answers error 999: unknown error"


def test_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_status.missing(native()) == "this torch is a CPU build; tensors can't be on a GPU"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda_status.missing(native()) == "this torch is built for ROCm"


@pytest.mark.parametrize(
    "archs, runs, does_not",
    [
        (("sm_80", "sm_90", "compute_90"), [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 0), (7, 5)]),
        (("sm_90", "compute_80"), [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 0), (7, 5)]),
        (("sm_80",), [(8, 0), (8, 6)], [(9, 0), (7, 5)]),
        (("sm_86",), [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (("sm_90a", "compute_90a"), [(9, 0)], [(8, 0), (10, 0)]),
        (("sm_100f",), [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (("compute_120",), [(12, 0), (12, 1)], [(10, 0), (11, 0)]),
    ],
)
def test_which_gpus_a_build_runs_on(monkeypatch, archs, runs, does_not):
    built_with(monkeypatch, CUDA_ARCHS=archs)
    for gpu in runs:
        assert cuda_status.missing(native(gpus=(gpu,))) == "", gpu
    for gpu in does_not:
        assert f'build again with TORCH_CUDA_ARCH_LIST="{gpu[0]}.{gpu[1]}"' in cuda_status.missing(native(gpus=(gpu,)))
        assert cuda_status.missing(native(gpus=(gpu, runs[0]))) == "", "one GPU that does is enough"


def test_a_gpu_that_the_build_leaves_out():
    assert cuda_status.missing(native(gpus=((7, 0),))) == (
        "built for sm_80, sm_90, PTX, and the GPUs here are sm_70; "
        'build again with TORCH_CUDA_ARCH_LIST="7.0"'
    )  # fmt: skip


def test_kernels_on_the_cpu():
    module = native(simt=True, gpus=())
    assert cuda_status.missing(module) == ""
    assert cuda_status.describe(module) == "cpu avx2, cuda simt"
    assert said(module) == ["the kernels run on the CPU, for tests (TLFAST_SIMT=1)"]


def test_backend_and_doctor_say_it(monkeypatch):
    from tlfast.commands import doctor

    module = native(**OLD, driver=0)
    monkeypatch.setattr(choice, "_load", lambda: (module, ""))
    assert tlfast.backend() == "native (cpu, avx2; cuda: no driver is installed)"
    assert "cuda          built with 13.0 for sm_80, sm_90, PTX; no driver is installed" in list(doctor.diagnose())


def test_doctor_survives_a_driver_that_torch_refuses(monkeypatch):
    from tlfast.commands import doctor

    def refused(number):
        raise RuntimeError("The NVIDIA driver on your system is too old\nfor this torch")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", refused)
    assert "gpus          0 (The NVIDIA driver on your system is too old)" in list(doctor.diagnose())


@pytest.mark.simt
def test_the_build_here_answers(monkeypatch):
    """The real module: its note and what is compiled into it are of one mind, and no driver is an answer too."""
    monkeypatch.undo()
    module = choice.loaded()
    if module is None:
        pytest.skip(tlfast.backend())
    info = importlib.import_module("tlfast._build_info")
    status = module.cuda_status()
    assert list(status) == ["built", "simt", "error", "message", "n_devices", "driver", "runtime"]
    assert status["built"] == (info.CUDA is not None or info.SIMT)
    assert status["simt"] == info.SIMT
    assert (info.CUDA_REASON == "") == (info.CUDA is not None)
    assert bool(status["error"]) == bool(status["message"])
    if info.CUDA:
        assert f"{status['runtime'] // 1000}." == info.CUDA[: info.CUDA.index(".") + 1]
    if not status["simt"]:
        with pytest.raises(RuntimeError, match="cuda_capability: device must be a visible GPU, got 4096"):
            module.cuda_capability(4096)


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of Linux tells what it looks for")
def test_the_import_asks_no_driver():
    """The driver's library is looked for when somebody asks, not before: until then a fork may still use CUDA."""
    code = """
import sys, torch
def mark(text): print(f"@{text}@", file=sys.stderr, flush=True)
mark("torch is there")
import tlfast
mark("tlfast is there")
tlfast.backend()
from tlfast.backends import choice
module = choice.loaded()
print(int(module is not None and module.cuda_status()["built"] and not module.cuda_status()["simt"]))
"""
    env = os.environ | {"LD_DEBUG": "libs"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    before, _, rest = done.stderr.partition("@torch is there@")
    by_import, _, by_question = rest.partition("@tlfast is there@")
    assert "libtorch_cpu.so" in before, "the loader must tell what it loads, or this test sees nothing"
    assert "libcuda.so" not in by_import
    if int(done.stdout) and "libcuda.so" not in before:
        assert "libcuda.so" in by_question
