#!/usr/bin/env bash
# Install torch into a virtual environment: the CUDA build where there is an NVIDIA GPU, else
# a CPU build, so that a CPU machine never downloads gigabytes of CUDA libraries.
#
# usage: scripts/install_torch.sh VENV VERSION
#   QUANTKIT_TORCH=auto|cpu|cuda   overrides what nvidia-smi says (default auto)
#   QUANTKIT_TORCH_INDEX=URL       where CPU builds come from if the configured sources have none
set -euo pipefail

venv=$1
version=$2
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

# Prints "cpu" or "cuda": what the configured sources would give, from the metadata alone.
offered() {
  pip install -qq --dry-run --no-deps --ignore-installed --report - "torch==$version" |
    "$python" -c '
import json, sys
from pip._vendor.packaging.requirements import Requirement
metadata = json.load(sys.stdin)["install"][0]["metadata"]
needed = [Requirement(line) for line in metadata.get("requires_dist", [])]
libraries = [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
cuda = any(name.startswith(("nvidia-", "cuda-")) for name in libraries)
print("cuda" if cuda and not metadata["version"].endswith("+cpu") else "cpu")
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
  pip install -qq "torch==$version" || fail "cannot install torch $version; see pip's message above"
elif [[ "$(offered || true)" == cpu ]]; then
  pip install -qq --no-deps --force-reinstall "torch==$version" ||
    fail "cannot install torch $version; see pip's message above"
else
  pip install -qq --no-deps --force-reinstall --index-url "$cpu_index" "torch==$version" ||
    fail "no CPU build of torch $version: the configured package sources have none and $cpu_index gave none; set QUANTKIT_TORCH_INDEX, or QUANTKIT_TORCH=cuda to accept CUDA libraries"
fi
[[ "$(installed)" == "$version $build" ]] ||
  fail "asked for torch $version ($build), got $(installed); set QUANTKIT_TORCH to cpu or cuda"
