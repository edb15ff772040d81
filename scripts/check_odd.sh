#!/usr/bin/env bash
# Run the tests on a machine that is unlike the developer's, in all of these at once: no network
# but loopback, a user without root, a home folder that cannot be written, a path with blanks and
# letters beyond ASCII, Python without its assert statements (-O), temporary files on another file
# system.
#
# usage: scripts/check_odd.sh [PYTEST ARGUMENT...]
#   JOBS=N             pytest's processes (2)
#   ODD_WITHOUT=A,B    leave conditions out, to find the one that a test fails of:
#                      network, root, home, path, optimize, tmp
#
# Root does it in namespaces, which end with it; others do where the kernel lets them make some, and
# else with what is left, which is said. Nothing is changed outside of a new folder in $TMPDIR, which
# is removed.
set -euo pipefail

CONDITIONS=(network root home path optimize tmp)
NOBODY=65534

fail() {
  echo "odd: $1" >&2
  exit 1
}

wanted() { # whether condition $1 is not left out
  [[ ",${ODD_WITHOUT:-}," != *",$1,"* ]]
}

# --- as who called: a folder with a copy of the files that git knows or would

copy_files() { # FROM TO
  (
    cd "$1"
    git ls-files -z --cached --others --exclude-standard -- ':(exclude).venv*' |
      while IFS= read -r -d '' file; do [[ ! -e "$file" ]] || printf '%s\0' "$file"; done |
      tar --create --null --no-recursion --files-from - | tar --extract --directory "$2"
  )
  git -C "$2" init --quiet
}

start() { # ARGUMENT...: go on in namespaces where they can be had
  local root name without=${ODD_WITHOUT:-} made=(unshare --mount)
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  for name in ${without//,/ }; do
    [[ " ${CONDITIONS[*]} " == *" $name "* ]] ||
      fail "ODD_WITHOUT: '$name' is none of: ${CONDITIONS[*]}"
  done
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/quantkit-odd.XXXXXX")
  trap 'chmod u+w "$scratch/home"; rm -rf "$scratch"' EXIT
  chmod 755 "$scratch"
  place="$scratch/straight"
  if wanted path; then place="$scratch/ein Pfad mit Löchern é"; fi
  mkdir -p "$place" "$scratch/home" "$scratch/tmp" "$scratch/bytecode" "$scratch/below"
  copy_files "$root" "$place"

  python=$("$root/.venv/bin/python" -c 'import sys; print(sys._base_executable)')
  prefix=$("$root/.venv/bin/python" -c 'import sys; print(sys.base_prefix)')
  packages=$(echo "$root"/.venv/lib/python*/site-packages)
  user=$(id -u) group=$(id -g)
  if wanted network; then made+=(--net); fi
  if ((user != 0)); then made+=(--map-root-user); fi
  export scratch place python prefix packages user group
  if "${made[@]}" true 2>/dev/null; then
    "${made[@]}" bash "${BASH_SOURCE[0]}" --within "$@"
  else
    ((user != 0)) || ! wanted root || fail "root may make no namespaces here: call it as another user"
    if wanted tmp; then
      elsewhere=$(mktemp -d /dev/shm/quantkit-odd.XXXXXX) || fail "no other file system for TMPDIR"
      rmdir "$scratch/tmp"
      ln -s "$elsewhere" "$scratch/tmp"
      trap 'chmod u+w "$scratch/home"; rm -rf "$scratch" "$elsewhere"' EXIT
    fi
    run_tests "a hook in every Python: this kernel gives no namespaces" "$@"
  fi
}

# --- in the namespaces, as their root

as_user=()

# Let the other user reach each PATH, though it may lie in root's home: the first folder above that
# is closed to him is covered by an empty one, in which PATH alone is.
open_passage() {
  local number path above part parts
  for number in $(seq $#); do
    mkdir "$scratch/below/$number"
    mount --bind "${!number}" "$scratch/below/$number"
  done
  for number in $(seq $#); do
    path=${!number}
    if "${as_user[@]}" test -x "$path"; then continue; fi
    above=""
    IFS=/ read -ra parts <<<"${path#/}"
    for part in "${parts[@]}"; do
      above="$above/$part"
      if [[ -d "$above" ]] && ! "${as_user[@]}" test -x "$above"; then
        mount -t tmpfs -o mode=755 tmpfs "$above"
        break
      fi
    done
    mkdir -p "$path"
    mount --bind "$scratch/below/$number" "$path"
  done
}

enter() { # ARGUMENT...
  if wanted network; then ip link set lo up || fail "cannot switch the loopback device on"; fi
  if wanted tmp; then mount -t tmpfs tmpfs "$scratch/tmp"; fi
  if ((user != 0)); then
    as_user=(unshare --user "--map-user=$user" "--map-group=$group")
  elif wanted root; then
    as_user=(setpriv "--reuid=$NOBODY" "--regid=$NOBODY" --clear-groups)
    chown -R "$NOBODY:$NOBODY" "$place" "$scratch/tmp" "$scratch/bytecode"
    open_passage "$prefix" "$packages"
    # Root's compilers have been seen to take others their right to it: `ld -o /dev/null`.
    if ! "${as_user[@]}" test -w /dev/null; then
      mknod --mode=666 "$scratch/below/null" c 1 3
      mount --bind "$scratch/below/null" /dev/null
    fi
  fi
  # For root alone, what its mode says is no hindrance.
  if wanted home && ((user == 0)) && ! wanted root; then
    mount -t tmpfs -o ro tmpfs "$scratch/home"
  fi
  run_tests "a namespace, for all processes" "$@"
}

# --- as the user: an environment for the copy, and the tests

run_tests() { # HOW-THE-NETWORK-IS-CUT ARGUMENT...
  local cut=$1 kept=() name own
  shift
  for name in "${CONDITIONS[@]}"; do
    if wanted "$name"; then kept+=("$name"); fi
  done
  echo "odd: ${kept[*]}"
  if wanted network; then echo "odd: no network by $cut"; fi
  if wanted home; then
    if [[ -w "$scratch/home" ]]; then chmod 555 "$scratch/home"; fi
    export HOME=$scratch/home
  fi
  if wanted optimize; then export PYTHONOPTIMIZE=1; fi
  # No package has bytecode for -O yet, and none may be written beside it.
  export PYTHONPYCACHEPREFIX=$scratch/bytecode TMPDIR=$scratch/tmp QUANTKIT_ODD="${kept[*]}"
  export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  unset XDG_CACHE_HOME XDG_DATA_HOME XDG_CONFIG_HOME HF_HOME USER LOGNAME
  cd "$place"
  "${as_user[@]}" "$python" -m venv --without-pip .venv
  # quantkit is the copy's, all else the other environment's, whose own .pth files are not read.
  own=$(echo .venv/lib/python*/site-packages)
  printf '%s\n' "$PWD" "$packages" | "${as_user[@]}" tee "$own/odd.pth" >/dev/null
  if wanted network && [[ "$cut" == "a hook"* ]]; then
    { cat tests/loopback.py && echo "sys.addaudithook(refuse)"; } >"$own/sitecustomize.py"
  fi
  "${as_user[@]}" .venv/bin/python -m pytest -q -m odd tests/test_odd.py
  "${as_user[@]}" .venv/bin/python -m pytest -q -n "${JOBS:-2}" "$@"
}

if [[ "${1:-}" == --within ]]; then
  enter "${@:2}"
else
  start "$@"
fi
