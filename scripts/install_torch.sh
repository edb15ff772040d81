#!/usr/bin/env bash
# Install torch into a virtual environment: the CUDA build where there is an NVIDIA GPU, else
# a CPU build, so that a CPU machine never downloads gigabytes of CUDA libraries.
#
# usage: scripts/install_torch.sh VENV CONSTRAINTS
#   CONSTRAINTS is one of the project's, and names the version; the wheel must have a hash of its lock.
#   QUANTKIT_TORCH=auto|cpu|cuda   overrides what nvidia-smi says (default auto)
#   QUANTKIT_TORCH_INDEX=URL       where CPU builds come from if the configured sources have none
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$1
lock=$("$root/scripts/choose_lock.sh" "$2")
version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$lock")
build=${QUANTKIT_TORCH:-auto}
cpu_index=${QUANTKIT_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
python="$venv/bin/python"

fail() {
  echo "set-up: $1" >&2
  exit 1
}

pip() {
  "$python" -m pip --disable-pip-version-check "$@"
}

# Prints "VERSION cpu" or "VERSION cuda" of the torch in the environment; fails where there is none.
installed() {
  "$python" - <<'PYTHON' 2>/dev/null
import importlib.metadata, importlib.util, pathlib, runpy
folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent
build = "cuda" if runpy.run_path(str(folder / "version.py")).get("cuda") else "cpu"
print(importlib.metadata.version("torch").partition("+")[0], build)
PYTHON
}

# Prints "VERSION cpu" or "VERSION cuda": what the configured sources would give, from the metadata
# alone. Where hashes count, pip prefers a file whose hash its source tells: the version of a CPU
# build, 2.13.0+cpu for instance, must be asked for by its whole name.
offered() {
  pip install -qq --dry-run --no-deps --ignore-installed --report - "torch==$version" |
    "$python" -c '
import json, sys
from pip._vendor.packaging.requirements import Requirement
metadata = json.load(sys.stdin)["install"][0]["metadata"]
needed = [Requirement(line) for line in metadata.get("requires_dist", [])]
libraries = [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
cuda = any(name.startswith(("nvidia-", "cuda-")) for name in libraries)
version = metadata["version"]
print(version, "cuda" if cuda and not version.endswith("+cpu") else "cpu")
'
}

case "$build" in
  auto)
    build=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then build=cuda; fi
    ;;
  cpu | cuda) ;;
  *) fail "QUANTKIT_TORCH is '$build': use auto, cpu or cuda" ;;
esac

if [[ "$(installed || true)" == "$version $build" ]]; then exit 0; fi

echo "set-up: torch $version, $build build"
if [[ "$build" == cuda ]]; then
  # With the libraries that it asks for.
  libraries=$("$root/scripts/choose_lock.sh" constraints-cuda.txt)
  pip install -qq -c "$lock" -c "$libraries" "torch==$version" || fail "cannot install torch $version; see pip's message above"
elif read -r whole kind < <(offered) && [[ "$kind" == cpu ]]; then
  pip install -qq --no-deps --force-reinstall -c "$lock" "torch==$whole" ||
    fail "cannot install torch $version; see pip's message above"
else
  pip install -qq --no-deps --force-reinstall --index-url "$cpu_index" -c "$lock" "torch==$version" ||
    fail "no CPU build of torch $version: the configured package sources have none and $cpu_index gave none with a known hash; set QUANTKIT_TORCH_INDEX, QUANTKIT_TORCH=cuda to accept CUDA libraries, or QUANTKIT_HASHES=off to accept another build"
fi
[[ "$(installed)" == "$version $build" ]] ||
  fail "asked for torch $version ($build), got $(installed); set QUANTKIT_TORCH to cpu or cuda"
