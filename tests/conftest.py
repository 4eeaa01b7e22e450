"""What all tests share: which backend runs, in which attachment, on how many threads, with which seed."""

import importlib
import importlib.util
import os
import random
import signal
import warnings
from zlib import crc32

import pytest
from hypothesis import settings

# Threads of torch that wait for each other sleep: on a busy machine one that spins keeps the other from its core.
# OpenMP reads this when torch is loaded; a user's own choice stands.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from backends import ATTACHMENTS, usable

import tlfast

# What a user's machine tells libraries, clusters, clouds and compilers by variables doesn't change what is tested.
# Libraries read some of it when they are imported, which no import above does; processes that tests start don't inherit
# it either.
_FOREIGN = (
    "AWS_", "HF_", "HUGGING_FACE_", "HUGGINGFACE_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "NCCL_", "RANK",
    "RAY_", "SLURM_", "TORCHELASTIC_", "TRANSFORMERS_", "WORLD_SIZE",
    "MAX_JOBS", "TLFAST_BUILD", "TLFAST_SANITIZE", "TLFAST_SIMT", "TLFAST_WERROR", "TORCH_CUDA_ARCH_LIST",  # of builds
)  # fmt: skip
for _name in [name for name in os.environ if name.startswith(_FOREIGN)]:
    del os.environ[_name]

# A shell's job in the background ignores Ctrl-C, and so would the processes that tests start to interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run and no time limits: a test fails because the code is wrong, not because of the day.
settings.register_profile("tlfast", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("tlfast")

# These tests need a library that a machine without a network may lack.
NEEDS = {
    "tyro": (
        "test_cli.py", "test_cli_refusals.py", "test_killed.py", "test_demo.py", "test_device_map.py",
        "test_ray.py", "test_torchrun.py", "test_unit_ranges.py",
    ),
    "accelerate": ("test_device_map.py",),
    "ray": ("test_ray.py",),
}  # fmt: skip


def pytest_addoption(parser):
    text = "run the files in a random order, drawn from this number"
    parser.addoption("--random-files", type=int, metavar="SEED", help=text)
    text = "of the tests that take long also a thirtieth, drawn from this word"
    parser.addoption("--drawn", metavar="WORD", help=text)
    text = "of all tests one in so many, drawn from the word of --drawn"
    parser.addoption("--one-in", type=int, default=1, metavar="N", help=text)


def pytest_collection_modifyitems(config, items):
    if (seed := config.option.random_files) is not None:
        files = sorted({item.path for item in items})
        random.Random(seed).shuffle(files)
        place = {path: number for number, path in enumerate(files)}
        items.sort(key=lambda item: place[item.path])
    asked, word = config.option.markexpr, config.option.drawn
    left_out = {item for item in items if "every_model" not in asked and item.get_closest_marker("every_model")}
    if "long" not in asked and "peers" not in asked:
        long = {item for item in items if item.get_closest_marker("long")}
        drawn = {item for item in long if word is not None and crc32(f"{word} {item.name}".encode()) % 30 == 0}
        left_out |= long - drawn
    if (n := config.option.one_in) != 1:
        if word is None or n < 1:
            raise pytest.UsageError(f"--one-in must be a positive number beside --drawn, got {n}. Add --drawn WORD.")
        left_out |= {item for item in items if crc32(f"{word} {item.nodeid}".encode()) // 30 % n}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    for library in (name for name in NEEDS if importlib.util.find_spec(name) is None):
        absent = pytest.mark.skip(reason=f"{library} is not installed")
        for item in items:
            if item.path.name in NEEDS[library]:
                item.add_marker(absent)


def why_not(library):
    """Why a module can't be imported, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            importlib.import_module(library)
    except ImportError as error:
        return f"{library} can't be imported: {error}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for library in {name for mark in item.iter_markers("peers") for name in mark.args}:
        if reason := why_not(library):
            if os.environ.get("TLFAST_REQUIRE_PEERS") == "1":
                pytest.fail(f"TLFAST_REQUIRE_PEERS=1, but {reason}")
            pytest.skip(reason)


def pytest_configure(config):
    if os.environ.get("TLFAST_REQUIRE_NATIVE") != "1" and not tlfast.backend().startswith("native"):
        # Without native code its one warning is right; every other warning stays an error.
        config.addinivalue_line("filterwarnings", "ignore:tlfast (runs|writes) in pure Python")
    for variable, wanted, target in (("SANITIZED", "SANITIZE", "sanitize"), ("SIMT", "SIMT", "simt")):
        if os.environ.get(f"TLFAST_EXPECT_{variable}") == "1":
            from tlfast import _build_info

            if not getattr(_build_info, wanted):
                text = f"tests: tlfast must be the build of make {target}, got {tlfast.__file__}. Run make {target}."
                pytest.exit(text, 1)


@pytest.fixture(params=["python", pytest.param("native", marks=pytest.mark.sanitize)])
def backend(request):
    """Each of the two implementations."""
    return usable(request.param)


@pytest.fixture
def native():
    """The native backend alone."""
    return usable("native")


@pytest.fixture
def cuda(request):
    """A CUDA device; skips where there is none, and fails if there must be one."""
    if request.node.get_closest_marker("gpu") is None:
        pytest.fail("a test on a CUDA device must be marked gpu, or tools/gpu_check.sh leaves it out")
    try:
        return torch.empty(0, device="cuda").device
    except (RuntimeError, AssertionError) as error:
        reason = f"no CUDA device: {str(error).splitlines()[0]}"
    if os.environ.get("TLFAST_REQUIRE_CUDA") == "1":
        pytest.fail(f"TLFAST_REQUIRE_CUDA=1, but there is {reason}")
    return pytest.skip(reason)


@pytest.fixture(params=ATTACHMENTS)
def attach(request):
    """Each of the two ways to sit on a point."""
    return request.param


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
