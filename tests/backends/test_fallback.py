"""The pure-Python fallback: when it runs, how it says so, and that it is never silent. (Trap 29.)"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from backends import usable
from models import chain

import tlfast
from tlfast.dataset.write import native as native_writer

RUN = """
import torch

def rows(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    with tlfast.capture(model, ["0", "1"], rows=3, **options) as cap:
        (model(torch.ones(2, 4)) * torch.arange(6.0).reshape(2, 3)).sum().backward()
    return cap

def fails(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error")
"""
MISSING = """
import sys
sys.modules["tlfast._C"] = None
import tlfast
import tlfast.backends.choice
"""


def run(*parts, **environment):
    """Run code in a fresh interpreter, in which every warning is shown; its output as lines, and its warnings."""
    code = "\n".join(textwrap.dedent(part) for part in parts)
    env = {k: v for k, v in os.environ.items() if k != "TLFAST_REQUIRE_NATIVE"} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(Path(tlfast.__file__).parents[1]), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if "Warning: tlfast " in line]


def test_native_code_missing():
    out, warned = run(
        MISSING,
        RUN,
        """
        print(tlfast.backend())
        cap = rows()
        print(cap.backend, cap.rows, torch.equal(cap["1"], torch.arange(6.0).reshape(2, 3)))
        rows()
        tlfast.reduce_into(torch.empty(2, 4), torch.ones(2, 3, 4))
        print(fails(rows, backend="native"))
        print(rows(backend="python").backend)
        """,
    )
    reason = out[0].removeprefix("python: ")
    assert out[0] != reason
    assert out[1:] == [
        "python 2 True",
        f'capture: backend must be usable, got native: {reason}. Pass backend="auto".',
        "python",
    ]
    assert len(warned) == 1, "one warning in all"
    assert warned[0].endswith(f"tlfast runs in pure Python, slower and with the same results: {reason}")


def test_native_code_required():
    out, warned = run(
        MISSING,
        RUN,
        """
        print(fails(rows))
        print(fails(tlfast.reduce_into, torch.empty(2, 4), torch.ones(2, 3, 4)))
        print(rows(backend="python").backend)
        print(tlfast.backend())
        """,
        TLFAST_REQUIRE_NATIVE="1",
    )
    reason = out[3].removeprefix("python: ")
    text = f"tlfast: the native code must be usable (TLFAST_REQUIRE_NATIVE=1), got {reason}. "
    text += "Run pip install --no-build-isolation -e . again, or unset the variable."
    assert out[:3] == [text, text, "python"]
    assert not warned


OTHER_TORCH = """
import sys, types
info = types.ModuleType("tlfast._build_info")
info.BUILT, info.REASON, info.TORCH, info.SANITIZE = True, "auto", "BUILT_FOR", False
sys.modules["tlfast._build_info"] = info
import tlfast
"""


@pytest.mark.parametrize("built_for", ["2.11.0", "1.13.1+cpu"])
def test_trap_29_built_for_another_torch(built_for):
    out, warned = run(
        OTHER_TORCH.replace("BUILT_FOR", built_for),
        RUN,
        """
        print(tlfast.backend())
        print(rows().backend)
        print("tlfast._C" in sys.modules, hasattr(torch.ops.tlfast, "capture"))
        """,
    )
    assert out == [
        f"python: built for torch {built_for}, but torch {torch.__version__} is running",
        "python",
        "False False",
    ]
    assert len(warned) == 1


WRITE = """
from tlfast.dataset import DatasetWriter, Example, Plan, open_dataset
from tlfast.dataset.write import native as native_writer

def write(out, **options):
    writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (4,))}, plan=Plan(1, 1), **options)
    writer.write_unit(Plan(1, 1).unit(0), {"h": torch.ones(1, 4)}, [Example(0, [1], "a", 0, 1)])
    return open_dataset(out).verify().ok
"""


def test_a_dataset_is_written_natively_beside_another_torch(tmp_path, native):
    out, warned = run(
        OTHER_TORCH.replace("BUILT_FOR", "2.11.0"),
        RUN,
        WRITE,
        f"""
        print(write({str(tmp_path / "d")!r}, backend="native"), native_writer.writer().partition(" by")[0])
        print(rows().backend, "tlfast._C" in sys.modules, "tlfast._disk" in sys.modules)
        """,
    )
    assert out == ["True native (crc32c", "python False True"]
    assert len(warned) == 1, "of the capture alone"


def test_the_native_writer_needs_no_torch(native):
    out, _ = run(
        f"""
        import sys
        from importlib.util import module_from_spec, spec_from_file_location
        spec = spec_from_file_location("_disk", {native_writer.loaded().__file__!r})
        disk = module_from_spec(spec)
        spec.loader.exec_module(disk)
        print(hex(disk.crc32c(b"123456789", 0)), "torch" in sys.modules)
        print([line for line in open("/proc/self/maps") if "torch" in line or "libc10" in line])
        """
    )
    assert out == ["0xe3069283 False", "[]"]


def test_a_native_writer_that_is_missing_says_so(tmp_path):
    out, warned = run(
        'import sys; sys.modules["tlfast._disk"] = None; import tlfast',
        RUN,
        WRITE,
        f"""
        print(write({str(tmp_path / "d")!r}), write({str(tmp_path / "e")!r}))
        print(native_writer.writer())
        print(fails(write, {str(tmp_path / "f")!r}, backend="native"))
        """,
    )
    reason = out[1].removeprefix("python: ")
    assert out[0] == "True True"
    assert out[2] == f'DatasetWriter: backend must be usable, got native: {reason}. Pass backend="auto".'
    does = "runs" if tlfast.backend().startswith("python") else "writes"
    assert [line.partition("Warning: ")[2] for line in warned] == [
        f"tlfast {does} in pure Python, slower and with the same results: {reason}"
    ]
    assert not (tmp_path / "f").exists()


def test_trap_29_the_module_itself_knows_its_torch():
    # Without the note of the build, the version that was compiled in decides.
    out, _ = run(
        """
        import sys, types
        import tlfast.backends.choice
        fake = types.ModuleType("tlfast._C")
        fake.TORCH_VERSION = "2.10"
        sys.modules["tlfast._C"] = tlfast._C = fake
        sys.modules["tlfast._build_info"] = None
        tlfast.backends.choice._load.cache_clear()
        del tlfast._build_info
        """,
        """
        print(tlfast.backend())
        """,
    )
    assert out == [f"python: built for torch 2.10, but torch {torch.__version__} is running"]


def test_a_module_that_can_not_be_loaded_says_why(tmp_path):
    # A copy of the package with a broken library: the reason is the loader's.
    import shutil

    package = tmp_path / "tlfast"
    shutil.copytree(Path(tlfast.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.abi3.so").write_bytes(b"not a library")
    out, _ = run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import tlfast
        print(tlfast.__file__)
        print(tlfast.backend())
        """
    )
    assert out[0].startswith(str(tmp_path))
    assert out[1].startswith("python: ImportError: ")
    assert "_C.abi3.so" in out[1]


@pytest.mark.sanitize
def test_native_code_runs_by_itself(recwarn):
    usable("native")
    assert tlfast.backend().startswith("native (cpu")
    setup = chain()
    with tlfast.capture(setup.model, "hook", rows=4) as cap:
        setup.loss().backward()
    assert cap.backend == "native"
    with tlfast.capture(setup.model, "hook", rows=4, backend="python") as cap:
        setup.loss().backward()
    assert cap.backend == "python"
    assert not [w for w in recwarn if "tlfast" in str(w.message)]


def test_other_devices_run_in_python_and_say_so(monkeypatch):
    from tlfast.backends import choice

    monkeypatch.delenv("TLFAST_REQUIRE_NATIVE", raising=False)
    choice.tell.cache_clear()
    with pytest.warns(
        UserWarning, match="tlfast runs in pure Python, slower .*: the native code runs on cpu and cuda, and capture"
    ):
        assert choice.pick_native("capture", "auto", {"cpu", "meta"}) is None
    assert choice.pick_native("capture", "auto", {"cpu", "meta"}) is None, "and once is enough"
    with pytest.raises(RuntimeError) as error:
        choice.pick_native("capture", "native", {"meta", "cpu"})
    assert str(error.value) == (
        "capture: backend must be usable, got native: the native code runs on cpu and cuda, and capture is on meta. "
        'Pass backend="python" or "auto".'
    )
    monkeypatch.setenv("TLFAST_REQUIRE_NATIVE", "1")
    choice.tell.cache_clear()
    with pytest.raises(
        RuntimeError, match=r"tlfast: the native code must be usable \(TLFAST_REQUIRE_NATIVE=1\), got the"
    ):
        choice.pick_native("capture", "auto", {"meta"})
    assert choice.pick_native("capture", "python", {"meta"}) is None
    choice.tell.cache_clear()


def test_both_backends_are_tested_here_if_they_must_be():
    if os.environ.get("TLFAST_REQUIRE_NATIVE") == "1":
        assert tlfast.backend().startswith("native"), tlfast.backend()
    else:
        assert tlfast.backend().split()[0] in ("native", "python:")
