"""What running an artifact takes: measured in the real runtimes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantkit.errors import WorkerError
from quantkit.judging import footprint
from quantkit.judging.footprint import find_judging_footprint, measure_footprint
from quantkit.records import EvalResult, Event
from tests.helpers import make_pico_model
from tests.judging.gguf_files import write_gguf
from tests.judging.onnx_files import write_table


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few positions."""
    return make_pico_model(tmp_path_factory.mktemp("pico") / "model", max_positions=64)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that computes nothing but a look-up, and has no longest sequence."""
    folder = tmp_path_factory.mktemp("table")
    return write_table(folder / "model.onnx", np.zeros((50, 50), np.float32))


def test_a_checkpoint_in_transformers(model: Path) -> None:
    """What was stored as codes is said to be decompressed; a process takes more than its model."""
    found = measure_footprint(
        model, "transformers", quantized=True, threads=1, repetitions=2, timeout_seconds=120
    )

    assert found.runtime.startswith("transformers 5.")
    assert found.load_seconds > 0
    assert found.memory_bytes is not None
    assert found.memory_bytes > 10 * (model / "model.safetensors").stat().st_size
    assert found.prefill is not None
    assert found.decoding is not None
    assert found.prefill > found.decoding > 0
    assert found.threads == 1
    weights, work, *_ = found.what.split(", ")
    assert weights == "weights decompressed to float32: a server's memory and speed are others"
    assert work == "a prompt of 32 tokens and 30 behind it"


def test_a_file_in_llama_cpp(model: Path, tmp_path: Path) -> None:
    """Its weights stay as they are; events tell of the repetitions."""
    seen: list[Event] = []

    found = measure_footprint(
        write_gguf(model, tmp_path / "model.gguf"),
        "llama.cpp",
        quantized=False,
        threads=1,
        repetitions=2,
        timeout_seconds=60,
        progress=seen.append,
    )

    assert found.runtime == "llama.cpp b11549"
    assert found.what.startswith("weights as in the file, a prompt of 32 tokens and 30 behind it")
    assert "medians of 2 repetitions (spread " in found.what
    assert [(event.stage, event.done, event.total) for event in seen] == [
        ("speed", number, 2) for number in range(3)
    ]


def test_what_is_slow_does_less(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the tokens where all repetitions would take too long."""
    usual = measure_footprint(table, "onnxruntime", quantized=False, threads=1, repetitions=1)
    monkeypatch.setattr(footprint, "LONGEST_SECONDS", 0.0)
    short = measure_footprint(table, "onnxruntime", quantized=False, threads=1, repetitions=1)

    assert usual.runtime.startswith("onnxruntime 1.")
    # A process that has not so much as loaded torch, as its parent here has.
    assert usual.memory_bytes is not None
    assert 1e7 < usual.memory_bytes < 2.5e8
    assert "a prompt of 256 tokens and 64 behind it" in usual.what
    assert "a prompt of 32 tokens and 8 behind it" in short.what


def test_the_gate_itself_sees_loading_and_memory() -> None:
    """Without speeds, as both workers compute; without a worker's word there is nothing."""
    result = EvalResult(
        runtime="transformers",
        tokens=8,
        baseline_nll=(1.0,),
        candidate_nll=(1.0,),
        kl=(0.1,),
        agreement=(1.0,),
        kl_p99=0.1,
        kl_max=0.1,
        finite=True,
        versions={"transformers": "5.23.0", "dtype": "float32"},
        load_seconds=2.5,
        memory_bytes=1 << 30,
    )

    found = find_judging_footprint(result)

    assert found is not None
    assert (found.runtime, found.load_seconds) == ("transformers 5.23.0", 2.5)
    assert (found.memory_bytes, found.prefill, found.decoding) == (1 << 30, None, None)
    assert found.what == (
        "measured during the gate, with weights expanded to float32: a server will take another "
        "amount of memory"
    )
    assert find_judging_footprint(replace(result, load_seconds=None)) is None
    other = find_judging_footprint(replace(result, runtime="llama.cpp"))
    assert other is not None
    assert other.what == "measured during the gate, with weights as in the file"


def test_a_worker_that_fails_is_named(tmp_path: Path) -> None:
    """As everywhere in the gate."""
    (tmp_path / "config.json").write_text(json.dumps({}))

    with pytest.raises(WorkerError, match="baseline's worker failed at 'load'"):
        measure_footprint(
            tmp_path, "onnxruntime", quantized=False, role="baseline", timeout_seconds=60
        )
