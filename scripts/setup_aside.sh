#!/usr/bin/env bash
# Install a package beside .venv, in a folder of its own that PYTHONPATH can name: what few need, and
# what is large or changes how others behave that find it. Instant when it is there already.
#
# usage: scripts/setup_aside.sh triton|ray|mlflow|otel|modelopt
#   prints the folder
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case "${1:-}" in
  triton) packages=(triton) ;;
  # The rest of what it needs is in .venv.
  ray) packages=(ray msgpack) ;;
  # What the extra `mlflow` asks for, without what .venv has of it.
  mlflow)
    packages=(mlflow-skinny alembic cachetools cffi cryptography databricks-sdk fastapi gitdb
      GitPython google-auth importlib_metadata Mako opentelemetry-api opentelemetry-proto
      opentelemetry-sdk opentelemetry-semantic-conventions pyasn1 pyasn1_modules pycparser
      python-dotenv smmap SQLAlchemy sqlparse starlette uvicorn zipp)
    ;;
  # What the extra `otel` asks for, likewise.
  otel)
    packages=(googleapis-common-protos opentelemetry-api opentelemetry-exporter-http-transport
      opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-common
      opentelemetry-exporter-otlp-proto-http opentelemetry-proto opentelemetry-sdk
      opentelemetry-semantic-conventions)
    ;;
  # What ModelOpt needs besides to export checkpoints without a GPU; .venv has the rest.
  modelopt) packages=(nvidia-modelopt omegaconf PuLP) ;;
  *)
    echo "set-up: '${1:-}' is not installed aside: use triton, ray, mlflow, otel or modelopt" >&2
    exit 2
    ;;
esac
folder="$root/.venv-$1"
stamp="$folder/.quantkit-setup"
lock=$("$root/scripts/choose_lock.sh" constraints.txt)
key=$(cat "$lock" "$root/.venv/.quantkit-setup" | sha256sum)
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$key" ]]; then
  echo "set-up: $folder" >&2
  rm -rf "$folder"
  # Most modules are never imported, and those that are, Python compiles by itself.
  PIP_COMPILE=0 "$root/.venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps \
    -c "$lock" --target "$folder" "${packages[@]}" >&2 || {
    echo "set-up: cannot install ${packages[*]}; see pip's message above" >&2
    exit 1
  }
  echo "$key" >"$stamp"
fi
echo "$folder"
