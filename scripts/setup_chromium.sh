#!/usr/bin/env bash
# Find Chromium, which the test of report.html drives, or install it where that needs no questions.
#
# usage: scripts/setup_chromium.sh
#   prints the browser's path
#   CHROMIUM=...  chooses the browser (Chromium or Chrome, from version 112 on)
set -euo pipefail

find_browser() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do
    if command -v "$name"; then
      return 0
    fi
  done
  return 1
}

if [[ -n "${CHROMIUM:-}" ]]; then
  if ! command -v "$CHROMIUM"; then
    echo "set-up: CHROMIUM=$CHROMIUM is no program" >&2
    exit 1
  fi
elif ! find_browser; then
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
  find_browser || {
    echo "set-up: apt-get installed no browser: name one with CHROMIUM=..." >&2
    exit 1
  }
fi
