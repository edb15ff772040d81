#!/usr/bin/env bash
# Bring the tested pip into a virtual environment: older ones do not know hashes in constraints.
#
# usage: scripts/install_pip.sh VENV
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock=$("$root/scripts/choose_lock.sh" constraints.txt)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Its entry alone, with its hashes: any pip knows them in requirements.
awk '/^pip==/ { on = 1 } on { print; if (!/\\$/) exit }' "$lock" >"$scratch/pip.txt"
"$1/bin/python" -m pip --disable-pip-version-check install -qq -r "$scratch/pip.txt" || {
  echo "set-up: cannot reach a package index, or it has another pip; see pip's message above" >&2
  exit 1
}
