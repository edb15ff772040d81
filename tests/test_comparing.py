"""Artifacts of one model side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

import quantkit
from quantkit.comparing import _distinct_names
from quantkit.errors import InputError
from quantkit.recipe import Recipe
from quantkit.records import Event
from tests.encoder_models import encoder_sentences, write_encoder_checkpoint
from tests.helpers import make_pico_model, pico_text
from tests.judging.gguf_files import write_gguf
from tests.judging.onnx_files import write_table

GATE = (
    "gate.samples=4",
    "gate.sequence_length=64",
    "gate.timeout_seconds=120",
    "gate.probes=null",
)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """A baseline, an exact copy of it, one with different weights, and a text."""
    folder = tmp_path_factory.mktemp("trio")
    baseline = make_pico_model(folder / "base", seed=1)
    shutil.copytree(baseline, folder / "copy")
    other = make_pico_model(folder / "other", seed=2)
    text = folder / "text.txt"
    text.write_text(pico_text(600, 3))
    return baseline, folder / "copy", other, text


def test_compare_measures_all_on_the_same_tokens(
    trio: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    """One row an artifact in the order given; the report's verdict is the best of them."""
    baseline, copy, other, text = trio
    report = quantkit.compare(
        baseline,
        [other, copy],
        data=text,
        output=tmp_path / "out",
        overrides=GATE,
        device="cpu",
        footprint=False,
    )
    assert [row.name for row in report.artifacts] == ["other", "copy"]
    divergences = [row.judgement.kl.value for row in report.artifacts if row.judgement.kl]
    assert divergences[0] > 0.1
    assert divergences[1] == 0
    assert report.comparison
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in document["artifacts"]] == ["other", "copy"]
    # A copy that differs in nothing is suspicious; the other gets away with few windows.
    verdicts = [row.judgement.verdict for row in report.artifacts]
    assert verdicts == ["INCONCLUSIVE", "FAIL"]
    assert report.verdict == "INCONCLUSIVE"


def test_each_format_has_its_runtime_and_footprint(
    trio: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    """One worker after the other, the baseline's first; what differs much is told apart."""
    baseline, _, _, text = trio
    table = write_table(tmp_path / "model.onnx", np.zeros((300, 300), np.float32))
    file = write_gguf(baseline, tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    seen: list[Event] = []

    report = quantkit.compare(
        baseline,
        [table, file],
        data=text,
        output=tmp_path / "out",
        overrides=(*GATE, "gate.samples=8"),
        device="cpu",
        progress=seen.append,
    )

    assert [row.runtime for row in report.artifacts] == ["onnxruntime", "llama.cpp"]
    footprints = [row.judgement.footprint for row in report.artifacts]
    assert report.baseline_footprint is not None
    assert report.baseline_footprint.what.startswith("weights in float32, ")
    assert footprints[0] is not None
    assert footprints[0].what.startswith("weights as in the graph, ")
    assert footprints[1] is not None
    assert footprints[1].runtime == "llama.cpp b11549"
    steps = [(each.done, each.message) for each in seen if each.stage == "footprint"]
    assert steps == [(0, "the baseline"), (1, "model.onnx"), (2, "model.gguf"), (3, "")]
    (difference,) = report.differences
    assert (difference.first, difference.second) == ("model.onnx", "model.gguf")
    assert difference.significant
    assert difference.kl.low > 0


def test_encoders_are_compared_without_footprints(tmp_path: Path) -> None:
    """By their own measures; a note says what is left out."""
    encoder = write_encoder_checkpoint(tmp_path / "encoder")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(encoder_sentences(40)))
    recipe = {
        "version": 1,
        "model": str(encoder),
        "output": str(tmp_path / "made"),
        "calibration": {"data": str(texts), "samples": 40, "sequence_length": 32},
        "quantize": {"scheme": "w8a8"},
        "export": [{"format": "onnx", "precision": "fp16"}],
    }
    quantkit.quantize(Recipe.model_validate(recipe), gate=False, device="cpu")

    report = quantkit.compare(
        encoder,
        [tmp_path / "made" / "onnx"],
        data=texts,
        output=tmp_path / "out",
        overrides=("gate.sequence_length=32", "gate.min_retrieval_overlap=null"),
        device="cpu",
    )

    (row,) = report.artifacts
    assert row.judgement.measures[0].name == "cosine"
    assert (row.judgement.footprint, report.baseline_footprint) == (None, None)
    assert report.differences == ()
    assert "load time, memory and speed of encoders are not compared" in report.notes


def test_compare_refuses_nothing_and_the_same_twice(
    trio: tuple[Path, Path, Path, Path], tmp_path: Path
) -> None:
    """Before any model is loaded."""
    baseline, copy, _, text = trio
    with pytest.raises(InputError, match="name at least one artifact"):
        quantkit.compare(baseline, [], data=text, output=tmp_path / "out")
    with pytest.raises(InputError, match="named twice"):
        quantkit.compare(baseline, [copy, copy], data=text, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_artifacts_are_named_by_as_much_of_their_paths_as_it_takes() -> None:
    """Folders that are all called compressed-tensors are told apart by their parents."""
    assert _distinct_names(["a/x", "b/y"]) == ["x", "y"]
    paths = ["run/awq4/compressed-tensors", "run/fp8/compressed-tensors", "run/other"]
    assert _distinct_names(paths) == ["awq4/compressed-tensors", "fp8/compressed-tensors", "other"]
