#!/usr/bin/env bash
# What needs a GPU, in stages of less than ten minutes each that need no network.
#     benchmarks/on_gpu.sh correctness    the whole suite on the device: bf16 dots, real Triton code
#     benchmarks/on_gpu.sh sanitize       out-of-bounds and misaligned accesses, uninitialised memory
# Logs go to ${OUT:-benchmarks/results}.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
mkdir -p "$out"
stage=${1:?want a stage: correctness or sanitize}
export PYTHONUNBUFFERED=1

python3 -m pip install -q --no-deps --no-build-isolation -e .
python3 -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)'

case $stage in
correctness)
    python3 -m pytest -q -n 8 tests/kernels tests/layers tests/test_checkpoint.py \
        tests/test_cli.py 2>&1 | tee "$out/correctness.log"
    ;;
sanitize)
    # Real allocations, so that the tool sees the true bounds; compile first, it slows everything.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    cases='test_no_less_accurate_than_torch or test_layer_norm or test_add_layer_norm or test_two_heads'
    for tool in memcheck initcheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
            python3 -m pytest -q -x tests/kernels -k "($cases) and float16" 2>&1 |
            tee "$out/sanitize-$tool.log"
    done
    ;;
*)
    echo "on_gpu.sh: no stage $stage, want correctness or sanitize" >&2
    exit 2
    ;;
esac
