#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show, in two calls of at most 5 minutes each.
#
#   OUT=folder tools/gpu_check.sh tests             the tests that need a GPU; memcheck and racecheck on our kernels
#   OUT=folder tools/gpu_check.sh bench             the benches of a GPU: host, kernel, step, collect
#   OUT=folder tools/gpu_check.sh --dry-run tests   what a CPU can do of each part, and what it leaves out; also bench
#   tools/gpu_check.sh module                       the module for another machine; make gpu-module
#
# PYTHON (python3) has torch for CUDA, pytest, hypothesis and what `collect` needs; compute-sanitizer is on the PATH or
# under CUDA_HOME. Nothing is installed or downloaded. The module in build/gpu_module is used if it is of these sources
# and runs here, so of the same Python and torch; else one is built, with setuptools, ninja and nvcc. Every part runs,
# also after one that failed. The summary says how each went; the exit status is 1 if any failed. OUT (build/gpu_check)
# gets at most 8 files, each written while its part runs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
ROOT=$PWD

DRY=0
[[ ${1:-} == --dry-run ]] && { DRY=1; shift; }
WORD=${1:-}
if [[ $# != 1 || ! $WORD =~ ^(tests|bench|module)$ ]]; then
  echo "gpu_check: the argument must be tests, bench or module, got '$*'. See the head of the script." >&2
  exit 2
fi
# Of 5 minutes; the rest is for stopping what runs too long. A CPU takes its time.
TOTAL_S=$((DRY ? 3600 : 285))

if ! PY=$(command -v "${PYTHON:-python3}"); then
  echo "gpu_check: PYTHON must be a Python interpreter, got '${PYTHON:-python3}'. Give the path of one." >&2
  exit 2
fi
[[ $PY == /* ]] || PY=$ROOT/$PY
CARRIED=$ROOT/build/gpu_module
PACKAGE=$ROOT/build/gpu_package # the checkout's Python files and the module: its own module stays as it is
GPU_TESTS=("$ROOT/tests/cuda")
CORES=$(nproc 2> /dev/null || echo 2)
TOOLKIT=${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}
[[ -d $TOOLKIT/bin ]] && PATH="$PATH:$TOOLKIT/bin"

# ------------------------------------------------------------------------------------------------------ the module

sources() { cat csrc/*/* setup.py tools/cuda_build.py | sha256sum; }

make_module() {
  rm -rf "$CARRIED"
  TLFAST_BUILD=cuda "$PY" setup.py -q build_ext --build-lib "$CARRIED" && sources > "$CARRIED/sources.txt"
}

if [[ $WORD == module ]]; then
  make_module || exit 1
  echo "gpu_check: build/gpu_module has the module for $("$PY" -c 'import sys, torch
print("Python %d.%d and torch" % sys.version_info[:2], torch.__version__)')"
  exit 0
fi

OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/${WORD}_summary.txt
rm -f "$SUMMARY" "$OUT"/setup.log
[[ $WORD == tests ]] && rm -f "$OUT"/{shim,tests,memcheck,racecheck}.log
[[ $WORD == bench ]] && rm -f "$OUT"/bench.log "$OUT"/gpu_*.json
export DRY ROOT OUT PY CARRIED PACKAGE CORES PATH
# The stand-ins come last: a library that is there is taken.
export PYTHONPATH="$PACKAGE:$ROOT:$ROOT/tools${PYTHONPATH:+:$PYTHONPATH}:$ROOT/tools/stand_ins"
export OMP_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
((DRY)) || export TLFAST_REQUIRE_CUDA=1 TLFAST_REQUIRE_NATIVE=1

left_out() {
  echo "$*"
  exit 77
}

# The package with the module of a folder; says what it is, and whether it runs on this GPU (in a dry run: on the CPU).
assembled_with() {
  rm -rf "$PACKAGE" && mkdir -p "$PACKAGE" && cp -r tlfast "$PACKAGE" && rm -f "$PACKAGE"/tlfast/_{C,disk}.*.so || return 1
  cp "$1"/tlfast/{_C.*.so,_disk.*.so,_build_info.py} "$PACKAGE/tlfast" && cd "$PACKAGE" && "$PY" -c "import sys, tlfast
print(tlfast.backend())
sys.exit(not tlfast.backend().startswith('native (') or $DRY == 0 and ', cuda sm_' not in tlfast.backend())"
}

module() {
  local state arch said
  if [[ ! -d $CARRIED ]]; then
    state="nothing is in build/gpu_module"
  elif [[ $(sources) != "$(cat "$CARRIED/sources.txt")" ]]; then
    state="build/gpu_module is of other sources"
  elif said=$(assembled_with "$CARRIED"); then
    echo "build/gpu_module runs: $said"
    return
  else
    state="build/gpu_module doesn't run: $said"
  fi
  echo "$state"
  if ((DRY)); then
    said=$(assembled_with .) && left_out "$state; none is built, and the checkout's own is taken: $said"
    echo "nor does the checkout's own: $said"
    return 1
  fi
  arch=$("$PY" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return 1
  TORCH_CUDA_ARCH_LIST=$arch MAX_JOBS=$CORES make_module && said=$(assembled_with "$CARRIED") || return 1
  echo "$state; built here: $said"
}

# ------------------------------------------------------------------------------------------------------- the parts

machine() {
  "$PY" - << 'PYTHON_END'
import importlib.util, platform, torch
print("Python", platform.python_version(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
needed = ("google_crc32c", "hypothesis", "numpy", "pyarrow", "pytest", "safetensors", "tokenizers", "tqdm",
          "transformers", "xdist", "yaml")
found = {name: importlib.util.find_spec(name) for name in needed}
stand_ins = [name for name, spec in found.items() if spec and "stand_ins" in str(spec.origin)]
print("stand-ins from tools/stand_ins:", ", ".join(stand_ins) or "none")
print("missing libraries:", ", ".join(name for name, spec in found.items() if spec is None) or "none")
PYTHON_END
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || left_out "no nvidia-smi"
}

doctor() { cd "$PACKAGE" && "$PY" -c 'from tlfast.commands.doctor import diagnose; print(*diagnose(), sep="\n")'; }

# The kernels compiled for the CPU, whose bits some tests compare with: once, before all processes ask for it.
shim() {
  PYTHONPATH="$ROOT/tests/support:$PYTHONPATH" "$PY" -c 'import simt_build; simt_build.library("capture_simt.cpp")' &&
    echo "the kernels are compiled for the CPU"
}

# PYTEST is the command, with the seconds that each test has.
pytest_with_limit() {
  PYTEST=("$PY" -m pytest -v -p no:cacheprovider -c "$ROOT/pyproject.toml" --rootdir "$ROOT")
  PYTEST+=(-p time_limit --time-limit "$((DRY ? 600 : $1))" -m "$( ((DRY)) && echo "not gpu" || echo gpu)")
  cd "$PACKAGE" || exit 1
}

gpu_tests() {
  local PYTEST
  pytest_with_limit 60
  if "$PY" -c 'import xdist' 2> /dev/null; then
    PYTEST+=(-p xdist.plugin -n "$((CORES < 8 ? CORES : 8))" --dist worksteal)
  else
    echo "pytest-xdist is not installed: one process, and a test that takes too long is the last one"
  fi
  "${PYTEST[@]}" "$@"
}

# Our kernels alone, each on small tensors: every access takes 10 to 100 times as long. Without torch's cache every
# tensor is an allocation of its own, with bounds that can be seen.
sanitizer() {
  local PYTEST tool=$1 command=(compute-sanitizer --tool "$1" --kernel-name kernel_substring=tlfast --error-exitcode 1)
  shift
  pytest_with_limit 120
  PYTEST+=("$@" -k "each_kernel or not_finite")
  if ((DRY)); then
    "${PYTEST[@]}" || return 1
    command -v compute-sanitizer > /dev/null || left_out "the tests pass on the CPU; $tool is not here and needs a GPU"
    "${command[@]}" --require-cuda-init no true || return 1 # its options, at least
    left_out "the tests pass on the CPU; $tool needs a GPU"
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${command[@]}" "${PYTEST[@]}"
}

bench() {
  cd "$PACKAGE" || return 1
  if ((DRY)); then
    PYTHONWARNINGS=ignore "$PY" -m bench "gpu_$1" --quick --rehearse --out "$OUT"
  else
    "$PY" -m bench "gpu_$1" --out "$OUT"
  fi
}

export -f left_out sources make_module assembled_with module machine doctor shim pytest_with_limit gpu_tests
export -f sanitizer bench

# part NAME LIMIT_S LOG COMMAND...: run one part and say how it went. The command ends with 77 if the part is left out;
# its last line is the remark.
part() {
  local name=$1 limit=$2 log=$OUT/$3 start=$SECONDS code=1 outcome
  shift 3
  ((limit > TOTAL_S - SECONDS || DRY)) && limit=$((TOTAL_S - SECONDS))
  echo "=== $name: $*" >> "$log"
  if ((limit > 0)); then
    timeout --kill-after=5 "$limit" bash -o pipefail -c '"$@"' "$name" "$@" >> "$log" 2>&1 < /dev/null
    code=$?
  else
    echo "no time was left" >> "$log"
  fi
  case $code in
    0) outcome=passed ;;
    77) outcome=$( ((DRY)) && echo left-out || echo failed) ;;
    124 | 137)
      outcome=failed
      echo "stopped after $limit s" >> "$log"
      ;;
    *) outcome=failed ;;
  esac
  printf '%-10s %-8s %4d s  %s\n' "$name" "$outcome" $((SECONDS - start)) "$(tail -n 1 "$log" | cut -c1-150)" |
    tee -a "$SUMMARY"
}

rm -rf "$PACKAGE" && mkdir -p "$PACKAGE" || exit 2
echo "part       outcome    time  remark" | tee "$SUMMARY"
if [[ $WORD == tests ]]; then
  part shim 150 shim.log shim &
  SHIM=$!
fi
part machine 20 setup.log machine
part module 170 setup.log module
part doctor 30 setup.log doctor
if [[ $WORD == tests ]]; then
  # Nothing of these is timed, so they share the GPU and the cores. On a CPU they would only be in each other's way.
  for tool in memcheck racecheck; do
    part "$tool" 220 "$tool.log" sanitizer "$tool" "$ROOT"/tests/cuda/test_cuda_{kernels,capture}.py &
    ((DRY)) && wait
  done
  wait "$SHIM" 2> /dev/null # a dry run has waited for it
  part tests 220 tests.log gpu_tests "${GPU_TESTS[@]}"
  wait
else
  part host 60 bench.log bench host
  part kernel 100 bench.log bench kernel
  part step 90 bench.log bench step
  part collect 110 bench.log bench collect
fi

n_parts=$(($(wc -l < "$SUMMARY") - 1))
n_failed=$(awk '$2 == "failed"' "$SUMMARY" | wc -l)
echo "$n_failed of $n_parts parts failed, $SECONDS s in all$( ((DRY)) && echo '; a dry run: nothing is shown of a GPU')" |
  tee -a "$SUMMARY"
((n_failed == 0))
