"""Kernels with a mistake: the SIMT shim catches each of them, and goes on after it."""

import ctypes
import os

import numpy as np
import pytest
import simt_build

LAUNCH_FAILURE = 719
# The order of `Mistake` in broken_kernels.cu; what the error says; threads to launch.
DIVERGENT = "simt: divergent barrier: all threads must arrive at one __syncthreads, got "
MASK = "simt: mask must name lanes that come to the same call, got "
MISTAKES = {
    "barrier in a branch": (DIVERGENT, 64),
    "barrier for some": (DIVERGENT + "thread 0 at __syncthreads, broken_kernels.cu:", 64),
    "barrier after a return": (DIVERGENT, 64),
    "barrier against a shuffle": (DIVERGENT + "thread 3 at __syncthreads, broken_kernels.cu:", 32),
    "a lane that is gone": (MASK + "0xffffffff of thread 0 at __shfl_down_sync, broken_kernels.cu:", 64),
    "a lane of no thread": (MASK + "0xffffffff of thread 32 at __shfl_xor_sync, broken_kernels.cu:", 40),
    "a lane at another call": (MASK + "0xffffffff of thread 0 at __ballot_sync, broken_kernels.cu:", 64),
    "a lane with another mask": (MASK + "0xffffffff of thread 16 at __shfl_sync, broken_kernels.cu:", 64),
    "a caller that isn't in its mask": (
        "simt: mask must name its caller, got 0x7fffffff of thread 31 at __syncwarp",
        64,
    ),
    "a width of three": ("simt: width must be a power of two up to 32, got 3. Leave it out.", 32),
    "a store behind shared memory": ("simt: a block must stay within its 256 bytes of dynamic shared memory, got ", 64),
}
NONE = len(MISTAKES)


@pytest.fixture(scope="module")
def broken():
    loaded = ctypes.CDLL(str(simt_build.library("broken_kernels.cu")))
    loaded.simt_message.restype = ctypes.c_char_p
    return loaded


def run(broken, order, number, n):
    broken.simt_set_order(order)
    out = np.zeros(1024, np.float32)
    error = broken.run_mistaken(ctypes.c_void_p(out.ctypes.data), n, number)
    return error, out


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_launch(broken, mistake, order):
    text, n = MISTAKES[mistake]
    assert run(broken, order, list(MISTAKES).index(mistake), n)[0] == LAUNCH_FAILURE
    assert broken.simt_message().decode().startswith(text)
    error, out = run(broken, order, NONE, 64)
    assert error == 0
    assert out[:64].tolist() == [t + 1 if t % 32 != 31 else t for t in range(64)]


def test_both_sides_of_a_divergence_are_named(broken):
    run(broken, 0, 0, 64)
    text = broken.simt_message().decode()
    assert text.count("broken_kernels.cu:") == 2
    assert "got thread 0 at " in text
    assert "and thread 40 at " in text
    run(broken, 0, 1, 64)
    assert "and thread 32 gone. " in broken.simt_message().decode()


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_a_missing_barrier_is_seen(broken, n):
    numbers = np.random.default_rng(0).integers(-1000, 1000, n).astype(np.float32)  # sums of them are exact

    def results(barrier):
        found = set()
        for order in range(6):
            broken.simt_set_order(order)
            out = np.zeros(1, np.float32)
            args = [ctypes.c_void_p(a.ctypes.data) for a in (out, numbers)]
            assert broken.run_reduce(*args, n, barrier) == 0
            found.add(out.item())
        return found

    assert results(1) == {numbers.sum()}
    assert results(0) != {numbers.sum()}


PROGRAM = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print("error", library.run_store_all(int(sys.argv[2]), 64), library.run_mistaken(None, 32, 99), flush=True)
"""


def test_a_store_out_of_bounds_is_seen_by_address_sanitizer():
    path = str(simt_build.library("broken_kernels.cu", sanitize=True))
    fine = simt_build.run_sanitized(PROGRAM, path, "64")
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "error 0 0\n", "")
    wrong = simt_build.run_sanitized(PROGRAM, path, "63")
    assert wrong.returncode != 0
    assert "heap-buffer-overflow" in wrong.stderr
    assert "store_all" in wrong.stderr
    assert wrong.stdout == ""


SHIM_UNDER_ASAN = """
import ctypes, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.simt_message.restype = ctypes.c_char_p
out = np.zeros(1024, np.float32)
for order in range(6):
    library.simt_set_order(order)
    for mistake in (0, 3, 4, 6, 11):
        print(order, mistake, library.run_mistaken(ctypes.c_void_p(out.ctypes.data), 64, mistake), flush=True)
print("now", flush=True)
library.run_mistaken(ctypes.c_void_p(out.ctypes.data), 64, 10)
"""


def test_fibers_under_address_sanitizer():
    done = simt_build.run_sanitized(SHIM_UNDER_ASAN, str(simt_build.library("broken_kernels.cu", sanitize=True)))
    want = [f"{order} {m} {0 if m == NONE else LAUNCH_FAILURE}" for order in range(6) for m in (0, 3, 4, 6, NONE)]
    assert done.stdout.split("\n") == [*want, "now", ""], done.stderr
    assert "use-after-poison" in done.stderr, "behind the dynamic shared memory"
    assert "WARNING" not in done.stderr


def test_a_library_is_built_once(tmp_path, monkeypatch):
    first = simt_build.library("broken_kernels.cu")
    before = first.stat().st_mtime_ns
    assert simt_build.library("broken_kernels.cu") == first
    assert first.stat().st_mtime_ns == before
    source = tmp_path / "broken_kernels.cu"
    source.write_text((simt_build.HERE / "broken_kernels.cu").read_text() + "// changed\n")
    monkeypatch.setattr(simt_build, "CACHE", tmp_path / "cache")
    second = simt_build.library(str(source))
    assert second.name != first.name
    assert os.listdir(tmp_path / "cache") == [second.name]
