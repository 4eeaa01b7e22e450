"""What is read from ptxas, and that a spill fails."""

import shutil

import cuda_build
import cuda_machine_code
import cuda_resources
import pytest

COLUMNS = "_ZN6tlfast48_GLOBAL__N__da2f2907_15_capture_cuda_cu_a9a7af3d7columnsIfNS_4bf16ELi2EEEvNS_11CudaCaptureE"
CURSOR = "_ZN6tlfast48_GLOBAL__N__da2f2907_15_capture_cuda_cu_a9a7af3d10set_kernelEPll"
CLEAN = f"""\
ptxas info    : 128 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '{COLUMNS}' for 'sm_80'
ptxas info    : Function properties for {COLUMNS}
    1336 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers, 1336 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 528.245 ms
ptxas info    : Compiling entry function '{CURSOR}' for 'sm_90'
ptxas info    : Function properties for {CURSOR}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
SPILLED = CLEAN.replace(
    "1336 bytes stack frame, 0 bytes spill stores, 0", "64 bytes stack frame, 24 bytes spill stores, 40"
)
CALLED = """\
ptxas info    : Function properties for _ZN6tlfast6calledEv
    32 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
"""
GOOD_CODE = f"\tcode for sm_90\n\t\tFunction : {CURSOR}\n        /*0000*/    EXIT ;    /* 0x0 */\n"
needs_cxxfilt = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt (binutils) is not installed")


def test_numbers_are_read():
    columns, cursor = cuda_resources.parse(CLEAN)
    assert (columns.kernel, columns.arch) == (COLUMNS, "sm_80")
    assert (columns.registers, columns.shared, columns.stack, columns.spilled) == (28, 2048, 1336, 0)
    assert (cursor.arch, cursor.registers, cursor.shared, cursor.stack, cursor.spilled) == ("sm_90", 8, 0, 0, 0)
    assert cuda_resources.spills([columns, cursor]) == []


def test_a_function_that_is_called_counts_for_its_kernel():
    (columns, cursor) = cuda_resources.parse(CLEAN + CALLED)
    assert (columns.spilled, cursor.stack, cursor.spill_stores, cursor.spill_loads) == (0, 32, 8, 4)


@needs_cxxfilt
def test_names_are_short():
    names = cuda_resources.short_names([COLUMNS, CURSOR, "plain"])
    assert names == {COLUMNS: "columns<float, bf16, 2>", CURSOR: "set_kernel", "plain": "plain"}


@needs_cxxfilt
def test_a_line_for_each_kernel():
    both = CLEAN + CLEAN.replace("'sm_80'", "'sm_90'").replace("Used 28", "Used 32").partition(CURSOR)[0]
    lines = cuda_resources.table(cuda_resources.parse(both.rpartition("ptxas info    : Compiling")[0]))
    assert [line.split() for line in lines] == [
        ["|", "sm_80", "|", "sm_90"],
        ["kernel", *["|", "registers", "shared", "stack", "spills"] * 2],
        ["columns<float,", "bf16,", "2>", "|", "28", "2048", "1336", "0", "|", "32", "2048", "1336", "0"],
        ["set_kernel", "|", "|", "8", "0", "0", "0"],
    ]


@needs_cxxfilt
def test_many_kernels_are_shown_by_template(monkeypatch):
    monkeypatch.setattr(cuda_resources, "MOST_LINES", 2)
    bigger = SPILLED.replace("Li2E", "Li3E").replace("Used 28", "Used 30")
    lines = cuda_resources.table(cuda_resources.parse(CLEAN + bigger))
    assert [line.split() for line in lines[2:]] == [
        ["columns<...>", "(2)", "|", "30", "2048", "1336", "64", "|"],
        ["set_kernel", "|", "|", "8", "0", "0", "0"],
    ]


@pytest.mark.parametrize("cut", ["    1336 bytes", "ptxas info    : Used 8", "ptxas info    : Used 28"])
def test_a_kernel_without_numbers_is_refused(cut):
    log = "\n".join(line for line in CLEAN.splitlines() if not line.startswith(cut))
    with pytest.raises(ValueError, match="log must hold the numbers of every kernel, got none for _ZN6tlfast"):
        cuda_resources.parse(log)


def test_a_log_without_kernels_is_refused():
    with pytest.raises(ValueError, match="got none for no kernel at all"):
        cuda_resources.parse("ptxas info    : 128 bytes gmem\n")


@pytest.mark.parametrize("log, status", [(CLEAN, 0), (SPILLED, 1), (CLEAN + CALLED, 1)])
def test_a_spill_fails(log, status, monkeypatch, tmp_path, capsys):
    (tmp_path / "capture_cuda.log").write_text(log)
    toolkit = cuda_build.Toolkit("nvcc", "13.0", tmp_path, None)
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda archs: toolkit)
    monkeypatch.setattr(cuda_build, "compile_kernels", lambda *a: (tmp_path / "capture_cuda.o", False))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cuda_machine_code, "disassemble", lambda made: GOOD_CODE)
    assert cuda_resources.main() == status
    shown = capsys.readouterr()
    assert "csrc/kernel/capture_cuda.cu by CUDA 13.0 for sm_90, PTX: up to date" in shown.out
    assert f"2 kernels, {status} with spills; 0 complaints of the machine code" in shown.out
    assert ("must not spill registers, got" in shown.err) == bool(status)


def test_without_a_toolkit_it_fails(monkeypatch, capsys):
    def absent(archs):
        raise cuda_build.CannotBuildCuda("no nvcc on the PATH")

    monkeypatch.setattr(cuda_build, "find_toolkit", absent)
    assert cuda_resources.main() == 1
    assert capsys.readouterr().err == "cuda-compile: CUDA must be there to compile, got: no nvcc on the PATH\n"


def test_machine_code_that_breaks_a_rule_fails(monkeypatch, tmp_path, capsys):
    (tmp_path / "capture_cuda.log").write_text(CLEAN)
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda archs: cuda_build.Toolkit("nvcc", "13.0", tmp_path, None))
    monkeypatch.setattr(cuda_build, "compile_kernels", lambda *a: (tmp_path / "capture_cuda.o", False))
    monkeypatch.setattr(cuda_machine_code, "disassemble", lambda made: GOOD_CODE.replace("EXIT", "LDL R1, [R2]"))
    assert cuda_resources.main() == 1
    shown = capsys.readouterr()
    assert "2 kernels, 0 with spills; 1 complaints of the machine code" in shown.out
    assert "must keep its arrays in registers, got 1 accesses of local memory." in shown.err


def test_machine_code_that_cannot_be_read_fails(monkeypatch, tmp_path, capsys):
    def fail(made):
        raise cuda_machine_code.NoDisassembler("no cuobjdump")

    (tmp_path / "capture_cuda.log").write_text(CLEAN)
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda archs: cuda_build.Toolkit("nvcc", "13.0", tmp_path, None))
    monkeypatch.setattr(cuda_build, "compile_kernels", lambda *a: (tmp_path / "capture_cuda.o", False))
    monkeypatch.setattr(cuda_machine_code, "disassemble", fail)
    assert cuda_resources.main() == 1
    assert capsys.readouterr().err == "cuda-compile: the machine code must be read, got: no cuobjdump\n"
