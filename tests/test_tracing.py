"""Spans and metrics: nothing of them where nobody has asked, and an install line where one has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quantkit import tracing
from quantkit.cli.tracking import TrackingOptions, tracked
from quantkit.describe import Stopwatch
from quantkit.errors import InputError, MissingPackageError
from quantkit.integrations.figures import list_metrics, list_params, list_tags
from quantkit.integrations.telemetry import exported
from tests.cli.running import run_here

DOCUMENT = {
    "model": "org/pico",
    "verdict": "FAIL",
    "baseline": {"name": "org/pico", "size_bytes": 100},
    "artifacts": [
        {
            "name": "pico Q4_K.gguf",
            "format": "gguf",
            "scheme": "Q4_K",
            "size_bytes": 30,
            "bits_per_weight": 4.5,
            "windows": 8,
            "metrics": {"perplexity": None, "kl": {"mean": 0.5, "p99": None}},
            "measures": [],
            "verdict": "FAIL",
            "reasons": ["max_kl: 0.5 is above 0.1"],
        },
        {
            "name": "onnx",
            "format": "onnx",
            "scheme": "int8",
            "size_bytes": 40,
            "bits_per_weight": 8.0,
            "windows": 8,
            "metrics": {},
            "measures": [{"name": "cosine", "value": 0.99}],
            "verdict": "PASS",
            "reasons": [],
        },
    ],
    "evidence": {
        "model": {"name": "org/pico", "revision": "abc"},
        "versions": {"torch": "2.13"},
        "timings": {"seconds": {"gate a (b)": 2.0}, "peak_memory_bytes": 7},
        "recipe": {
            "resolved": {
                "model": "org/pico",
                "quantize": {"scheme": "w4a16", "ignore": ["a", "b"], "overrides": []},
                "export": [{"format": "gguf", "type": "Q4_K"}, {"format": "onnx", "type": None}],
                "gate": {"max_kl": 0.1, "python": {"vllm": "/home/me/bin/python"}},
            }
        },
    },
}


def test_nothing_is_recorded_or_loaded_unless_asked_for() -> None:
    """Spans are one shared object that does nothing, and what they are told is dropped."""
    with tracing.span("here", {"key": 1}) as opened, Stopwatch().time("solve"):
        opened.tell({"key": 2})

    assert opened.recorded is None
    assert tracing.span("one") is tracing.block(0, "other")
    assert tracing.carried(len) is len
    assert tracing.child_environment() == {}
    assert "opentelemetry" not in sys.modules


def test_what_is_missing_is_told_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before any work."""
    for package in ("opentelemetry", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "report.json").write_text("{}")
    mlflow = run_here("track", tmp_path, "--mlflow", "experiment")

    assert mlflow.returncode == 2
    assert mlflow.stderr.endswith('pip install "quantkit[mlflow]"\n')
    for asked in (tracing.traced, exported):
        with pytest.raises(MissingPackageError, match=r'pip install "quantkit\[otel\]"'), asked():
            pass


@pytest.mark.parametrize(
    "variable", ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL"]
)
def test_an_exporter_that_there_is_not_is_refused(variable: str) -> None:
    """Else spans would go elsewhere than the variable says."""
    with pytest.raises(InputError, match=variable), exported({variable: "grpc"}):
        pass


def test_options_of_a_run_need_an_experiment() -> None:
    """Before any work."""
    with (
        pytest.raises(InputError, match="--mlflow EXPERIMENT"),
        tracked(TrackingOptions(None, "name"), "a job"),
    ):
        pass


def test_parameters_are_the_recipe_flattened() -> None:
    """What is not set is left out, and so are the model, told once, and programs of the machine."""
    assert list_params(DOCUMENT) == {
        "model": "org/pico",
        "model.revision": "abc",
        "versions.torch": "2.13",
        "recipe.quantize.scheme": "w4a16",
        "recipe.quantize.ignore": "a, b",
        "recipe.export.0.format": "gguf",
        "recipe.export.0.type": "Q4_K",
        "recipe.export.1.format": "onnx",
        "recipe.gate.max_kl": "0.1",
    }


def test_several_artifacts_have_their_names_in_front() -> None:
    """Numbers that were not measured are left out; names are such as MLflow takes."""
    assert list_metrics(DOCUMENT) == {
        "pico Q4_K.gguf/kl_mean": 0.5,
        "pico Q4_K.gguf/size_bytes": 30,
        "pico Q4_K.gguf/bits_per_weight": 4.5,
        "pico Q4_K.gguf/windows": 8,
        "onnx/cosine": 0.99,
        "onnx/size_bytes": 40,
        "onnx/bits_per_weight": 8,
        "onnx/windows": 8,
        "baseline_size_bytes": 100,
        "seconds/gate a _b_": 2,
        "peak_memory_bytes": 7,
    }


def test_tags_say_what_runs_are_found_by() -> None:
    """The verdict of each artifact beside that of all."""
    tags = list_tags(DOCUMENT)

    assert tags["quantkit.verdict"] == "FAIL"
    assert tags["quantkit.verdict.onnx"] == "PASS"
    assert tags["quantkit.format"] == "gguf, onnx"
    assert tags["quantkit.reasons"] == "max_kl: 0.5 is above 0.1"
