#!/usr/bin/env bash
# Print the file for pip's -c: the lock of a constraints file. It has the hashes of all files that
# each version may be installed from, and makes pip refuse others, and packages that it does not name.
#
# usage: scripts/choose_lock.sh CONSTRAINTS
#   QUANTKIT_HASHES=off   the constraints themselves, for sources with builds of their own: the
#                         versions are the tested ones, and what is in the files is not verified
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename "$1")
case "${QUANTKIT_HASHES:-on}" in
  on)
    if [[ ! -f "$root/locks/$name" ]]; then
      echo "set-up: locks/$name is missing: write it with scripts/supply/lock.py" >&2
      exit 1
    fi
    echo "$root/locks/$name"
    ;;
  off)
    echo "set-up: NOT VERIFIED: packages of $name, because QUANTKIT_HASHES is off" >&2
    echo "$root/$name"
    ;;
  *)
    echo "set-up: QUANTKIT_HASHES is '$QUANTKIT_HASHES': use on or off" >&2
    exit 1
    ;;
esac
