"""What setup.py builds, what it refuses, and what it says about both."""

import os
import re
import shutil
import tarfile
import zipfile

import pytest
from fresh_python import ROOT, run

import tlfast


@pytest.fixture
def source(tmp_path):
    """A copy of what setup.py reads: a build must not touch this checkout."""
    for name in ("pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("# tlfast\n")
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT / "tlfast", tmp_path / "tlfast", ignore=ignored)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=ignored)
    return tmp_path


def test_the_source_archive_can_build_itself(source):
    done = run("setup.py", "-q", "sdist", folder=source, TLFAST_BUILD="none", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    sources = {"csrc/python/module.cpp", "csrc/kernel/view.h", "tlfast/_C.pyi", "tlfast/_disk.pyi"}
    assert {"setup.py", "tools/cuda_build.py", *sources} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*")} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.py"))]


def test_wheel_without_native_code(source):
    command = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    done = run(*command, folder=source, TLFAST_BUILD="none", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = archive.read("tlfast/_build_info.py").decode()
    assert wheel.name == f"tlfast-{tlfast.__version__}-py3-none-any.whl"
    assert {"tlfast/py.typed", "tlfast/_build_info.pyi", "tlfast/_C.pyi", "tlfast/_disk.pyi"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names} == {"tlfast", f"tlfast-{tlfast.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".so", ".cpp"))]
    values = {}
    exec(info, values)
    assert (values["BUILT"], values["REASON"], values["TORCH"]) == (False, "TLFAST_BUILD=none", None)
    assert (values["CUDA"], values["CUDA_ARCHS"], values["SIMT"]) == (None, (), False)
    stub = (ROOT / "tlfast" / "_build_info.pyi").read_text()
    assert {name for name in values if name.isupper()} == set(re.findall(r"^([A-Z_]+):", stub, flags=re.MULTILINE))


def test_a_build_that_does_not_exist_is_refused(source):
    done = run("setup.py", "--version", folder=source, TLFAST_BUILD="gpu")
    assert done.returncode != 0
    assert "TLFAST_BUILD must be one of auto, cpu, cuda, none, got 'gpu'. Unset it for auto." in done.stderr


def needs_a_compiler():
    """Skip where no native module can be built at all, unless that must be possible."""
    done = run("setup.py", "--version", TLFAST_BUILD="cpu")
    if done.returncode != 0:
        assert os.environ.get("TLFAST_REQUIRE_NATIVE") != "1", done.stderr
        pytest.skip(done.stderr.strip())


@pytest.mark.long
def test_without_a_toolkit(source):
    needs_a_compiler()
    gone = f"no bin/nvcc in CUDA_HOME={source}"
    must = run("setup.py", "--version", folder=source, TLFAST_BUILD="cuda", CUDA_HOME=str(source))
    assert must.returncode != 0
    assert f"TLFAST_BUILD must be possible on this machine, got 'cuda', but {gone}." in must.stderr
    may = run("setup.py", "--version", folder=source, TLFAST_BUILD="auto", CUDA_HOME=str(source))
    assert (may.returncode, may.stderr) == (0, "")
    assert f"tlfast: building tlfast._C for the CPU alone ({gone}; TLFAST_BUILD=auto, torch" in may.stdout


@pytest.mark.long
def test_unknown_gpus_are_refused(source):
    needs_a_compiler()
    done = run("setup.py", "--version", folder=source, TLFAST_BUILD="auto", TORCH_CUDA_ARCH_LIST="8.0 Hopper")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST must hold compute capabilities such as \"8.0;9.0+PTX\", got 'Hopper'." in done.stderr


@pytest.mark.parametrize("compiler", ["no-such-compiler", pytest.param("false", marks=pytest.mark.long)])
def test_without_a_compiler(source, compiler):
    must = run("setup.py", "--version", folder=source, TLFAST_BUILD="cpu", CXX=compiler)
    assert must.returncode != 0
    assert re.search(rf"TLFAST_BUILD must be possible.*got 'cpu', but .*{compiler}", must.stderr)

    may = run("setup.py", "-q", "build", "--build-lib", "built", folder=source, TLFAST_BUILD="auto", CXX=compiler)
    assert may.returncode == 0, may.stderr
    assert "tlfast: no native module, pure Python (" in may.stdout
    assert compiler in (source / "built" / "tlfast" / "_build_info.py").read_text()


def test_without_torch(source):
    (source / "torch.py").write_text("raise ImportError('not here')\n")
    done = run("setup.py", "--version", folder=source, TLFAST_BUILD="auto", PYTHONPATH=str(source))
    assert done.returncode == 0, done.stderr
    assert "no native module, pure Python (torch could not be imported" in done.stdout


def test_an_old_torch_is_refused(source):
    (source / "torch.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = run("setup.py", "--version", folder=source, TLFAST_BUILD="cpu", PYTHONPATH=str(source))
    assert done.returncode != 0
    assert "torch must be 2.11 or newer, got 2.9.1+cpu" in done.stderr
