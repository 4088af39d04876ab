#!/usr/bin/env bash
# What needs a GPU: benchmarks/on_gpu.sh STAGE... The stages and the environment variables are
# described in benchmarks/stages.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.stages "$@"
