#!/usr/bin/env bash
# Test what quantkit is used inside of, with the real ones: what .venv has not of them lies in folders
# and environments beside it, which these tests alone see.
#
# usage: scripts/check_integrations.sh [--prepare]
#   --prepare  make the folders and environments, and no more
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# run FOLDERS ARGUMENT...: the integration tests with the packages of FOLDERS (joined by `:`).
run() {
  local folders=$1
  shift
  PYTHONPATH=$folders .venv/bin/python -m pytest -q -m integrations "$@"
}

# LiteLLM's proxy asks for more than it imports when it does what a gateway does: these suffice.
scripts/make_environment.sh .venv-litellm constraints-litellm.txt litellm apscheduler backoff \
  cryptography expression fastapi fastapi-sso mcp orjson pyjwt python-multipart redis soundfile \
  uvicorn uvloop websockets
mlflow=$(scripts/setup_aside.sh mlflow)
otel=$(scripts/setup_aside.sh otel)
modelopt=$(scripts/setup_aside.sh modelopt)
if [[ "${1:-}" == --prepare ]]; then exit 0; fi

# Trainings, servers and jobs of other processes: most of the time one test waits for them.
QUANTKIT_LITELLM=$PWD/.venv-litellm/bin/litellm run "$mlflow:$otel" -n 3 --dist loadfile \
  tests/integrations tests/routing tests/serving tests/ci tests/publishing tests/test_docs_python.py
# NVIDIA's ModelOpt exports without a GPU.
run "$modelopt" tests/formats/test_modelopt_readers.py
