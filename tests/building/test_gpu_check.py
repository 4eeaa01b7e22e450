"""tools/gpu_check.sh: its shell is right, every part runs whatever the others did, and the summary tells the truth."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from checkout import ROOT
from source_rules import MACHINE_PATHS

SCRIPT = ROOT / "tools" / "gpu_check.sh"
PARTS = {
    "tests": ["machine", "module", "doctor", "shim", "tests", "memcheck", "racecheck"],
    "bench": ["machine", "module", "doctor", "host", "kernel", "step", "collect"],
}
FILES = 8  # no more, so that a call leaves little to bring back

# Stands for Python, nvidia-smi and compute-sanitizer: writes down how it was called, and fails where it is told to. As
# setup.py it leaves a module.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $* [${TLFAST_REQUIRE_CUDA:-} ${TORCH_CUDA_ARCH_LIST:-} ${TLFAST_BUILD:-}]" > "$CALLS/$$"
[[ -n ${FAIL:-} && "${0##*/} $*" == *$FAIL* ]] && { echo "1 failed"; exit 1; }
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *"import xdist"*) exit "${NO_XDIST:-0}" ;;
  *setup.py*) mkdir -p "${!#}/tlfast" && touch "${!#}"/tlfast/{_C.stub.so,_disk.stub.so,_build_info.py} ;;
  *tlfast.backend*) echo "native (stub)" ;;
  *) echo "3 passed in 1s" ;;
esac
"""


def in_order(calls):
    """The lines of all calls as they came; each has a file, since bash writes a long line in several pieces."""
    return "".join(file.read_text() for file in sorted(calls.iterdir(), key=lambda file: file.stat().st_mtime_ns))


@pytest.fixture
def check(tmp_path):
    """Runs the script with stubs for all that it calls; what it said, its summary as {part: outcome}, and the calls.

    In a copy of what it reads of the repository, since it leaves a module and a package in build/.
    """
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("bash and timeout must be on the PATH")
    tools, copy = tmp_path / "bin", tmp_path / "copy"
    tools.mkdir()
    for name in ("python-stub", "nvidia-smi", "compute-sanitizer"):
        (tools / name).write_text(STUB)
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    for folder in ("csrc", "tlfast", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", copy)

    def run(*arguments, **environment):
        calls, out = tmp_path / "calls", tmp_path / "out"
        shutil.rmtree(calls, ignore_errors=True)
        calls.mkdir()
        shutil.rmtree(out, ignore_errors=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("TLFAST_", "TORCH_CUDA_"))}
        env |= {
            "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python-stub"), "OUT": str(out),
            "CALLS": str(calls), "CUDA_HOME": str(tmp_path), **environment,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(copy / "tools" / "gpu_check.sh"), *arguments],
            env=env, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        summaries = list(out.glob("*_summary.txt"))
        lines = summaries[0].read_text().splitlines() if summaries else []
        if lines:
            assert sorted(lines) == sorted(done.stdout.splitlines())  # some parts run at a time
            assert len(list(out.iterdir())) <= FILES - (4 if arguments[-1] == "bench" else 0)  # a file for each bench
        return done, dict(line.split()[:2] for line in lines[1:-1]), in_order(calls), lines

    run.copy = copy
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


def test_it_runs_all_tests_that_need_a_gpu():
    named = set(re.findall(r'"\$ROOT/(tests/[\w/.]+)"', SCRIPT.read_text()))
    marked = {path for path in (ROOT / "tests").rglob("*.py") if re.search(r"mark\.gpu\b", path.read_text())}
    marked -= {Path(__file__)}
    assert named == {"tests/cuda"}
    assert [path for path in marked if path.parent != ROOT / "tests" / "cuda"] == []


@pytest.mark.parametrize("word", PARTS)
def test_all_parts_pass(check, word):
    done, outcomes, calls, lines = check(word)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(outcomes) == sorted(PARTS[word])
    assert set(outcomes.values()) == {"passed"}
    assert lines[-1].startswith("0 of 7 parts failed")
    assert "nothing is in build/gpu_module; built here" in next(line for line in lines if line.startswith("module"))
    assert re.search(r"setup.py -q build_ext --build-lib \S+/build/gpu_module \[1 9.0 cuda\]", calls)


def test_what_each_call_runs(check):
    tests, bench = (check(word)[2] for word in ("tests", "bench"))
    for tool in ("memcheck", "racecheck"):
        (call,) = re.findall(rf"compute-sanitizer --tool {tool} .*", tests)
        assert "--kernel-name kernel_substring=tlfast --error-exitcode 1" in call
        assert call.endswith("-k each_kernel or not_finite [1  ]")
        assert re.search(r"--time-limit \d+ -m gpu ", call)
    (call,) = (line for line in tests.splitlines() if re.search(r"/tests/cuda \[", line))
    assert re.search(r"-m pytest -v .*-p time_limit --time-limit \d+ -m gpu -p xdist.plugin -n \d", call)
    assert re.findall(r"-m bench (gpu_\w+) --out", bench) == ["gpu_host", "gpu_kernel", "gpu_step", "gpu_collect"]
    assert "-m bench" not in tests
    assert "-m pytest" not in bench


def test_every_kernel_has_the_name_that_the_sanitizers_ask_for():
    for name in ("capture_cuda.cu", "capture_cuda.cuh"):
        text = (ROOT / "csrc" / "kernel" / name).read_text()
        inside = text[text.index("namespace tlfast::cuda {") : text.index("}  // namespace tlfast::cuda")]
        assert text.count("__global__") == inside.count("__global__")


@pytest.mark.parametrize(
    "word, fail, failed",
    [
        ("tests", "stub setup.py", {"module"}),
        ("tests", "tlfast.backend", {"module"}),
        ("tests", "--dist worksteal", {"tests"}),
        ("tests", "--tool racecheck", {"racecheck"}),
        ("tests", "simt_build", {"shim"}),
        ("tests", "nvidia-smi", {"machine"}),
        ("bench", "gpu_host", {"host"}),
        ("bench", "gpu_step", {"step"}),
    ],
)
def test_every_part_runs_after_one_that_failed(check, word, fail, failed):
    done, outcomes, _, lines = check(word, FAIL=fail)
    assert done.returncode == 1
    assert sorted(outcomes) == sorted(PARTS[word])
    assert {part for part, outcome in outcomes.items() if outcome != "passed"} == failed
    assert lines[-1].startswith("1 of 7 parts failed")


def test_without_a_gpu_the_module_is_not_built(check):
    done, outcomes, _, _ = check("tests", FAIL="get_device_capability")
    assert done.returncode == 1
    assert outcomes["module"] == "failed"


def test_a_module_of_the_same_sources_is_taken(check):
    assert check("module")[0].returncode == 0
    for word in ("tests", "bench"):
        done, _, calls, _ = check(word)
        assert "build/gpu_module runs: native (stub)" in done.stdout
        assert "setup.py" not in calls
    (check.copy / "csrc" / "python" / "module.cpp").write_text("// changed\n")
    done, _, calls, _ = check("bench")
    assert "build/gpu_module is of other sources; built here" in done.stdout
    assert "setup.py" in calls
    assert "build/gpu_module runs" in check("bench")[0].stdout  # what was built is there for the next call


def test_a_module_that_does_not_run_is_built_anew(check):
    assert check("module")[0].returncode == 0
    _, outcomes, calls, _ = check("tests", FAIL="tlfast.backend")
    assert "setup.py" in calls
    assert outcomes["module"] == "failed"  # nor does the new one


@pytest.mark.parametrize("word", PARTS)
def test_a_dry_run_leaves_out_what_needs_a_gpu_and_says_so(check, word):
    (check.copy / "tlfast" / "_C.stub.so").touch()
    (check.copy / "tlfast" / "_disk.stub.so").touch()
    (check.copy / "tlfast" / "_build_info.py").touch()
    done, outcomes, calls, lines = check("--dry-run", word)
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = {part for part, outcome in outcomes.items() if outcome == "left-out"}
    assert left_out == {"module", *(["memcheck", "racecheck"] if word == "tests" else [])}
    assert "nothing is shown of a GPU" in lines[-1]
    assert "setup.py" not in calls
    assert "[1 " not in calls  # TLFAST_REQUIRE_CUDA
    assert calls.count("--rehearse") == (4 if word == "bench" else 0)
    assert calls.count("-m not gpu") == (3 if word == "tests" else 0)
    wrong = {"tests": ("-m not gpu", "--require-cuda-init no true"), "bench": ("--rehearse",)}[word]
    for fail in wrong:
        assert check("--dry-run", word, FAIL=fail)[0].returncode == 1


def test_without_xdist_one_process_has_all_tests(check):
    _, outcomes, calls, _ = check("tests", NO_XDIST="1")
    assert outcomes["tests"] == "passed"
    assert "-n " not in calls


@pytest.mark.parametrize("arguments", [[], ["--quick"], ["tests", "bench"], ["--dry-run"]])
def test_other_arguments_are_refused(arguments):
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    given = " ".join(word for word in arguments if word != "--dry-run")
    assert done.stderr.startswith(f"gpu_check: the argument must be tests, bench or module, got '{given}'.")


@pytest.mark.long
def test_a_test_that_takes_too_long_ends_its_process(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\n\ndef test_first():\n    pass\n\ndef test_waits():\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "time_limit", "--time-limit", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "test_first PASSED" in done.stdout
    assert "Timeout (0:00:02)!" in done.stderr
    assert "in test_waits" in done.stderr
    within = subprocess.run(
        [*command[:-1], "60", "-k", "first"], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert within.returncode == 0


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


@pytest.mark.long
def test_tests_that_need_an_absent_library_are_skipped(tmp_path):
    """In a process where tyro can't be found; what is skipped says which library is missing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'tyro' else found(name, package)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/commands/test_cli_refusals.py"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "tyro is not installed" in done.stdout, done.stdout + done.stderr
    assert " passed" not in done.stdout
