#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one command and without a network: build, tests,
# compute-sanitizer, and the table against torch and a device copy.
#
#   bash tools/bench/kernels/gpu.sh [OUT]        OUT: a folder for the results, default build/gpu-kernels
#
# Needs nvcc, cmake and a Python (PYTHON=...) with torch, numpy and pytest; blockcache itself need
# not be installed. Fails at the first thing that is wrong.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
python=${PYTHON:-python3}
out=${1:-build/gpu-kernels}
mkdir -p "$out"

echo "== build, warnings being errors"
cmake -S . -B build/gpu-cmake -DBLOCKCACHE_CUDA=ON -DBLOCKCACHE_WERROR=ON >"$out/cmake.log"
cmake --build build/gpu-cmake -j >>"$out/cmake.log"
"$python" tools/dev/link_types.py # makes build/typing/blockcache, importable as it is
export PYTHONPATH=$PWD/build/typing${PYTHONPATH:+:$PYTHONPATH}
export BLOCKCACHE_KERNELS_DIR=$PWD/build/gpu-cmake

echo "== tests"
tests=(-m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_cuda_kernels.py)
"$python" "${tests[@]}" | tee "$out/tests.log"
grep -q " passed" "$out/tests.log" || {
  echo "error: every test was skipped: is there a GPU, and does $python have torch?" >&2
  exit 1
}

echo "== compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation of its own: overruns show
  for tool in memcheck initcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" "$python" "${tests[@]}" >"$out/$tool.log" 2>&1 || true
    # Only a report names a kernel; one of torch's own kernels is not ours to mend.
    if grep "blockcache::" "$out/$tool.log" || ! grep -q " passed" "$out/$tool.log"; then
      echo "error: $tool is not clean, see $out/$tool.log" >&2
      exit 1
    fi
    echo "$tool: $(grep "SUMMARY" "$out/$tool.log")"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "compute-sanitizer is not on PATH: not checked"
fi

echo "== time"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv | tee "$out/device.csv"
"$python" -m blockcache.tools.bench.kernels --json "$out/kernels.json" | tee "$out/kernels.md"
