"""tools/gpu_check.sh: its shell is right, every part runs whatever the others did, and the summary tells the truth."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from source_rules import MACHINE_PATHS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
PARTS = ["machine", "build", "doctor", "suite", "memcheck", "racecheck", "initcheck", "graphs", "streams", "bench"]

# Stands for Python, nvidia-smi and compute-sanitizer: writes down how it was called, and fails where it is told to.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $* [${TLFAST_REQUIRE_CUDA:-} ${TORCH_CUDA_ARCH_LIST:-} ${TLFAST_BUILD:-}]" >> "$CALLS"
case "$*" in
  *get_device_capability*) [[ -n ${NO_GPU:-} ]] && exit 1; echo 9.0; exit 0 ;;
  *"import xdist"*) exit 1 ;;
  *"import google_crc32c"*) exit "${NO_CRC32C:-0}" ;;
  *tools/cuda_resources*) exit 0 ;;
esac
[[ -n ${FAIL:-} && "${0##*/} $*" == *$FAIL* ]] && { echo "1 failed"; exit 1; }
echo "3 passed in 1s"
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script with stubs for all that it calls; what it said, its summary as {part: outcome}, and the calls."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("bash and timeout must be on the PATH")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python-stub", "nvidia-smi", "compute-sanitizer", "nvcc"):
        (tools / name).write_text(STUB)
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)

    def run(*arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python-stub"), "OUT": str(tmp_path / "out"),
            "CALLS": str(calls), "CUDA_HOME": str(tmp_path), **environment,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False, timeout=300
        )
        lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
        return done, dict(line.split()[:2] for line in lines[1:-1]), calls.read_text(), lines

    return run


def test_the_shell_is_right():
    text = SCRIPT.read_text()
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, check=False).returncode == 0
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert not MACHINE_PATHS.search(text.replace("/usr/local/cuda", ""))
    assert os.access(SCRIPT, os.X_OK)
    for word in ("pip install", "apt-get", "curl", "wget"):
        assert word not in text
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_all_parts_pass(check, tmp_path):
    done, outcomes, calls, lines = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(outcomes) == PARTS
    assert set(outcomes.values()) == {"passed"}
    assert lines[-1].startswith("0 of 10 parts failed")
    assert len(list((tmp_path / "out").iterdir())) <= 8
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"compute-sanitizer --tool {tool} --error-exitcode 1" in calls
    assert "setup.py -q build_ext --inplace [1 9.0 cuda]" in calls
    assert "-m bench gpu --out" in calls
    for name in ("tests/test_capture.py", "tests/cuda/test_cuda_graphs.py"):  # dealt out, each to one process
        assert sum(name in line for line in calls.splitlines()) >= 1


@pytest.mark.parametrize(
    "fail, failed",
    [
        ("stub setup.py", {"build"}),
        ("tests/test_capture.py", {"suite"}),
        ("--tool racecheck", {"racecheck"}),
        ("-m bench", {"bench"}),
        ("nvidia-smi", {"machine"}),
        ("tests/cuda/test_cuda_graphs.py -k", {"graphs"}),
    ],
)
def test_every_part_runs_after_one_that_failed(check, fail, failed):
    done, outcomes, _, lines = check(FAIL=fail)
    assert done.returncode == 1
    assert list(outcomes) == PARTS
    assert {part for part, outcome in outcomes.items() if outcome != "passed"} == failed
    assert lines[-1].startswith("1 of 10 parts failed")


def test_without_a_gpu_the_build_fails(check):
    done, outcomes, _, _ = check(NO_GPU="1")
    assert done.returncode == 1
    assert outcomes["build"] == "failed"


def test_a_dry_run_leaves_out_what_needs_a_gpu_and_says_so(check):
    done, outcomes, calls, lines = check("--dry-run", NO_GPU="1")
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = {part for part, outcome in outcomes.items() if outcome == "left-out"}
    assert left_out == {"build", "suite", "memcheck", "racecheck", "initcheck"}
    assert "nothing is shown of a GPU" in lines[-1]
    assert "--rehearse" in calls
    assert "compute-sanitizer" not in calls
    assert "[1 " not in calls  # TLFAST_REQUIRE_CUDA
    assert check("--dry-run", NO_GPU="1", FAIL="--collect-only")[0].returncode == 1


def test_a_missing_crc32c_is_stood_in_for(check):
    assert "stand_ins" in check(NO_CRC32C="1")[0].stdout
    assert "stand_ins" not in check()[0].stdout


def test_another_argument_is_refused():
    done = subprocess.run(["bash", str(SCRIPT), "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: the argument must be --dry-run or none, got '--quick'.")


def test_the_stand_in_counts_as_the_library_does():
    if shutil.which("cc") is None:
        pytest.skip("cc must be on the PATH")
    path = ROOT / "tools" / "stand_ins" / "google_crc32c.py"
    spec = importlib.util.spec_from_file_location("stand_in", path)
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    assert stand_in.extend(0, b"123456789") == 0xE3069283  # the check value of CRC-32C; RFC 3720 has others
    assert stand_in.extend(0, bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    data = bytes(range(256)) * 5 + b"odd"
    assert stand_in.extend(stand_in.extend(0, data[:13]), data[13:]) == stand_in.extend(0, data)
    assert stand_in.extend(0, b"") == 0
    assert stand_in.extend(0, data) != zlib.crc32(data)


def test_tests_that_need_an_absent_library_are_skipped(tmp_path):
    """In a process where tyro can't be found; what is skipped says which library is missing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'tyro' else found(name, package)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cli_refusals.py"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "tyro is not installed" in done.stdout, done.stdout + done.stderr
    assert " passed" not in done.stdout
