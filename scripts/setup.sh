#!/usr/bin/env bash
# Make .venv in the project's folder with the versions of constraints.txt; instant when nothing
# that it depends on has changed. PYTHON=... chooses the interpreter (3.11 to 3.13);
# QUANTKIT_TORCH=cpu|cuda overrides the choice of the torch build (scripts/install_torch.sh).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/.quantkit-setup"

fail() {
  echo "set-up: $1" >&2
  exit 1
}

base=$("$root/scripts/find_python.sh")
# A moved folder or another interpreter needs a new environment; anything else only an update.
place="$root $("$base" -c 'import sys; print(sys.executable, sys.version_info[:3])')"
key=$("$base" - "$root" "${QUANTKIT_TORCH:-auto}" "$(nvidia-smi -L 2>/dev/null || true)" <<'PYTHON'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr(sys.argv[2:]).encode())
for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh", "scripts/install_torch.sh"):
    digest.update(pathlib.Path(sys.argv[1], name).read_bytes())
print(digest.hexdigest())
PYTHON
)
known=$(cat "$stamp" 2>/dev/null || true)
if [[ -x "$venv/bin/quantkit" && "$known" == "$place"$'\n'"$key" ]]; then
  exit 0
fi

started=$SECONDS
if [[ -e "$venv" && "${known%%$'\n'*}" != "$place" ]]; then
  [[ -f "$venv/pyvenv.cfg" ]] || fail "$venv exists and is not a virtual environment: move it away"
  rm -rf "$venv"
fi
echo "set-up: $venv with $("$base" --version)"
[[ -d "$venv" ]] || "$base" -m venv "$venv" ||
  fail "cannot make a virtual environment with $base (on Debian: apt-get install python3-venv)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install -qq --upgrade -c "$root/constraints.txt" pip ||
  fail "cannot reach a package index; see pip's message above"

torch=$(sed -n 's/^torch==//p' "$root/constraints.txt")
"$root/scripts/install_torch.sh" "$venv" "$torch"
echo "set-up: quantkit and its other packages"
"${pip[@]}" install -qq -c "$root/constraints.txt" -e "$root[dev]" ||
  fail "cannot install quantkit's packages; see pip's message above"
"${pip[@]}" check >/dev/null || fail "the packages do not fit together; run: $venv/bin/python -m pip check"
"$venv/bin/python" -c "import torch, quantkit" || fail "the new environment cannot import quantkit"

printf '%s\n%s\n' "$place" "$key" >"$stamp"
echo "set-up: done in $((SECONDS - started)) s"
