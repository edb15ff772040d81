#!/usr/bin/env bash
# The steps of quantkit in continuous integration: on GitHub (action.yml), on GitLab
# (ci/gitlab.yml) and on any machine. docs/ci.md shows whole pipelines.
#
# usage: ci/steps.sh install|plan|quantize|publish|release
#   install   quantkit into a virtual environment of its own
#   plan      say what the job would do and take, or the problems; comment on the pull request
#   quantize  the whole job with its gate: artifact, report, JUnit file, verdict
#   publish   send an output to the Hub; refused unless it passed and is unchanged
#   release   quantize, then publish what passed; where the recipe's own `publish` has done so, only
#             the tag and the alias are set
#
# The exit code is quantkit's own (docs/errors.md). All else comes in variables, never in the text
# of a command, so that no name that somebody else chose is ever run:
#   QUANTKIT_RECIPE, QUANTKIT_MODEL, QUANTKIT_OUTPUT, QUANTKIT_DEVICE   as the options of quantkit
#   QUANTKIT_OVERRIDES        KEY=VALUE, one a line
#   QUANTKIT_OVERWRITE        true: replace an output that exists
#   QUANTKIT_REPO, QUANTKIT_REVISION, QUANTKIT_TAG, QUANTKIT_ALIAS, QUANTKIT_VARIANT   as the
#                             options of `quantkit publish`
#   QUANTKIT_PUBLIC, QUANTKIT_PULL_REQUEST, QUANTKIT_REPLACE, QUANTKIT_DRY_RUN   true: likewise
#   QUANTKIT_COMMENT          false: no comment; QUANTKIT_COMMENT_AUTHOR: whose comment is replaced
#   QUANTKIT_PLAN_FILE        where `plan` leaves its page, too
#   QUANTKIT_INSTALL          action (this checkout), none, or what pip is to install instead
#   QUANTKIT_EXTRAS           extras of this checkout, for instance onnx,llama-cpp
#   QUANTKIT_VENV             the virtual environment (default: below $RUNNER_TEMP, else here)
#   HF_TOKEN                  for gated models, and to publish
#   GITHUB_TOKEN              for the comment; on GitLab QUANTKIT_GITLAB_TOKEN
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${QUANTKIT_VENV:-${RUNNER_TEMP:-$PWD}/quantkit-venv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What comments is for this script alone: no other process inherits it.
github_token=${GITHUB_TOKEN:-}
gitlab_token=${QUANTKIT_GITLAB_TOKEN:-}
unset GITHUB_TOKEN QUANTKIT_GITLAB_TOKEN
[[ -n "${HF_TOKEN:-}" ]] || unset HF_TOKEN

say() {
  echo "quantkit: $1" >&2
}

on_github() {
  [[ "${GITHUB_ACTIONS:-}" == true ]]
}

# annotate error|warning TEXT: a line of the log, which GitHub also shows beside the run.
annotate() {
  local text=$2
  if on_github; then
    text=${text//'%'/'%25'} text=${text//$'\r'/'%0D'} text=${text//$'\n'/'%0A'}
    echo "::$1 title=quantkit::$text" >&2
  else
    say "$1: $text"
  fi
}

fail() {
  annotate error "$1"
  exit 2
}

# emit NAME VALUE: an output of the step.
emit() {
  if [[ -n "${GITHUB_OUTPUT:-}" ]]; then
    printf '%s=%s\n' "$1" "${2//[$'\r\n']/ }" >>"$GITHUB_OUTPUT"
  fi
}

# summarize: what comes on stdin is shown on the page of the run, where there is one.
summarize() {
  local page=${GITHUB_STEP_SUMMARY:-/dev/null}
  # Read to its end in any case: a writer whose pipe is closed would end with a code of its own.
  cat >>"$page"
  echo >>"$page"
}

# run COMMAND...: GitHub takes no line of its output, which may quote a model's files, for a command.
run() {
  local code=0 word=""
  if on_github; then
    word=$(python3 -c 'import secrets; print(secrets.token_hex(16))')
    echo "::stop-commands::$word" >&2
  fi
  "$@" || code=$?
  [[ -z "$word" ]] || echo "::$word::" >&2
  return "$code"
}

# read_key FILE KEY: a string or a number of a JSON document; nothing where there is none.
read_key() {
  python3 - "$1" "$2" <<'PYTHON'
import json, sys
try:
    with open(sys.argv[1], encoding="utf-8") as file:
        found = json.load(file).get(sys.argv[2])
except (OSError, ValueError, AttributeError):
    found = None
print(found if isinstance(found, (str, int, float)) else "")
PYTHON
}

# take_key FILE KEY: an object of a JSON document; fails where there is none.
take_key() {
  python3 - "$1" "$2" <<'PYTHON'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    found = json.load(file).get(sys.argv[2])
if not found:
    sys.exit(1)
json.dump(found, sys.stdout)
PYTHON
}

find_quantkit() {
  if [[ -x "$venv/bin/quantkit" ]]; then PATH="$venv/bin:$PATH"; fi
  command -v quantkit >/dev/null || fail "quantkit is not installed: run ci/steps.sh install first"
}

# --- install --------------------------------------------------------------------------------------

install() {
  local what=${QUANTKIT_INSTALL:-action} extras=${QUANTKIT_EXTRAS:-} lock needs
  unset HF_TOKEN
  if [[ "$what" == none ]]; then
    find_quantkit
    run quantkit --version >&2
    return
  fi
  [[ -x "$venv/bin/python" ]] || python3 -m venv "$venv" || fail "cannot make $venv with python3"
  "$root/scripts/install_pip.sh" "$venv" >&2
  "$root/scripts/install_torch.sh" "$venv" constraints.txt >&2
  lock=$("$root/scripts/choose_lock.sh" constraints.txt)
  needs=$("$venv/bin/python" "$root/scripts/list_requirements.py" ${extras//,/ }) ||
    fail "cannot read what quantkit needs with the extras '$extras'"
  # Built in isolation, with locked tools, whatever the runner prefers.
  env -u PIP_NO_BUILD_ISOLATION "$venv/bin/python" -m pip --disable-pip-version-check install -q \
    -c "$lock" --build-constraint "$lock" -r <(echo "$needs") hatchling >&2 ||
    fail "cannot install what quantkit needs; see pip's message above"
  # A folder has no hash; all that it needs is there, and what builds it.
  if [[ "$what" == action ]]; then
    set -- --no-deps --no-build-isolation "$root"
  else
    set -- -c "$root/constraints.txt" "$what"
  fi
  "$venv/bin/python" -m pip --disable-pip-version-check install -q "$@" >&2 ||
    fail "cannot install $what; see pip's message above"
  if [[ -n "${GITHUB_PATH:-}" ]]; then echo "$venv/bin" >>"$GITHUB_PATH"; fi
  find_quantkit
  run quantkit --version >&2
}

# --- plan -----------------------------------------------------------------------------------------

# Sets `arguments`: what plan and quantize are both given.
read_arguments() {
  local line
  [[ -n "${QUANTKIT_RECIPE:-}" ]] || fail "no recipe: name a file or a shipped one as recipe"
  arguments=("--recipe=$QUANTKIT_RECIPE")
  [[ -z "${QUANTKIT_MODEL:-}" ]] || arguments+=("--model=$QUANTKIT_MODEL")
  [[ -z "${QUANTKIT_OUTPUT:-}" ]] || arguments+=("--output=$QUANTKIT_OUTPUT")
  [[ -z "${QUANTKIT_DEVICE:-}" ]] || arguments+=("--device=$QUANTKIT_DEVICE")
  [[ "${QUANTKIT_OVERWRITE:-}" != true ]] || arguments+=(--overwrite)
  while IFS= read -r line; do
    line=${line%$'\r'}
    [[ -z "${line//[[:space:]]/}" ]] || arguments+=("--set=$line")
  done <<<"${QUANTKIT_OVERRIDES:-}"
}

plan() {
  local page=$work/plan.md code=0
  read_arguments
  run quantkit plan "${arguments[@]}" "--markdown=$page" >&2 || code=$?
  emit exit-code "$code"
  if [[ ! -s "$page" ]]; then
    annotate error "quantkit plan ended with exit code $code and left no page; see the log"
    return "$code"
  fi
  summarize <"$page"
  if [[ -n "${QUANTKIT_PLAN_FILE:-}" ]]; then cp "$page" "$QUANTKIT_PLAN_FILE"; fi
  if [[ "${QUANTKIT_COMMENT:-true}" == true ]]; then comment "$page"; fi
  return "$code"
}

# --- the comment ----------------------------------------------------------------------------------

comment() {
  local number=""
  if [[ -n "${GITHUB_EVENT_PATH:-}" ]]; then
    number=$(python3 - "$GITHUB_EVENT_PATH" <<'PYTHON'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    print((json.load(file).get("pull_request") or {}).get("number", ""))
PYTHON
    )
    if [[ -z "$number" ]]; then
      say "this is no pull request: the plan is in the summary of the run alone"
    elif [[ -z "$github_token" ]]; then
      annotate warning "no github-token: the plan is in the summary of the run alone"
    else
      header="Authorization: Bearer $github_token"
      put_comment "$1" "${QUANTKIT_COMMENT_AUTHOR:-github-actions[bot]}" PATCH \
        "$GITHUB_API_URL/repos/$GITHUB_REPOSITORY/issues/$number/comments" \
        "$GITHUB_API_URL/repos/$GITHUB_REPOSITORY/issues/comments"
    fi
  elif [[ -n "${CI_MERGE_REQUEST_IID:-}" ]]; then
    if [[ -z "$gitlab_token" ]]; then
      annotate warning "no QUANTKIT_GITLAB_TOKEN: the plan is not put on the merge request"
    else
      header="PRIVATE-TOKEN: $gitlab_token"
      local notes="$CI_API_V4_URL/projects/$CI_PROJECT_ID/merge_requests/$CI_MERGE_REQUEST_IID/notes"
      local author=${QUANTKIT_COMMENT_AUTHOR:-}
      if [[ -z "$author" ]] && request GET "$CI_API_V4_URL/user"; then
        author=$(read_key "$work/answer.json" username)
      fi
      put_comment "$1" "$author" PUT "$notes" "$notes"
    fi
  else
    say "this is no pull or merge request: no comment"
  fi
}

# put_comment PAGE AUTHOR VERB LIST ONE: replaces the author's comment that begins with the page's
# first line, or adds one. A plan counts whether or not it can be shown: failing is a warning.
put_comment() {
  local page=$1 author=$2 verb=$3 list=$4 one=$5 mark id="" count=100 number=1
  IFS= read -r mark <"$page"
  while [[ -z "$id" && "$count" == 100 && "$number" -le 50 ]]; do
    request GET "$list?per_page=100&page=$number" || return 0
    if ! IFS=: read -r id count < <(find_comment "$mark" "$author"); then
      annotate warning "cannot comment: $list did not answer with a list of comments"
      return 0
    fi
    number=$((number + 1))
  done
  python3 - "$page" >"$work/body.json" <<'PYTHON'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    json.dump({"body": file.read()}, sys.stdout)
PYTHON
  if [[ -n "$id" ]]; then
    request "$verb" "$one/$id" "$work/body.json" || return 0
    say "the plan replaces the one of comment $id"
  else
    request POST "$list" "$work/body.json" || return 0
    say "the plan is put into a comment"
  fi
}

# Prints ID:COUNT for the comments of the last answer; no ID where the author has none.
find_comment() {
  python3 - "$work/answer.json" "$1" "$2" <<'PYTHON'
import json, sys
path, mark, author = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    comments = json.load(file)
def writer(comment):
    return (comment.get("user") or {}).get("login") or (comment.get("author") or {}).get("username")
found = [
    each["id"]
    for each in comments
    if (each.get("body") or "").startswith(mark) and writer(each) == author
]
print(f"{found[0] if found else ''}:{len(comments)}")
PYTHON
}

# request METHOD URL [BODY]: leaves the answer in a file; warns where there is no good one. The
# token goes in by stdin: everybody on the machine can read the arguments of a process.
request() {
  local method=$1 url=$2 body=${3:-} said options=()
  [[ "$method" != GET ]] || options+=(--retry 3)
  [[ -z "$body" ]] || options+=(--header "Content-Type: application/json" --data-binary "@$body")
  if [[ "$header" == *[\"\\$'\n']* ]]; then
    annotate warning "cannot comment: the token for comments holds characters of no token"
    return 1
  fi
  : >"$work/answer.json"
  if printf 'header = "%s"\n' "$header" | curl --config - --silent --show-error --fail-with-body \
    --max-time 60 --request "$method" "${options[@]}" --output "$work/answer.json" \
    --url "$url" 2>"$work/curl.txt"; then
    return 0
  fi
  said=$(read_key "$work/answer.json" message)
  annotate warning "cannot comment: $(tail -n 1 "$work/curl.txt")${said:+ ($said)}; a token for \
comments may need more rights, as docs/ci.md says"
  return 1
}

# --- quantize and publish -------------------------------------------------------------------------

# show_error COMMAND FILE CODE: why a command ended, on the page of the run.
show_error() {
  local message
  message=$(read_key "$2" error)
  message=${message:-"it left no answer; see the log"}
  annotate error "quantkit $1 (exit code $3): $message"
  {
    printf '## ❌ quantkit %s: exit code %s\n\n' "$1" "$3"
    # Indented, nothing in it is Markdown.
    tr -d '\r' <<<"$message" | sed 's/^/    /'
  } | summarize
}

# Sets `output`: the folder that the job has made; and `published`: where the recipe's own `publish`
# has sent it.
quantize() {
  local result=$work/quantize.json code=0 verdict
  published=""
  read_arguments
  # Nothing is sent, by the recipe's own `publish` either.
  [[ "${QUANTKIT_DRY_RUN:-}" != true ]] || arguments+=("--set=publish=null")
  run quantkit quantize "${arguments[@]}" --json >"$result" || code=$?
  verdict=$(read_key "$result" verdict)
  output=$(read_key "$result" output)
  emit exit-code "$code"
  emit verdict "${verdict:-ERROR}"
  if [[ -z "$verdict" ]]; then
    show_error quantize "$result" "$code"
    return "$code"
  fi
  say "$verdict: $output"
  emit output "$output"
  emit report "$output/report/report.html"
  emit junit "$output/report/junit.xml"
  summarize <"$output/report/report.md"
  if take_key "$result" publication >"$work/publication.json"; then
    published=$(read_key "$work/publication.json" repo)
    tell_publication "$work/publication.json"
  fi
  [[ "$code" == 0 ]] || annotate error "the verdict is $verdict (exit code $code): $output/report/report.md says why"
  return "$code"
}

publish() {
  local folder=$1 result=$work/publish.json code=0 told
  told=(--json)
  [[ -n "$folder" ]] || fail "no output: name the folder that quantkit quantize has written"
  [[ -z "${QUANTKIT_REPO:-}" ]] || told+=("--repo=$QUANTKIT_REPO")
  [[ -z "${QUANTKIT_REVISION:-}" ]] || told+=("--revision=$QUANTKIT_REVISION")
  [[ -z "${QUANTKIT_TAG:-}" ]] || told+=("--tag=$QUANTKIT_TAG")
  [[ -z "${QUANTKIT_ALIAS:-}" ]] || told+=("--alias=$QUANTKIT_ALIAS")
  [[ -z "${QUANTKIT_VARIANT:-}" ]] || told+=("--variant=$QUANTKIT_VARIANT")
  [[ "${QUANTKIT_PUBLIC:-}" != true ]] || told+=(--public)
  [[ "${QUANTKIT_PULL_REQUEST:-}" != true ]] || told+=(--pull-request)
  [[ "${QUANTKIT_REPLACE:-}" != true ]] || told+=(--replace)
  [[ "${QUANTKIT_DRY_RUN:-}" != true ]] || told+=(--dry-run)
  run quantkit publish "${told[@]}" -- "$folder" >"$result" || code=$?
  if [[ "$code" != 0 ]]; then
    show_error publish "$result" "$code"
    return "$code"
  fi
  tell_publication "$result"
}

# publish_rest: what the recipe's own `publish` has not done. What it has sent is not sent again, and
# gets the tag and the alias that were asked for besides.
publish_rest() {
  local asked=${QUANTKIT_TAG:-}${QUANTKIT_ALIAS:-}${QUANTKIT_VARIANT:-}${QUANTKIT_REVISION:-}
  if [[ -n "$published" && "${QUANTKIT_REPO:-$published}" == "$published" ]]; then
    if [[ -n "$asked" && -n "$(read_key "$work/publication.json" pull_request)" ]]; then
      annotate warning "the recipe has proposed a pull request: tag, alias and the like are left out"
      asked=""
    fi
    [[ -n "$asked" ]] || return 0
    QUANTKIT_REPO=$published
    QUANTKIT_REVISION=${QUANTKIT_REVISION:-$(read_key "$work/publication.json" revision)}
  fi
  publish "$output"
}

# tell_publication FILE: the address as an output, and what went where on the page of the run.
tell_publication() {
  local url
  url=$(read_key "$1" url)
  emit url "$url"
  if [[ "$(read_key "$1" dry_run)" == True ]]; then
    say "nothing was sent: this was a dry run"
  else
    say "published: $url"
  fi
  show_publication "$1" | summarize
}

# Indented, nothing in it is Markdown.
show_publication() {
  python3 - "$1" <<'PYTHON'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    found = json.load(file)
print(f"### {'What would be published' if found.get('dry_run') else 'Published'}\n")
for name in ("repo", "url", "revision", "commit", "tag", "alias", "pull_request", "serve"):
    if found.get(name):
        print(f"    {name:<13}{' '.join(str(found[name]).split())}")
print(f"    files        {len(found.get('files', []))}, {found.get('sent_bytes', 0):,} bytes sent")
for note in found.get("notes", []):
    print(f"    note         {' '.join(note.split())}")
PYTHON
}

case "${1:-}" in
  install) install ;;
  plan)
    find_quantkit
    plan
    ;;
  quantize)
    find_quantkit
    quantize
    ;;
  publish)
    find_quantkit
    publish "${QUANTKIT_OUTPUT:-}"
    ;;
  release)
    find_quantkit
    quantize
    publish_rest
    ;;
  *) fail "there is no step '${1:-}': use install, plan, quantize, publish or release" ;;
esac
