"""What a plan for an encoder says, and everything that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.encoders.planning import make_encoder_plan, plan_exports
from quantkit.errors import PlanError, ResourceError
from quantkit.recipe import validate
from quantkit.records import EncoderPlan
from tests.encoder_models import POSITIONS, write_encoder_checkpoint

RECIPE: dict[str, Any] = {
    "version": 1,
    "calibration": {"data": "calibration.txt"},
    "quantize": {"scheme": "w8a8"},
    "export": [{"format": "onnx", "precision": "int8"}],
    "gate": {"data": "evaluation.txt"},
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folders = {
        name: write_encoder_checkpoint(tmp_path_factory.mktemp(name), name)
        for name in ("BertModel", "BertForSequenceClassification", "ModernBertModel")
    }
    return {name: open_checkpoint(resolve_source(str(folder))) for name, folder in folders.items()}


def _plan(checkpoint: Checkpoint, **changes: Any) -> EncoderPlan:
    return make_encoder_plan(validate(RECIPE | changes), checkpoint)


def _problems(checkpoint: Checkpoint, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        _plan(checkpoint, **changes)
    return caught.value.problems


def _layers(plan: EncoderPlan) -> dict[str, str]:
    return {linear.name: linear.scheme.name for group in plan.groups for linear in group.linears}


def test_every_layer_and_table_is_planned(encoders: dict[str, Checkpoint]) -> None:
    plan = _plan(encoders["BertForSequenceClassification"])
    assert plan.precision == "int8"
    assert set(_layers(plan).values()) == {"w8a8"}
    assert len(_layers(plan)) == 12
    assert [linear.method.name for linear in plan.groups[0].linears] == ["smoothquant+gptq"] * 3
    assert plan.tables == (
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
    )
    assert any("classifier" in note and "left in float" in note for note in plan.notes)


def test_sizes_are_the_sum_of_the_parts(encoders: dict[str, Checkpoint]) -> None:
    plan = _plan(encoders["BertModel"])
    tensors = {
        name: tensor
        for name, tensor in encoders["BertModel"].tensors.items()
        if "pooler" not in name
    }
    # The graph holds the numbers of the positions, int64.
    size = constants = 8 * POSITIONS
    for name, tensor in tensors.items():
        matrix = name.endswith("weight") and len(tensor.shape) == 2 and "token_type" not in name
        size += tensor.shape[0] * (tensor.shape[1] + 4) if matrix else tensor.size
    assert plan.baseline_bytes == sum(tensor.size for tensor in tensors.values())
    assert plan.artifact_bytes == size
    assert plan.bits_per_weight == 8 * size / plan.parameters
    assert plan.memory_bytes > 3.5 * plan.baseline_bytes
    half = _plan(encoders["BertModel"], export=[{"format": "onnx", "precision": "fp16"}])
    vectors = sum(tensor.size for tensor in tensors.values() if len(tensor.shape) == 1)
    assert half.artifact_bytes == (plan.baseline_bytes + vectors) / 2 + constants
    assert half.tables == ()
    assert "precision fp16: no layer is quantized" in half.notes


def test_patterns_leave_layers_and_tables_in_float(encoders: dict[str, Checkpoint]) -> None:
    quantize = {
        "scheme": "w8a8_static",
        "ignore": ["*.position_embeddings"],
        "overrides": [
            {"match": "*.layer.0.output.dense", "scheme": "none"},
            {"match": "*.attention.*", "scheme": "w8a8", "method": "rtn"},
        ],
    }
    plan = _plan(encoders["BertModel"], quantize=quantize)
    assert plan.tables == ("embeddings.word_embeddings",)
    found = _layers(plan)
    assert found["encoder.layer.0.output.dense"] == "none"
    assert found["encoder.layer.1.output.dense"] == "w8a8_static"
    assert found["encoder.layer.1.attention.output.dense"] == "w8a8"


def test_each_export_has_a_plan(encoders: dict[str, Checkpoint]) -> None:
    export = [
        {"format": "onnx", "precision": "fp32"},
        {"format": "onnx", "precision": "int8", "embeddings": "float"},
        {"format": "onnx", "precision": "fp16"},
    ]
    recipe = validate(RECIPE | {"export": export})
    plans = plan_exports(recipe, encoders["ModernBertModel"])
    assert [plan.precision for plan in plans] == ["fp32", "int8", "fp16"]
    assert [plan.tables for plan in plans] == [()] * 3
    assert make_encoder_plan(recipe, encoders["ModernBertModel"]) == plans[1]


def test_without_a_scheme_the_graph_is_in_float(encoders: dict[str, Checkpoint]) -> None:
    plan = _plan(encoders["BertModel"], quantize={"scheme": "none"}, export=[{"format": "onnx"}])
    assert plan.precision == "fp32"
    assert any("nothing will be quantized" in note for note in plan.notes)
    assert plan.artifact_bytes == plan.baseline_bytes + 8 * POSITIONS


def test_all_problems_are_listed_at_once(encoders: dict[str, Checkpoint]) -> None:
    problems = _problems(
        encoders["BertModel"],
        calibration=None,
        quantize={
            "scheme": "w8a8_static",
            "kv_cache": "fp8",
            "ignore": ["*.down_proj"],
            "overrides": [
                {"match": "*.dense", "method": "awq"},
                {"match": "*.query", "scheme": "w4a16"},
            ],
        },
        export=[
            {"format": "compressed-tensors"},
            {"format": "onnx", "precision": "int4", "opset": 13, "lm_head": "int8"},
            {"format": "onnx", "accuracy_level": 4, "embeddings": "int4", "float_layers": 99},
            {"format": "onnx", "precision": "int8", "activations": "fp16"},
            {"format": "onnx", "precision": "fp16", "embeddings": "int8"},
        ],
        gate={"data": "x.txt", "runtime": "vllm"},
    )
    for words in (
        "quantize.overrides[1].scheme w4a16 is for decoders (encoders: none, w8a8, w8a8_static)",
        "quantize.overrides[0].method awq is for 4-bit weights (encoders: rtn, gptq, smooth",
        "quantize.kv_cache fp8: an encoder has no KV cache",
        "quantize.ignore[0] '*.down_proj' matches no layer",
        "needs calibration data",
        "stores scales of its inputs",
        "export[0].format compressed-tensors is for decoders",
        "export[1].precision int4 is for decoders",
        "export[1].opset 13 is too old for the exporter",
        "export[1].lm_head int8: an encoder has no output layer",
        "export[2].accuracy_level 4 is for the 4-bit layers",
        "export[2].embeddings int4: encoders have int8",
        "export[2].float_layers 99 is more than the 10 layers",
        "export[3].activations fp16: an encoder computes in fp16 with precision fp16 alone",
        "export[4].embeddings int8: encoders have int8 with precision int8, and float",
        "export names int8 twice",
        "gate.runtime vllm does not load ONNX encoders",
    ):
        assert any(words in problem for problem in problems), words
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantize": {}}, "quantize.scheme w4a16 is for decoders"),
        ({"quantize": {"scheme": "auto", "target_bits": 8}}, "quantize.scheme auto is for"),
        ({"quantize": {"scheme": "none"}}, "precision int8, but no layer would be in INT8"),
        (
            {
                "quantize": {
                    "scheme": "w8a8",
                    "overrides": [{"match": "*.key", "scheme": "w8a8_static"}],
                }
            },
            "attention.self.query and bert.encoder.layer.1.attention.self.key read the same input, "
            "which is rounded once: give them one scheme (they have w8a8 and w8a8_static)",
        ),
        ({"gate": None}, "the recipe has no gate"),
        ({"export": [{"format": "gguf", "type": "Q8_0"}]}, "format gguf is for decoders"),
        ({"calibration": {"data": "x", "assistant_only": True}}, "assistant_only is for chats"),
        (
            {
                "quantize": {
                    "scheme": "w8a8",
                    "overrides": [{"match": "classifier", "method": "rtn"}],
                }
            },
            "names classifier: an override can leave these in float",
        ),
    ],
)
def test_what_an_encoder_does_not_have_is_refused(
    changes: dict[str, Any], words: str, encoders: dict[str, Checkpoint]
) -> None:
    problems = _problems(encoders["BertForSequenceClassification"], **changes)
    assert any(words in problem for problem in problems), problems


def test_rounding_to_nearest_needs_no_data(encoders: dict[str, Checkpoint]) -> None:
    quantize = {"scheme": "w8a8", "method": "rtn"}
    assert _plan(encoders["BertModel"], calibration=None, quantize=quantize).precision == "int8"
    export = [{"format": "onnx", "float_layers": 0}]
    plan = _plan(encoders["BertModel"], quantize=quantize, export=export)
    assert any("calibration data is not used" in note for note in plan.notes)


def test_a_full_disk_is_noticed(
    encoders: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ResourceError, match="the job needs 32 MB"):
        _plan(encoders["BertModel"], output=str(tmp_path / "out"))
