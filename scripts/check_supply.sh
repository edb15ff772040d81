#!/usr/bin/env bash
# Check what quantkit is made of: that locks and constraints agree, licences, published
# vulnerabilities, and that the release's archives are complete and work in a clean environment.
#
# usage: scripts/check_supply.sh
#   QUANTKIT_TRUST=full  the environments of benchmarks and integrations too, every hash against the
#                        package index, and an install that downloads all that quantkit needs
# What cannot be asked without a network is said to be NOT CHECKED, and is no failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python

locks=(locks/constraints.txt locks/constraints-cuda.txt locks/constraints-vllm.txt)
compare=--check
if [[ "${QUANTKIT_TRUST:-ci}" == full ]]; then
  locks=(locks/*.txt)
  compare=--compare
fi
"$python" scripts/supply/lock.py "$compare"
# What make kernels, ray and integrations have set up beside .venv.
"$python" scripts/supply/licences.py .venv-triton .venv-ray .venv-mlflow .venv-otel .venv-modelopt

scripts/make_environment.sh .venv-supply constraints-supply.txt pip-audit \
  'cyclonedx-python-lib[json-validation]'
"$python" scripts/supply/audit.py .venv-supply/bin/pip-audit "${locks[@]}"

OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
  QUANTKIT_SUPPLY_PYTHON=$PWD/.venv-supply/bin/python \
  "$python" -m pytest -q -m supply tests/supply tests/environments/test_locks.py
