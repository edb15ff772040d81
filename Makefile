# make setup   .venv in this folder, from constraints.txt (PYTHON=... chooses the interpreter)
# make demo    quantize the bundled model, judge it, print the table and where the report is
# make test    the tests, on JOBS processes
# make check   style, formatting and types
# make vllm    generate with artifacts and judge them in vLLM's CPU build, in its own environment
# make bench   the benchmarks of benchmarks/, one after the other
# make clean   everything that can be made again

SHELL := /bin/bash
BIN := .venv/bin
JOBS ?= 2
# One thread a process: the tests' tensors are too small to share out.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup demo test check format vllm bench clean

setup:
	@scripts/setup.sh

demo: setup
	$(BIN)/quantkit quantize --recipe demo --overwrite

test: setup
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(JOBS) $(ARGUMENTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

vllm: setup
	scripts/check_vllm.sh artifacts/demo/compressed-tensors
	$(TEST_ENVIRONMENT) QUANTKIT_VLLM_PYTHON=$${VLLM_ENV:-.venv-vllm}/bin/python \
	  $(BIN)/python -m pytest -q -m vllm tests/e2e/test_vllm_gate.py

bench: setup
	scripts/setup_rival.sh llm-compressor
	scripts/setup_rival.sh auto-round
	scripts/setup_rival.sh llama-cpp-python
	$(BIN)/python benchmarks/llm_compressor.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/gguf_encoding.py
	$(BIN)/python benchmarks/gguf_quality.py
	$(BIN)/python benchmarks/synthetic_2gb.py

clean:
	rm -rf .venv .venv-vllm .venv-rival .venv-auto-round .venv-llama-cpp-python artifacts build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find quantkit tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
