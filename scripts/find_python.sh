#!/usr/bin/env bash
# Print the path of a Python 3.11, 3.12 or 3.13; $PYTHON, where set, is the only candidate.
set -euo pipefail

version_of() { # prints 3.x, or nothing where the command is absent or does not run
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

path_of() {
  "$1" -c 'import sys; print(sys.executable)'
}

if [[ -n "${PYTHON:-}" ]]; then
  candidates=("$PYTHON")
else
  candidates=(python3 python3.13 python3.12 python3.11)
fi
for candidate in "${candidates[@]}"; do
  case "$(version_of "$candidate")" in
    3.11 | 3.12 | 3.13)
      path_of "$candidate"
      exit 0
      ;;
  esac
done
echo "set-up: no Python 3.11, 3.12 or 3.13 among: ${candidates[*]}; install one or name it: PYTHON=/path/to/python make setup" >&2
exit 2
