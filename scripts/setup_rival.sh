#!/usr/bin/env bash
# Make the environment of a tool that benchmarks/ compares with.
#
# usage: scripts/setup_rival.sh [llm-compressor|auto-round|llama-cpp-python]
#   (default llm-compressor)
#   RIVAL_ENV=...   chooses the folder (default .venv-rival, .venv-auto-round, .venv-llama-cpp-python)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tool=${1:-llm-compressor}
case "$tool" in
  llm-compressor)
    folder=.venv-rival
    constraints=constraints-rival.txt
    packages=(llmcompressor)
    ;;
  auto-round)
    folder=.venv-auto-round
    constraints=constraints-auto-round.txt
    packages=(auto-round compressed-tensors)
    ;;
  llama-cpp-python)
    folder=.venv-llama-cpp-python
    constraints=constraints-llama-cpp-python.txt
    packages=(llama-cpp-python)
    ;;
  *)
    echo "set-up: '$tool' is no rival: use llm-compressor, auto-round or llama-cpp-python" >&2
    exit 2
    ;;
esac
exec "$root/scripts/make_environment.sh" "${RIVAL_ENV:-$root/$folder}" "$root/$constraints" "${packages[@]}"
