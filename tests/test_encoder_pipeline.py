"""Whole jobs with encoders: what is written, what is said, and what is refused before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoder_pipeline import _find_float
from quantkit.encoder_pipeline.gate import add_speed, time_encoder
from quantkit.encoder_pipeline.job import prepare_encoder
from quantkit.encoders.model import load_encoder
from quantkit.errors import (
    CalibrationError,
    CheckpointError,
    OutputError,
    PlanError,
    RecipeError,
)
from quantkit.inputs import load
from quantkit.records import Artifact, EncoderPlan, Event, Judgement, Result
from tests.cli.running import run_here as run
from tests.encoder_models import encoder_sentences, write_encoder_checkpoint

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def _write_rows(path: Path, texts: Sequence[str], **columns: Sequence[Any]) -> Path:
    rows = [
        {"text": text} | {name: values[index] for name, values in columns.items()}
        for index, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe, and the texts that it names."""
    calibration = _write_rows(folder / "calibration.jsonl", encoder_sentences(40))
    evaluation = _write_rows(folder / "evaluation.jsonl", encoder_sentences(60, skip=40))
    recipe = {
        "version": 1,
        "calibration": {"data": str(calibration), "samples": 40, "sequence_length": 32},
        "quantize": {"scheme": "w8a8"},
        "export": [{"format": "onnx", "precision": "int8"}],
        "gate": {"data": str(evaluation), "sequence_length": 32, "min_retrieval_overlap": None},
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def _left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder_checkpoint(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="module")
def job(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Event]]:
    """One judged job with an embedding model, and its progress."""
    folder = tmp_path_factory.mktemp("job")
    events: list[Event] = []
    recipe = _write_recipe(folder)
    result = quantkit.quantize(recipe, model=encoder, output=folder / "out", progress=events.append)
    return result, events


def test_a_job_writes_a_judged_artifact(job: tuple[Result, list[Event]]) -> None:
    result, _ = job
    assert (result.verdict, result.exit_code) == ("PASS", 0)
    assert isinstance(result.plan, EncoderPlan)
    (artifact,) = result.artifacts
    assert artifact.folder == result.output / "onnx"
    assert (artifact.name, artifact.format) == ("encoder-int8", "onnx")
    assert {"model.onnx", "config.json", "tokenizer.json", "modules.json"} <= set(artifact.files)
    assert "1_Pooling/config.json" in artifact.files
    for name, digest in artifact.files.items():
        content = (artifact.folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    assert _left_behind(result.output.parent) == ["out"]
    assert {path.name for path in result.output.iterdir()} == {"onnx", "report", "quantkit.json"}
    assert (result.output / "report" / "report.html").is_file()
    assert (artifact.folder / "README.md").is_file()


def test_the_size_is_the_one_that_the_plan_says(job: tuple[Result, list[Event]]) -> None:
    result, _ = job
    assert result.artifacts[0].tensor_bytes == pytest.approx(result.plan.artifact_bytes, rel=0.02)


def test_the_evidence_says_what_was_done(job: tuple[Result, list[Event]], encoder: Path) -> None:
    result, _ = job
    evidence = json.loads((result.output / "quantkit.json").read_text())
    assert evidence["verdict"] == "PASS"
    assert evidence["encoder"]["architecture"] == "BertModel"
    assert evidence["encoder"]["pooling"] == {"mode": "mean", "normalize": True}
    assert evidence["calibration"]["texts"] == 40
    assert evidence["evaluation"]["texts"] == 60
    assert len(evidence["layers"]) == 12
    weights = hashlib.sha256((encoder / "model.safetensors").read_bytes()).hexdigest()
    assert evidence["model"]["files"]["model.safetensors"] == weights
    assert "modules.json" in evidence["model"]["files"]
    assert {"prepare", "quantize", "write", "gate"} <= evidence["timings"]["seconds"].keys()
    (row,) = result.report.artifacts
    assert (row.task, row.runtime) == ("embedding", "onnxruntime")
    assert row.scheme == "w8a8 channel smoothquant+gptq, int8 embeddings"
    assert row.judgement.measures[0].name == "cosine"
    assert len(row.judgement.speed) == 1


def test_progress_is_told_of_every_stage(job: tuple[Result, list[Event]]) -> None:
    _, events = job
    stages = list(dict.fromkeys(event.stage for event in events))
    assert [stage for stage in stages if stage != "solve"] == [
        "prepare",
        "quantize",
        "write",
        "weights",
        "gate",
        "speed",
    ]


def test_onnxruntime_gives_the_embeddings_of_the_original(
    job: tuple[Result, list[Event]], encoder: Path
) -> None:
    import onnxruntime
    from transformers import AutoModel, AutoTokenizer

    folder = job[0].artifacts[0].folder
    texts = encoder_sentences(6, skip=100)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    inputs = {value.name: batch[value.name].numpy() for value in session.get_inputs()}
    (found,) = session.run(["sentence_embedding"], inputs)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(encoder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert ((found * expected).sum(axis=1) > 0.99).all()


def test_the_float_graph_of_a_recipe_is_what_others_are_timed_beside(
    encoder: Path, tmp_path: Path
) -> None:
    """Not one of another opset."""
    export = [
        {"format": "onnx", "precision": "fp16", "opset": 19},
        {"format": "onnx", "precision": "fp32", "opset": 19},
    ]
    loaded = load(_write_recipe(tmp_path, export=export), encoder, tmp_path / "out", ())
    job = prepare_encoder(
        loaded, open_checkpoint(resolve_source(str(encoder))), device="cpu", gate=True
    )
    model = load_encoder(job.checkpoint, job.info)
    made = [Artifact("a", "onnx", tmp_path / each.precision, {}, 0, 0.0) for each in job.plans]
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32" / "model.onnx").write_bytes(b"the recipe's")
    assert _find_float(job, model, made, tmp_path / "s") == tmp_path / "fp32" / "model.onnx"
    alone = replace(job, plans=job.plans[:1])
    graph = _find_float(alone, model, made[:1], tmp_path / "s")
    assert graph == tmp_path / "s" / "model.onnx"
    assert onnx.load(graph).opset_import[0].version == 19


def test_a_speed_that_is_missing_is_said(encoder: Path, tmp_path: Path) -> None:
    loaded = load(_write_recipe(tmp_path), encoder, tmp_path / "out", ())
    job = prepare_encoder(
        loaded, open_checkpoint(resolve_source(str(encoder))), device="cpu", gate=True
    )
    failed = Judgement("FAIL", (), ("a worker died",), None, None, None, 0.95, 0)
    assert job.evaluation is not None
    assert job.loaded.recipe.gate is not None
    spec = job.loaded.recipe.gate
    rows, info = job.evaluation, job.info
    timed = (
        add_speed(failed, tmp_path, tmp_path, rows, info, spec, print),
        time_encoder(failed, job.checkpoint, tmp_path, rows, info, spec, tmp_path, print),
    )
    for judgement in timed:
        assert judgement.notes == ("its speed was not measured: the texts could not be run",)
        assert (judgement.speed, judgement.reasons) == ((), failed.reasons)


@pytest.mark.slow
def test_a_classifier_is_written_in_two_precisions_and_not_judged(tmp_path: Path) -> None:
    model = write_encoder_checkpoint(tmp_path / "m", "DistilBertForSequenceClassification")
    recipe = _write_recipe(
        tmp_path,
        quantize={"scheme": "w8a8_static", "method": "gptq"},
        export=[{"format": "onnx", "precision": "fp16"}, {"format": "onnx", "precision": "int8"}],
    )
    result = quantkit.quantize(recipe, model=model, output=tmp_path / "out", gate=False)
    assert (result.verdict, result.exit_code) == ("UNJUDGED", 0)
    half, integer = result.artifacts
    assert half.folder == tmp_path / "out" / "onnx" / "fp16"
    assert integer.folder == tmp_path / "out" / "onnx" / "int8"
    assert integer.bits_per_weight < half.bits_per_weight < 17.5
    assert [row.task for row in result.report.artifacts] == ["sequence-classification"] * 2
    assert isinstance(result.plan, EncoderPlan)
    assert result.plan.precision == "int8"


def test_labels_are_judged(tmp_path: Path) -> None:
    """The plan of a labelled gate is refused where a label is none of the model's."""
    model = write_encoder_checkpoint(tmp_path / "m", "BertForSequenceClassification")
    texts = encoder_sentences(3)
    data = _write_rows(tmp_path / "labels.jsonl", texts, label=["good", "bad", "ugly"])
    gate = {"data": str(data), "label_column": "label"}
    with pytest.raises(CalibrationError, match=r"labels\.jsonl:3: the label 'ugly' is none"):
        quantkit.quantize(_write_recipe(tmp_path, gate=gate), model=model, output=tmp_path / "out")
    assert _left_behind(tmp_path) == []


def test_a_plan_reads_no_data(encoder: Path, tmp_path: Path) -> None:
    recipe = _write_recipe(tmp_path)
    (tmp_path / "calibration.jsonl").write_text("not JSON")
    plan = quantkit.plan(recipe, model=encoder)
    assert isinstance(plan, EncoderPlan)
    done = run("plan", encoder, "--recipe", recipe, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["artifact_bytes"] == plan.artifact_bytes
    assert len(document["linears"]) == 12
    shown = run("plan", encoder, "--recipe", recipe).stdout
    assert "12 x w8a8, one scale a row, smoothquant+gptq" in shown
    assert "embedding, mean of the tokens, divided by its length" in shown


def test_problems_leave_nothing_behind(encoder: Path, tmp_path: Path) -> None:
    recipe = _write_recipe(tmp_path, quantize={"scheme": "w4a16"})
    for call in (quantkit.plan, quantkit.quantize):
        with pytest.raises(PlanError, match="w4a16 is for decoders"):
            call(recipe, model=encoder, output=tmp_path / "out")
    assert _left_behind(tmp_path) == []


def test_an_output_that_exists_stays(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        quantkit.quantize(_write_recipe(tmp_path), model=encoder, output=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_an_evaluation_on_calibration_texts_is_refused(encoder: Path, tmp_path: Path) -> None:
    recipe = _write_recipe(tmp_path, gate={"data": str(tmp_path / "calibration.jsonl")})
    with pytest.raises(CalibrationError, match="use the same data"):
        quantkit.quantize(recipe, model=encoder, output=tmp_path / "out")
    assert _left_behind(tmp_path) == []


@pytest.mark.parametrize(("key", "value"), [("tasks", ["arc_easy"]), ("domain_column", "source")])
def test_what_is_about_decoders_is_refused(
    encoder: Path, tmp_path: Path, key: str, value: object
) -> None:
    """It could not change anything."""
    recipe = _write_recipe(tmp_path, gate={"data": str(tmp_path / "evaluation.jsonl"), key: value})
    with pytest.raises(RecipeError, match=rf"gate\.{key}: .* encoder"):
        quantkit.quantize(recipe, model=encoder, output=tmp_path / "out")
    assert _left_behind(tmp_path) == []


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    model = write_encoder_checkpoint(tmp_path / "m")
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["the"] = 9000
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CalibrationError, match="the id 9000 and the model has 600 embeddings"):
        quantkit.quantize(_write_recipe(tmp_path), model=model, output=tmp_path / "out")


def test_a_damaged_weight_leaves_nothing_behind(tmp_path: Path) -> None:
    model = write_encoder_checkpoint(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 3] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds 1 NaN or infinite"):
        quantkit.quantize(_write_recipe(tmp_path), model=model, output=tmp_path / "out")
    assert _left_behind(tmp_path) == []


def test_init_writes_a_recipe_that_fits_the_encoder(encoder: Path, tmp_path: Path) -> None:
    done = run("init", encoder, "--output", tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    plan = quantkit.plan(
        tmp_path / "recipe.yaml",
        overrides=[
            f"{key}.data={_write_rows(tmp_path / 'd.jsonl', ['a'])}"
            for key in ("calibration", "gate")
        ],
    )
    assert isinstance(plan, EncoderPlan)
    assert plan.precision == "int8"
