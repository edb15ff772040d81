"""Plans of jobs that write ONNX graphs: precision, sizes, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import PlanError, RecipeError
from quantkit.job import plan_job
from quantkit.recipe import Recipe, validate
from quantkit.records import Plan
from tests.helpers import make_pico_model

CALIBRATION = {"data": "x.txt", "samples": 8, "sequence_length": 64}
CT = {"format": "compressed-tensors"}


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = make_pico_model(tmp_path_factory.mktemp("pico") / "model")
    return open_checkpoint(resolve_source(str(folder)))


def make_plan(checkpoint: Checkpoint, *exports: dict[str, object], **quantize: object) -> Plan:
    unused = quantize.keys().isdisjoint({"kv_cache", "method"})
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "quantize": {"group_size": 32, "method": "rtn", **quantize},
            "export": list(exports),
            "calibration": None if unused else CALIBRATION,
        }
    )
    return plan_job(recipe, checkpoint, gate=False)


def problems_of(
    checkpoint: Checkpoint, *exports: dict[str, object], **quantize: object
) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        make_plan(checkpoint, *exports, **quantize)
    return caught.value.problems


def onnx(**keys: object) -> dict[str, object]:
    return {"format": "onnx", **keys}


@pytest.mark.parametrize(
    ("export", "scheme", "precision", "quantized"),
    [
        (onnx(), "w4a16", "int4", True),
        (onnx(), "w4a16_asym", "int4", True),
        (onnx(), "w8a16", "int8", True),
        (onnx(precision="int4"), "w4a16", "int4", True),
        (onnx(precision="int8"), "w8a16", "int8", True),
        (onnx(precision="fp32"), "w4a16", "fp32", False),
        (onnx(precision="fp16"), "w4a16", "fp16", False),
        (onnx(), "none", "fp32", True),
        (onnx(activations="fp16"), "none", "fp16", True),
    ],
)
def test_the_precision_is_the_recipes_or_that_of_the_scheme(
    pico: Checkpoint, export: dict[str, object], scheme: str, precision: str, quantized: bool
) -> None:
    """Whether codes go in follows from it."""
    plan = make_plan(pico, export, scheme=scheme)

    assert [(graph.precision, graph.quantized) for graph in plan.onnx] == [(precision, quantized)]
    assert plan.artifact_bytes == plan.onnx[0].tensor_bytes
    assert plan.bits_per_weight == 8 * plan.artifact_bytes / plan.parameters


def test_a_graph_in_float_needs_no_codes(pico: Checkpoint) -> None:
    """No layer gets a scheme where no format has a place for it."""
    plan = make_plan(pico, onnx(precision="fp32"), {"format": "gguf", "type": "Q4_0"})

    assert not any(linear.quantized for linear in plan.linears)
    assert plan.gguf_leads


def test_beside_another_format_its_artifact_is_the_first(pico: Checkpoint) -> None:
    """The disk must hold both."""
    alone, both = make_plan(pico, CT), make_plan(pico, CT, onnx())

    assert both.artifact_bytes == alone.artifact_bytes
    added = max(both.onnx[0].tensor_bytes, 4 * both.block_bytes)
    assert both.disk_bytes - alone.disk_bytes == added


@pytest.mark.parametrize(
    ("export", "quantize", "message"),
    [
        (
            onnx(precision="int4"),
            {"scheme": "w8a16"},
            "onnx precision int4: model.layers.0.self_attn.q_proj and 13 more layers has the "
            "scheme w8a16; use w4a16, w4a16_asym, or leave precision out",
        ),
        (
            onnx(precision="int8"),
            {"overrides": [{"match": "*.layers.0.mlp.up_proj", "scheme": "w8a16"}]},
            "onnx precision int8: model.layers.0.self_attn.q_proj and 12 more layers has the "
            "scheme w4a16; use w8a16, or leave precision out",
        ),
        (
            onnx(precision="int8"),
            {"scheme": "none"},
            "onnx precision int8: no layer is quantized; use w8a16, or precision fp16 or fp32",
        ),
        (
            onnx(),
            {"scheme": "fp8_dynamic"},
            "format onnx has no scheme fp8_dynamic; the nearest that it has is w8a16 (all: w4a16, "
            "w4a16_asym, w8a16)",
        ),
        (
            onnx(),
            {"kv_cache": "fp8"},
            "kv_cache fp8: an ONNX graph has no place for the scales of keys and values; use "
            "kv_cache none or export compressed-tensors",
        ),
    ],
)
def test_what_does_not_fit_is_a_problem(
    pico: Checkpoint, export: dict[str, object], quantize: dict[str, object], message: str
) -> None:
    """What, where, and the remedy."""
    assert message in problems_of(pico, export, **quantize)


def test_two_graphs_of_one_precision_are_a_problem(pico: Checkpoint) -> None:
    """They would have the same folder."""
    exports = (onnx(precision="int4"), onnx(accuracy_level=4))

    assert problems_of(pico, *exports) == (
        "two onnx exports have the precision int4: write them by two jobs",
    )


def test_a_cache_in_fp8_is_noted_beside_another_format(pico: Checkpoint) -> None:
    """Its scales are in the other one."""
    notes = make_plan(pico, CT, onnx(), kv_cache="fp8").notes

    assert "onnx: the key/value cache of the graph stays in float" in notes


def test_what_vllm_needs_does_not_bind_a_graph(pico: Checkpoint) -> None:
    """Fused layers may differ; there are no notes on kernels that do not read it."""
    overrides = [{"match": "*.q_proj", "scheme": "w8a16"}]

    assert make_plan(pico, onnx(), overrides=overrides).notes == ()
    assert any("vLLM makes one" in line for line in problems_of(pico, CT, overrides=overrides))


def test_more_bits_by_an_override_are_noted(pico: Checkpoint) -> None:
    """Under a precision that the recipe names."""
    overrides = [{"match": "*.down_proj", "scheme": "w8a16"}]
    plan = make_plan(pico, onnx(precision="int4"), overrides=overrides)

    assert plan.notes == ("onnx: precision int4, with layers in w8a16 by overrides",)


@pytest.mark.parametrize("key", ["embeddings", "lm_head"])
def test_tables_must_be_made_of_whole_blocks(tmp_path: Path, key: str) -> None:
    """Of 32 columns."""
    folder = make_pico_model(tmp_path / "model", hidden=48, intermediate=64)
    checkpoint = open_checkpoint(resolve_source(str(folder)))

    assert problems_of(checkpoint, onnx(**{key: "int4"}), group_size=16) == (
        f"{key} int4: the hidden size 48 is not a multiple of 32; use `{key}: float`",
    )


def test_schemes_that_are_chosen_are_counted_as_the_graph_has_them(pico: Checkpoint) -> None:
    """Sizes of candidates are those in the graph."""
    whole = make_plan(pico, onnx(), scheme="auto", target_bits=12.0, method="best")
    assert whole.choice is not None
    every = {
        name: make_plan(pico, onnx(), scheme=name).artifact_bytes
        for name in ("w4a16", "w8a16", "none")
    }

    assert whole.choice.lowest_bits == 8 * every["w4a16"] / whole.parameters
    assert whole.choice.highest_bits == 8 * every["none"] / whole.parameters


def test_group_sizes_are_named_where_one_is_unknown() -> None:
    """Sixteen is among them."""
    with pytest.raises(RecipeError, match="known: 16, 32, 64, 128, channel"):
        validate({"version": 1, "quantize": {"group_size": 17}})
