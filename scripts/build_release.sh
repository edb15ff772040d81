#!/usr/bin/env bash
# Build what is released: wheel, source archive, bill of materials, and SHA256SUMS of the three.
# The same commit gives the same bytes, by any user in any folder.
#
# usage: scripts/build_release.sh [FOLDER]
#   FOLDER is dist by default. Only files that git knows are built in, as they are in the folder.
#   QUANTKIT_PYTHON=...   an interpreter with hatchling and packaging (default .venv/bin/python)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${QUANTKIT_PYTHON:-$root/.venv/bin/python}
mkdir -p "${1:-$root/dist}"
output=$(cd "${1:-$root/dist}" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# What lies about in the folder, or is ignored, must not get into the archives.
mkdir "$scratch/tree" "$scratch/built"
cd "$root"
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do if [[ -f "$file" ]]; then printf '%s\0' "$file"; fi; done |
  tar --null -T - -cf - | tar -xf - -C "$scratch/tree"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

cd "$scratch/tree"
"$python" -m hatchling build -d "$scratch/built" >/dev/null
wheel=$(basename "$scratch"/built/*.whl)
name=${wheel%-py3-none-any.whl}
"$python" "$scratch/tree/scripts/supply/bill.py" "$scratch/built/$name.cdx.json"
cd "$scratch/built"
sha256sum "$wheel" "$name.tar.gz" "$name.cdx.json" >SHA256SUMS
mv -f "$wheel" "$name.tar.gz" "$name.cdx.json" SHA256SUMS "$output"/
echo "release: $output"
cat "$output/SHA256SUMS"
