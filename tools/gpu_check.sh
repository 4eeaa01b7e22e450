#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show: a build there, all tests, compute-sanitizer, the bench of the GPU.
#
#   OUT=folder tools/gpu_check.sh             in 9 minutes at most; leaves at most 8 files in OUT (build/gpu_check)
#   OUT=folder tools/gpu_check.sh --dry-run   what a CPU can do of each part, and what it leaves out
#
# PYTHON (python3) has torch for CUDA, setuptools, ninja, pytest, hypothesis and what `collect` needs; nvcc and
# compute-sanitizer are on the PATH or under CUDA_HOME. Nothing is installed or downloaded. Every part runs, also after
# one that failed; the summary says how each went, and the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

DRY=0
case "${1:-}" in
  --dry-run) DRY=1 ;;
  "") ;;
  *)
    echo "gpu_check: the argument must be --dry-run or none, got '$1'. See the head of the script." >&2
    exit 2
    ;;
esac
# Of 9 minutes; the rest is for stopping what runs too long. A CPU takes its time.
TOTAL_S=$((DRY ? 3600 : 520))

export PY=${PYTHON:-python3}
OUT=${OUT:-build/gpu_check}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/{summary.txt,build.log,doctor.txt,suite.log,sanitizers.log,devices.log,bench.log} "$OUT"/gpu-*.json
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
CORES=$(nproc 2> /dev/null || echo 2)
TOOLKIT=${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}
[[ -d $TOOLKIT/bin ]] && PATH="$PATH:$TOOLKIT/bin"
export SCRATCH CORES OUT PATH
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1
((DRY)) || export TLFAST_REQUIRE_CUDA=1 TLFAST_REQUIRE_NATIVE=1
NAMES=()
if ! "$PY" -c 'import google_crc32c' 2> /dev/null; then
  echo "gpu_check: google-crc32c is not installed; tools/stand_ins has what collect calls of it"
  export PYTHONPATH="$PYTHONPATH:$PWD/tools/stand_ins"
fi

# part NAME LIMIT_S LOG COMMAND...: run one part and keep how it went. The command ends with 77 if the part is left out;
# its last line is the remark in the summary.
part() {
  local name=$1 limit=$2 log=$3 start=$SECONDS code=1 outcome
  shift 3
  ((limit > TOTAL_S - SECONDS)) && limit=$((TOTAL_S - SECONDS))
  echo "=== $name: $*" > "$SCRATCH/log.$name"
  if ((limit > 0)); then
    timeout --kill-after=5 "$limit" "$@" >> "$SCRATCH/log.$name" 2>&1 < /dev/null
    code=$?
  else
    echo "no time was left" >> "$SCRATCH/log.$name"
  fi
  case $code in
    0) outcome=passed ;;
    77) outcome=$( ((DRY)) && echo left-out || echo failed) ;;
    124 | 137)
      outcome=failed
      echo "stopped after $limit s" >> "$SCRATCH/log.$name"
      ;;
    *) outcome=failed ;;
  esac
  cat "$SCRATCH/log.$name" >> "$OUT/$log"
  printf '%-10s %-8s %4d s  %s\n' "$name" "$outcome" $((SECONDS - start)) \
    "$(tail -n 1 "$SCRATCH/log.$name" | cut -c1-150)" | tee "$SCRATCH/row.$name"
}

left_out() {
  echo "$*"
  exit 77
}

tests() { "$PY" -m pytest -q -p no:cacheprovider "$@"; }

machine() {
  "$PY" - << 'END'
import importlib.util, torch
missing = [n for n in ("tyro", "pyarrow", "safetensors", "transformers", "tokenizers", "tqdm", "yaml",
                       "hypothesis", "xdist") if importlib.util.find_spec(n) is None]
print("torch", torch.__version__, "for CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print("google_crc32c from", importlib.util.find_spec("google_crc32c").origin)
print("missing libraries:", ", ".join(missing) or "none")
END
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || left_out "no nvidia-smi"
}

build() {
  local arch
  arch=$("$PY" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)
  if [[ -z $arch ]]; then
    command -v nvcc > /dev/null || left_out "no GPU to build for, and no nvcc to compile the kernels with"
    "$PY" tools/cuda_resources.py && left_out "the kernels compile; no GPU, so the module is not built for one"
    exit 1
  fi
  TORCH_CUDA_ARCH_LIST=$arch TLFAST_BUILD=cuda MAX_JOBS=$CORES "$PY" setup.py -q build_ext --inplace &&
    "$PY" -c 'import tlfast; print(tlfast.backend())'
}

doctor() {
  "$PY" -c 'from tlfast.commands.doctor import diagnose; print(*diagnose(), sep="\n")' &&
    "$PY" -c 'import tlfast; print(tlfast.backend())'
}

# By pytest-xdist where it is installed, else the files dealt out to as many processes.
suite() {
  local n=$((CORES < 8 ? CORES : 8)) code=0 k i files=() pids=() mine
  if ((DRY)); then
    tests --collect-only tests > "$SCRATCH/collected" || code=1
    tail -n 3 "$SCRATCH/collected"
    ((code)) || left_out "$(grep -E 'collected' "$SCRATCH/collected" | tail -n 1 || true) but not run: make test does"
    return $code
  fi
  if "$PY" -c 'import xdist' 2> /dev/null; then
    tests -n "$n" --dist loadfile tests
    return
  fi
  mapfile -t files < <(find tests -name 'test_*.py' | sort)
  for ((k = 0; k < n; k++)); do
    mine=()
    for ((i = k; i < ${#files[@]}; i += n)); do mine+=("${files[i]}"); done
    tests "${mine[@]}" > "$SCRATCH/shard.$k" 2>&1 &
    pids+=($!)
  done
  for k in "${!pids[@]}"; do
    wait "${pids[k]}" || code=1
    cat "$SCRATCH/shard.$k"
  done
  grep -hE '^(FAILED|ERROR) ' "$SCRATCH"/shard.* | sort -u
  grep -hoE '[0-9]+ (passed|failed|skipped|errors?)' "$SCRATCH"/shard.* |
    awk '{ n[$2] += $1 } END { for (word in n) printf "%d %s, ", n[word], word; print "in files dealt out" }'
  return $code
}

# Each kernel on small tensors, and for two of the tools a captured step: every access takes 10 to 100 times as long.
sanitizer() {
  local tool=$1 chosen="not cpu and (each_kernel or not_finite)"
  [[ $tool == initcheck ]] && chosen="not cpu and each_kernel"
  local which=(tests/cuda/test_cuda_kernels.py tests/cuda/test_cuda_capture.py -k "$chosen")
  if ((DRY)); then
    tests --collect-only "${which[@]}" | tail -n 1 && left_out "the tests are there; $tool needs a GPU"
    exit 1
  fi
  command -v compute-sanitizer > /dev/null || left_out "no compute-sanitizer"
  # Without torch's cache every tensor is an allocation of its own, with bounds that can be seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PY" -m pytest -q -p no:cacheprovider "${which[@]}"
}

graphs() { tests tests/cuda/test_cuda_graphs.py -k "$( ((DRY)) && echo cpu || echo 'not cpu')"; }

streams() {
  ((DRY)) && { tests tests/cuda/test_cuda_capture.py -k "cpu and stream"; return; }
  tests tests/cuda/test_cuda_capture.py tests/test_drain_cuda.py -k "not cpu and (stream or slow_work)"
}

bench() {
  if ((DRY)); then
    PYTHONWARNINGS=ignore "$PY" -m bench gpu --quick --rehearse --out "$OUT"
  else
    "$PY" -m bench gpu --out "$OUT"
  fi
}

export DRY
export -f left_out tests machine build doctor suite sanitizer graphs streams bench

run() {
  NAMES+=("$1")
  part "$1" "$2" "$3" bash -o pipefail -c "$4"
}

run machine 30 doctor.txt machine
run build $((DRY ? 900 : 160)) build.log build
run doctor 40 doctor.txt doctor
# Nothing of these is timed, so they share the GPU and the cores. On a CPU they would only be in each other's way.
for line in "suite suite.log suite" "memcheck sanitizers.log sanitizer memcheck" \
  "racecheck sanitizers.log sanitizer racecheck" "initcheck sanitizers.log sanitizer initcheck" \
  "graphs devices.log graphs" "streams devices.log streams"; do
  read -r name log command <<< "$line"
  if ((DRY)); then
    run "$name" 600 "$log" "$command"
  else
    NAMES+=("$name")
    part "$name" 160 "$log" bash -o pipefail -c "$command" &
  fi
done
wait
run bench $((DRY ? 600 : 250)) bench.log bench

{
  echo "part       outcome    time  remark"
  for name in "${NAMES[@]}"; do cat "$SCRATCH/row.$name"; done
  n_failed=$(cat "$SCRATCH"/row.* | awk '$2 == "failed"' | wc -l)
  echo "$n_failed of ${#NAMES[@]} parts failed, $SECONDS s in all$( ((DRY)) && echo '; a dry run: nothing is shown of a GPU')"
} > "$OUT/summary.txt"
echo
cat "$OUT/summary.txt"
[[ $(tail -n 1 "$OUT/summary.txt") == 0\ of* ]]
