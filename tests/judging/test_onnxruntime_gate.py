"""`gate` and `compare` on ONNX files: the file in ONNX Runtime, its baseline in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantkit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.model import describe_encoder, load_encoder
from quantkit.errors import InputError
from quantkit.formats.onnx.encoder import write_float_encoder
from quantkit.recipe import Recipe
from tests.encoder_models import encoder_sentences, write_encoder_checkpoint
from tests.helpers import make_pico_model, pico_text
from tests.judging.onnx_files import round_onnx, write_onnx

GATE = (
    "gate.samples=8",
    "gate.sequence_length=32",
    "gate.probes=null",
    "gate.timeout_seconds=120",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words that the pico tokenizer knows."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(pico_text(800, 3))
    return file


def test_onnx_files_are_judged_and_timed_where_they_will_be_served(
    text: Path, tmp_path: Path
) -> None:
    """`auto` is ONNX Runtime; one that is not the recorded file fails, whatever its numbers are."""
    model = make_pico_model(tmp_path / "model")
    exact = write_onnx(model, tmp_path / "exact")
    folder = round_onnx(exact, tmp_path / "out" / "onnx", bits=8)
    row = {"path": "onnx", "files": {"model.onnx": "0" * 64}}
    (tmp_path / "out" / "quantkit.json").write_text(json.dumps({"artifacts": [row]}))

    report = quantkit.gate(
        folder, baseline=model, data=text, output=tmp_path / "report", overrides=GATE, device="cpu"
    )

    (found,) = report.artifacts
    assert (found.format, found.runtime, found.task) == ("onnx", "onnxruntime", None)
    assert found.judgement.kl is not None
    assert 1e-7 < found.judgement.kl.value < 1e-2
    assert report.verdict == "FAIL"
    reason = found.judgement.reasons[0]
    assert "'model.onnx' is not the one that was written" in reason
    assert [row.what.split()[0] for row in found.judgement.speed] == ["decoding", "prefill"]
    assert report.evidence["measured_with"]["onnx"]["dtype"] == "float32"
    assert any("puts nothing before or behind a prompt" in note for note in report.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact", "model", "out", "report"]


@pytest.mark.slow
def test_encoders_are_judged_by_their_vectors(tmp_path: Path) -> None:
    """The baseline's config says that it is one; the graph beside which it is timed goes away."""
    model = write_encoder_checkpoint(tmp_path / "model")
    checkpoint = open_checkpoint(resolve_source(str(model)))
    info = describe_encoder(checkpoint)
    write_float_encoder(checkpoint, info, tmp_path / "graph", load_encoder(checkpoint, info))
    data = tmp_path / "data.txt"
    data.write_text("\n".join(encoder_sentences(40)))

    report = quantkit.gate(
        tmp_path / "graph",
        baseline=model,
        data=data,
        output=tmp_path / "out",
        overrides=GATE,
        device="cpu",
    )

    (found,) = report.artifacts
    measured = {measure.name: measure.metric.value for measure in found.judgement.measures}
    assert (found.runtime, found.task) == ("onnxruntime", "embedding")
    assert measured["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert [row.unit for row in found.judgement.speed] == ["sentences"]
    assert report.evidence["evaluation"]["texts"] == 8
    assert not list((tmp_path / "out").glob("**/*.onnx"))


def test_encoders_are_judged_as_onnx_files_alone(tmp_path: Path) -> None:
    """Nothing else is written of them; what is refused leaves nothing behind."""
    model = write_encoder_checkpoint(tmp_path / "model")
    data = tmp_path / "data.txt"
    data.write_text("\n".join(encoder_sentences(40)))

    with pytest.raises(InputError, match=r"is an encoder, and .* is safetensors: encoders are"):
        quantkit.gate(model, baseline=model, data=data, output=tmp_path / "out", device="cpu")

    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_job_judges_each_of_its_graphs_by_its_own_plan(text: Path, tmp_path: Path) -> None:
    """One without codes is no copy, has the planned bits, and is named by its precision."""
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": str(make_pico_model(tmp_path / "model")),
            "output": str(tmp_path / "out"),
            "quantize": {"scheme": "w8a16", "group_size": 32, "method": "rtn"},
            "export": [
                {"format": "onnx", "precision": "int8"},
                {"format": "onnx", "precision": "fp32"},
            ],
            "gate": {"data": str(text), "samples": 8, "sequence_length": 32, "probes": None},
        }
    )

    report = quantkit.quantize(recipe, device="cpu").report

    assert [row.path for row in report.artifacts] == ["onnx/int8", "onnx/fp32"]
    assert [row.scheme for row in report.artifacts] == ["w8a16 g32 rtn", "fp32"]
    assert [row.judgement.verdict for row in report.artifacts] == ["PASS", "PASS"]
    assert [len(row.judgement.speed) for row in report.artifacts] == [2, 2]
    exact = report.artifacts[1].judgement.kl
    assert exact is not None
    assert 0 < exact.value < 1e-8
