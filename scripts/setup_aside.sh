#!/usr/bin/env bash
# Install a package beside .venv, in a folder of its own that PYTHONPATH can name: what few need, and
# what is large or changes how others behave that find it. Instant when it is there already.
#
# usage: scripts/setup_aside.sh triton|ray
#   prints the folder
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
  triton) packages=(triton) ;;
  # The rest of what it needs is in .venv.
  ray) packages=(ray msgpack) ;;
  *)
    echo "set-up: '${1:-}' is not installed aside: use triton or ray" >&2
    exit 2
    ;;
esac
folder="$root/.venv-$1"
stamp="$folder/.quantkit-setup"
key=$(cat "$root/constraints.txt" "$root/.venv/.quantkit-setup" | sha256sum)
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$key" ]]; then
  echo "set-up: $folder" >&2
  rm -rf "$folder"
  "$root/.venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps \
    -c "$root/constraints.txt" --target "$folder" "${packages[@]}" >&2 || {
    echo "set-up: cannot install ${packages[*]}; see pip's message above" >&2
    exit 1
  }
  echo "$key" >"$stamp"
fi
echo "$folder"
