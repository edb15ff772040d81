#!/usr/bin/env bash
# Make the environment of llm-compressor, which benchmarks/llm_compressor.py compares with.
# RIVAL_ENV=... chooses the folder (default .venv-rival).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RIVAL_ENV:-$root/.venv-rival}
exec "$root/scripts/make_environment.sh" "$venv" "$root/constraints-rival.txt" llmcompressor
