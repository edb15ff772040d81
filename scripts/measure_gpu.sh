#!/usr/bin/env bash
# Test and measure quantkit on a machine with a CUDA device, unattended, in stages. A call that is
# stopped or runs out of time is gone on with by the next one: what is done is not done again.
#
# usage: scripts/measure_gpu.sh [--minutes N] [--repeats N] [--work FOLDER] [--results FOLDER]
#                               [--full-rival] [--device cpu --tiny] [--again] [--dry-run]
#   --minutes N    begin no stage that would outlast so many minutes (default: no limit)
#   --repeats N    runs of each case (default 3)
#   --work         keeps checkpoints, logs and what is done (default artifacts/measure-gpu)
#   --results      where performance.json and performance.md go (default: $OUT where it is set,
#                  else benchmarks/results, whose results are merged and not replaced)
#   --full-rival   compare on all blocks of the 8B model too: llm-compressor takes long
#   --device cpu --tiny   try the stages without a GPU, on a model of 3 MB
#   --again        forget what is done; the checkpoints stay
#   --dry-run      print the stages, and run none
#   QUANTKIT_PYTHON=...  an interpreter that has what quantkit needs (default: .venv, which is made
#                        where it is missing: only that needs a network)
#   RIVAL_PYTHON=...     one that has llm-compressor (default .venv-rival/bin/python); without it
#                        quantkit is measured alone, and what is promised against it is not judged
# Exits 0 when all is done and kept, 1 when a test failed or a promise is not kept, 75 when stages
# are left for the next call.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
minutes="" repeats=3 work="$root/artifacts/measure-gpu" results="" device=cuda tiny="" full="" again="" dry=""
while (($#)); do
  case "$1" in
    --minutes | --repeats | --work | --results | --device)
      (($# > 1)) || { echo "measure_gpu: $1 needs a value; see --help" >&2 && exit 2; }
      ;;&
    --minutes) minutes=$2 && shift ;;
    --repeats) repeats=$2 && shift ;;
    --work) mkdir -p "$2" && work=$(cd "$2" && pwd) && shift ;;
    --results) mkdir -p "$2" && results=$(cd "$2" && pwd) && shift ;;
    --device) device=$2 && shift ;;
    --tiny) tiny=--tiny ;;
    --full-rival) full=yes ;;
    --again) again=yes ;;
    --dry-run) dry=yes ;;
    --help | -h) sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) echo "measure_gpu: unknown argument $1; see --help" >&2 && exit 2 ;;
  esac
  shift
done
if [[ "$device" == cpu && -z "$tiny" ]]; then
  echo "measure_gpu: --device cpu only tries the stages: add --tiny" >&2
  exit 2
fi

python=${QUANTKIT_PYTHON:-$root/.venv/bin/python}
rival=${RIVAL_PYTHON:-$root/.venv-rival/bin/python}
# Merged where they stay from call to call, and copied from there.
kept=$work/results
if [[ -z "$tiny" && -z "$results" && -z "${OUT:-}" ]]; then kept=$root/benchmarks/results; fi
copied=${results:-${OUT:-}}
finished=$work/done
[[ -n "$again" ]] && rm -rf "$finished"
left=() failed=()

remaining() {
  echo $((minutes * 60 - SECONDS))
}

say() {
  local time="$SECONDS s"
  [[ -n "$minutes" ]] && time="$time, $(remaining) s left"
  echo "== $1 ($time)"
}

# Copy what is kept to where it is wanted: a call that is stopped has handed over what it had.
hand_over() {
  if [[ -n "$copied" && "$copied" != "$kept" ]] && compgen -G "$kept/performance.*" >/dev/null; then
    mkdir -p "$copied"
    cp "$kept"/performance.* "$copied"/
  fi
}

# stage NAME SECONDS COMMAND...: run the command unless it is done or would take too long. Exit code
# 1 is a finding that stays; any other failure is tried again by the next call.
stage() {
  local name=$1 needed=$2 code=0
  shift 2
  if [[ -n "$dry" ]]; then
    echo "$name, about $needed s: $*"
    return
  fi
  if [[ -f "$finished/$name" ]]; then
    code=$(<"$finished/$name")
    say "$name: done before"
  elif [[ -n "$minutes" ]] && ((needed > $(remaining))); then
    say "$name: left for the next call, needs about $needed s"
    left+=("$name")
    return
  else
    say "$name"
    "$@" || code=$?
    if ((code <= 1)); then
      mkdir -p "$finished"
      echo "$code" >"$finished/$name"
    fi
    hand_over
  fi
  ((code == 0)) || failed+=("$name")
}

measure() {
  "$python" benchmarks/run.py "$@" --device "$device" ${tiny:+"$tiny"} --work "$work" --results "$kept"
}

against=(--alone)
if [[ -x "$rival" ]]; then
  against=(--rival "$rival")
else
  echo "measure_gpu: no $rival (scripts/setup_rival.sh makes it): quantkit is measured alone"
fi

if [[ -z "${QUANTKIT_PYTHON:-}" ]]; then stage setup 600 scripts/setup.sh; fi
stage tests 120 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu
stage write-8b 120 measure gptq-8b --prepare
stage gptq-8b $((60 + 140 * repeats)) measure gptq-8b --alone --repeats "$repeats"
stage rtn-8b $((30 + 150 * repeats)) measure rtn-8b "${against[@]}" --repeats "$repeats"
stage fp8-8b $((30 + 150 * repeats)) measure fp8-8b "${against[@]}" --repeats "$repeats"
stage write-70b-block 60 measure gptq-70b-block --prepare
stage gptq-70b-block $((30 + 100 * repeats)) measure gptq-70b-block --repeats "$repeats"
if [[ -x "$rival" ]]; then
  # On four blocks, and named so in the results: all of them take the rival much longer.
  stage gptq-8b-4-blocks 480 measure gptq-8b --layers 4 "${against[@]}" --repeats 1
  if [[ -n "$full" ]]; then
    stage gptq-8b-rival 3000 measure gptq-8b "${against[@]}" --repeats "$repeats" --rival-repeats 1
  fi
fi
[[ -n "$dry" ]] && exit 0

hand_over
say "results in ${copied:-$kept}"
if ((${#failed[@]})); then echo "measure_gpu: failed or not kept: ${failed[*]}"; fi
if ((${#left[@]})); then
  echo "measure_gpu: left for the next call: ${left[*]}"
  exit 75
fi
((${#failed[@]} == 0))
