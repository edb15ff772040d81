# make setup   .venv in this folder, from constraints.txt (PYTHON=... chooses the interpreter)
# make demo    quantize the bundled model, judge it, print the table and where the report is
# make test    the tests, on JOBS processes; ALSO="recipes resume" adds those of other targets
# make check   style, formatting and types
# make browser open report.html in a headless Chromium, which it installs where that needs no questions
# make recipes every shipped recipe on the bundled model, small, and the common mistakes of docs/errors.md
# make kernels the Triton kernels in Triton's interpreter, which needs no GPU
# make ranks   whole jobs by two processes, against the same by one
# make ray     sweep over recipes on Ray
# make integrations  training, tracking, servers and gateways, with the real ones of each
# make resume  kill jobs at many moments, on a full disk too, and compare what comes of them
# make trust   damage and supply: what CI runs
# make fuzz    damaged files for every reader, 10,000 of each, and the table of what came of them
# make faults  a job that is broken at every call by which it changes a folder
# make soak    200 jobs in one process: memory, files, threads
# make damage  a part of each of fuzz, faults and soak
# make supply  the dependencies, their licences and holes, and the archives in clean environments
# make locks   the hashes of constraints*.txt, from the package index
# make release wheel, source archive, bill of materials and SHA256SUMS, in dist
# make odd     the tests without network and root, with a home that cannot be written, and more
# make minilm  quantize and judge a real sentence encoder, which it downloads once
# make vllm    generate with artifacts and judge them in vLLM's CPU build, in its own environment
# make bench   the benchmarks of benchmarks/, one after the other
# make clean   everything that can be made again

SHELL := /bin/bash
BIN := .venv/bin
JOBS ?= 2
ALSO ?=
# One thread a process: the tests' tensors are too small to share out. Processes that steal work keep
# a file's tests together, and so make what they share once.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Hundreds of the tests' processes would compile the same files again, where containers forbid it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check format browser recipes kernels ranks ray integrations resume trust damage fuzz faults soak supply locks release odd minilm vllm bench clean

setup:
	@scripts/setup.sh

demo: setup
	$(BIN)/quantkit quantize --recipe demo --overwrite

test: setup
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ALSO:%=--also=%) $(ARGUMENTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

browser: setup
	browser=$$(scripts/setup_chromium.sh) && $(TEST_ENVIRONMENT) QUANTKIT_CHROMIUM=$$browser \
	  $(BIN)/python -m pytest -q -m browser tests/e2e/test_report_page.py

recipes: setup
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(JOBS) -m recipes tests/e2e

kernels: setup
	aside=$$(scripts/setup_aside.sh triton) && $(TEST_ENVIRONMENT) TRITON_INTERPRET=1 PYTHONPATH=$$aside \
	  $(BIN)/python -m pytest -q -n $(JOBS) -m kernels tests/numerics/kernels

ranks: setup
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -m ranks tests/e2e/test_ranks_jobs.py

ray: setup
	aside=$$(scripts/setup_aside.sh ray) && $(TEST_ENVIRONMENT) PYTHONPATH=$$aside \
	  $(BIN)/python -m pytest -q -m ray tests/cli/test_sweep.py

integrations: setup
	scripts/check_integrations.sh

resume: setup
	$(TEST_ENVIRONMENT) QUANTKIT_TRUST=full $(BIN)/python -m pytest -q -n $(JOBS) -m resume tests/e2e

trust: supply damage

damage: setup
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -q -n $(JOBS) -m "fuzz or faults or soak" \
	  tests/fuzzing tests/security tests/faults tests/soak tests/terminal

fuzz: setup
	$(TEST_ENVIRONMENT) QUANTKIT_TRUST=full $(BIN)/python -m pytest -q -n $(JOBS) -m fuzz tests/fuzzing tests/security
	$(BIN)/python -m tests.fuzzing.table
	$(BIN)/python -m tests.security.table

faults: setup
	$(TEST_ENVIRONMENT) QUANTKIT_TRUST=full $(BIN)/python -m pytest -q -n $(JOBS) -m faults tests/faults

soak: setup
	$(TEST_ENVIRONMENT) QUANTKIT_TRUST=full $(BIN)/python -m pytest -q -m soak tests

supply: setup
	scripts/check_supply.sh

locks: setup
	$(BIN)/python scripts/supply/lock.py

release: setup
	scripts/build_release.sh dist

odd: setup
	scripts/check_odd.sh $(ARGUMENTS)

minilm: setup
	model=$$(scripts/setup_minilm.sh) && $(TEST_ENVIRONMENT) QUANTKIT_MINILM=$$model \
	  $(BIN)/python -m pytest -q -m minilm tests/e2e/test_minilm.py

vllm: setup
	scripts/check_vllm.sh artifacts/demo/compressed-tensors
	$(TEST_ENVIRONMENT) QUANTKIT_VLLM_PYTHON=$${VLLM_ENV:-.venv-vllm}/bin/python \
	  $(BIN)/python -m pytest -q -m vllm tests/e2e/test_vllm_gate.py tests/e2e/test_vllm_footprint.py \
	  tests/e2e/test_vllm_modelopt.py \
	  tests/serving/test_vllm_server.py

bench: setup
	scripts/setup_rival.sh llm-compressor
	scripts/setup_rival.sh auto-round
	scripts/setup_rival.sh llama-cpp-python
	scripts/setup_minilm.sh
	$(BIN)/python benchmarks/llm_compressor.py
	$(BIN)/python benchmarks/run.py gptq-demo gptq-demo-fast awq-demo gptq-0.5b gptq-0.5b-fast rtn-16gb fp8-16gb gptq-16gb-short
	$(BIN)/python benchmarks/run.py awq-0.5b --layers 2
	$(BIN)/python benchmarks/two_processes.py
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/predictions.py
	$(BIN)/python benchmarks/calibrate_once.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/gguf_encoding.py
	$(BIN)/python benchmarks/gguf_quality.py
	$(BIN)/python benchmarks/onnx_encoder.py
	$(BIN)/python benchmarks/onnx_decoder.py
	$(BIN)/python benchmarks/gate_statistics.py
	$(BIN)/python benchmarks/task_statistics.py
	$(BIN)/python benchmarks/gate_speed.py
	$(BIN)/python benchmarks/broken_artifacts.py
	$(BIN)/python benchmarks/synthetic_2gb.py
	$(BIN)/python benchmarks/onnx_2gb.py

clean:
	rm -rf .venv .venv-vllm .venv-litellm .venv-rival .venv-auto-round .venv-llama-cpp-python .venv-minilm .venv-triton .venv-ray .venv-mlflow .venv-otel .venv-modelopt .venv-supply artifacts build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find quantkit tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
