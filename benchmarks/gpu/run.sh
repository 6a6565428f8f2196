#!/usr/bin/env bash
# GPU tests, then training speed on one GPU: benchmarks/gpu/run.sh FOLDER [--tiny]
#
# Writes FOLDER/gpu.json and prints a table. Takes at most 8 minutes on one H100 or H200. Installs nothing: PYTHON
# (default python3) needs luthier's dependencies and pytest; TRL and Liger are measured if they are installed.
# --tiny measures small networks, on a CPU too, to test the script.
set -euo pipefail
folder=${1:?"usage: benchmarks/gpu/run.sh FOLDER [--tiny]"}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$folder"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
cd "$root"
"$python" benchmarks/gpu/measure.py "$folder/gpu.json" "${@:2}" --tests
