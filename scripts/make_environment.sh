#!/usr/bin/env bash
# Make a virtual environment with some packages at the versions of a constraints file; instant
# when it is there already.
#
# usage: scripts/make_environment.sh VENV CONSTRAINTS PACKAGE...
#   CONSTRAINTS is one of the project's; the files must have the hashes of its lock.
#   A package written as name: is installed without its dependencies, after theirs: what its
#   metadata asks for is installed first, less the packages that the constraints do not name.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$1
constraints=$2
shift 2

fail() {
  echo "set-up: $1" >&2
  exit 1
}

base=$("$root/scripts/find_python.sh")
lock=$("$root/scripts/choose_lock.sh" "$constraints")
key=$("$base" -c 'import hashlib, sys
text = repr(sys.argv[2:] + [sys.version]).encode() + open(sys.argv[1], "rb").read()
print(hashlib.sha256(text).hexdigest())' "$lock" "$venv" "$@")
stamp="$venv/.quantkit-setup"
if [[ "$(cat "$stamp" 2>/dev/null || true)" == "$key" ]]; then exit 0; fi

started=$SECONDS
# Most modules of such packages are never imported, and those that are, Python compiles by itself.
export PIP_COMPILE=0
if [[ -e "$venv" ]]; then
  [[ -f "$venv/pyvenv.cfg" ]] || fail "$venv exists and is not a virtual environment: move it away"
  rm -rf "$venv"
fi
echo "set-up: $venv with $*"
"$base" -m venv "$venv" || fail "cannot make a virtual environment with $base"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
"$root/scripts/install_pip.sh" "$venv"
if grep -q '^torch==' "$constraints"; then
  "$root/scripts/install_torch.sh" "$venv" "$constraints"
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for package in "$@"; do
  if [[ "$package" != *: ]]; then
    "${pip[@]}" install -qq -c "$lock" "$package" || fail "cannot install $package"
    continue
  fi
  name=${package%:}
  "${pip[@]}" download -qq --no-deps -c "$lock" -d "$scratch" "$name" ||
    fail "cannot download $name"
  "$venv/bin/python" "$root/quantkit/environments/wheel_metadata.py" needs \
    "$constraints" "$scratch" >"$scratch/requirements.txt"
  "${pip[@]}" install -qq -c "$lock" -r "$scratch/requirements.txt" ||
    fail "cannot install what $name needs"
  "${pip[@]}" install -qq --no-deps "$scratch"/*.whl || fail "cannot install $name"
done
echo "$key" >"$stamp"
echo "set-up: done in $((SECONDS - started)) s"
