#!/usr/bin/env bash
# Find Chromium, which the test of report.html drives, or install it where that needs no questions.
#
# usage: scripts/setup_chromium.sh
#   prints the browser's path, once it has shown a page
#   CHROMIUM=...  chooses the browser (Chromium or Chrome, from version 112 on)
set -euo pipefail

seconds=60

find_browser() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
    if command -v "$name"; then
      return 0
    fi
  done
  return 1
}

# Installed is not runnable: on Ubuntu the package only asks for a snap, and in a container there may
# be no place for its profile or no kernel feature that it needs.
check_start() {
  local scratch page
  scratch=$(mktemp -d)
  trap "rm -rf '$scratch'" EXIT
  page=$(timeout -k 5 "$seconds" "$1" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage \
    --no-first-run --user-data-dir="$scratch" --dump-dom about:blank < /dev/null 2> /dev/null) &&
    [[ "$page" == *"<html>"* ]]
}

if [[ -n "${CHROMIUM:-}" ]]; then
  browser=$(command -v "$CHROMIUM") || {
    echo "set-up: CHROMIUM=$CHROMIUM is no program" >&2
    exit 1
  }
elif ! browser=$(find_browser); then
  if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
    echo "set-up: no Chromium or Chrome is installed: install one, or name it with CHROMIUM=..." >&2
    exit 1
  fi
  echo "set-up: chromium, with apt-get" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y \
    --no-install-recommends chromium; } >&2 || {
    echo "set-up: cannot install chromium; see apt-get's message above" >&2
    exit 1
  }
  browser=$(find_browser) || {
    echo "set-up: apt-get installed no browser: name one with CHROMIUM=..." >&2
    exit 1
  }
fi
check_start "$browser" || {
  echo "set-up: $browser cannot show an empty page (in $seconds seconds): run it to see why" >&2
  exit 1
}
echo "$browser"
