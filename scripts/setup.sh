#!/usr/bin/env bash
# Make .venv in the project's folder with the versions of constraints.txt, whose files must have the
# hashes of locks/; instant when nothing that it depends on has changed. PYTHON=... chooses the
# interpreter (3.11 to 3.13); QUANTKIT_TORCH=cpu|cuda overrides the choice of the torch build
# (scripts/install_torch.sh); QUANTKIT_HASHES=off does not verify (scripts/choose_lock.sh).
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
files = ("pyproject.toml", "constraints.txt", "locks/constraints.txt", "locks/constraints-cuda.txt",
         "scripts/setup.sh", "scripts/install_torch.sh")
for name in files:
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
"$root/scripts/install_pip.sh" "$venv"
"$root/scripts/install_torch.sh" "$venv" constraints.txt
echo "set-up: quantkit and its other packages"
lock=$("$root/scripts/choose_lock.sh" constraints.txt)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$base" "$root/scripts/list_requirements.py" dev >"$scratch/requirements.txt"
# What has no wheel is built in isolation, with locked tools, whatever the user prefers.
env -u PIP_NO_BUILD_ISOLATION "${pip[@]}" install -qq -c "$lock" --build-constraint "$lock" \
  -r "$scratch/requirements.txt" ||
  fail "cannot install quantkit's packages; see pip's message above"
# A folder has no hash; what builds it is installed above.
"${pip[@]}" install -qq --no-deps --no-build-isolation -e "$root" ||
  fail "cannot install quantkit; see pip's message above"
"${pip[@]}" check >/dev/null || fail "the packages do not fit together; run: $venv/bin/python -m pip check"
"$venv/bin/python" -c "import torch, quantkit" || fail "the new environment cannot import quantkit"

printf '%s\n%s\n' "$place" "$key" >"$stamp"
echo "set-up: done in $((SECONDS - started)) s"
