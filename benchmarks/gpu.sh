#!/bin/sh
# Checks and times the int4 core on a CUDA machine that has only torch, transformers and safetensors.
# Usage: sh benchmarks/gpu.sh [--small]     PYTHON=/path/to/python chooses the interpreter.
# Exit code: 0 all checks passed, 1 a check failed, 2 a package is missing, 3 no CUDA device.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
