#!/usr/bin/env bash
# Feed hostile files to the reader of datasets with atheris: tools/fuzz.sh [SECONDS for each target] [TARGET ...]
# PYTHON is a Python with tlfast and atheris; what was learnt is kept in build/fuzz, and so is an input that isn't safe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
shift || true
targets=("$@")
((${#targets[@]})) || targets=(dataset_json extension commit unit_file row_table)
export PYTHONPATH="$PWD:$PWD/tests/support"
failed=0
for target in "${targets[@]}"; do
  echo "=== $target, $seconds s"
  mkdir -p "build/fuzz/$target/corpus"
  "${PYTHON:-python}" tests/support/fuzz_dataset.py "$target" "build/fuzz/$target/corpus" \
    -max_total_time="$seconds" -timeout=20 -rss_limit_mb=0 -max_len=16384 -len_control=0 -print_final_stats=1 \
    -artifact_prefix="build/fuzz/$target/" 2>&1 | grep -Ev '^(INFO|#[0-9]+.*(NEW|REDUCE|pulse|RELOAD))' || failed=1
done
exit $failed
