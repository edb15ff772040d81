"""Estimates from configs: the common planning table, and the real sizes of artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.cli.estimate import read_prices
from quantkit.errors import CheckpointError, InputError
from quantkit.estimating import estimate
from quantkit.estimating.records import Estimate
from quantkit.exports import plan_gguf_files
from quantkit.planning import make_plan
from quantkit.recipe import ExportSpec, validate
from tests.cli.running import ROOT

DEMO = ROOT / "models" / "demo-llama"
GB = 1e9
A100 = "a100-40gb"

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LLAMA_70B = LLAMA_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def sizes(found: Estimate) -> dict[str, float]:
    """First word of each format's name -> gigabytes."""
    return {row.name.split()[0]: row.size_bytes / GB for row in found.weights}


@pytest.mark.parametrize(("name", "row"), [("7B", (28, 14, 7, 4)), ("70B", (280, 140, 70, 35))])
def test_the_common_planning_table(name: str, row: tuple[float, ...]) -> None:
    """FP32, BF16, INT8 and about four bits; the scales of groups are a thirtieth of the last."""
    found = sizes(estimate(name))
    assert (found["FP32"], found["BF16"], found["w8a8"]) == row[:3]
    assert found["w4a16"] == pytest.approx(row[3], rel=0.1)


@pytest.mark.parametrize(
    ("config", "row"), [(LLAMA_7B, (28, 14, 7, 4)), (LLAMA_70B, (280, 140, 70, 35))]
)
def test_the_same_from_a_config(
    config: dict[str, Any], row: tuple[float, ...], tmp_path: Path
) -> None:
    """A 7B has 6.7 billion weights, and its tables stay in 16 bits."""
    found = sizes(estimate(write_config(tmp_path / "model", config)))
    mine = (found["FP32"], found["BF16"], found["w8a8"], found["w4a16"])
    assert mine == pytest.approx(row, rel=0.1)


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("BF16", 13.48), ("Q4_K_M", 4.08), ("Q8_0", 7.16), ("Q2_K", 2.53)]
)
def test_published_files_of_llama_2_7b(name: str, gigabytes: float, tmp_path: Path) -> None:
    """Sizes as llama.cpp's quantize README lists them for its mixes, tokenizer included."""
    found = sizes(estimate(write_config(tmp_path / "model", LLAMA_7B)))
    assert found[name] == pytest.approx(gigabytes, rel=0.03)


def test_artifacts_have_the_sizes_of_their_plans() -> None:
    """The plan's bytes are those of the files (tests of planning), so these are too."""
    found = {row.name.split()[0]: row.size_bytes for row in estimate(DEMO).weights}
    checkpoint = open_checkpoint(resolve_source(str(DEMO)))
    for scheme in ("w4a16", "w8a8", "fp8_dynamic"):
        recipe = validate({"version": 1, "quantize": {"scheme": scheme, "method": "rtn"}})
        planned = make_plan(recipe, checkpoint, gate=False).artifact_bytes
        assert found[scheme] == pytest.approx(planned, rel=0.001)
    exports = [ExportSpec(format="gguf", type=kind) for kind in ("Q8_0", "Q4_K_M", "Q2_K")]
    tokenizer = 40 * checkpoint.config["vocab_size"]
    for file in plan_gguf_files(exports, checkpoint, has_importance=True):
        assert found[file.type] == file.tensor_bytes + tokenizer


def test_files_have_the_estimated_sizes(tmp_path: Path) -> None:
    """Within 3 %, headers and tokenizer included."""
    found = {row.name: row.size_bytes for row in estimate(DEMO).weights}
    weights = DEMO / "model.safetensors"
    quantkit.convert(DEMO, to="gguf:Q4_0", output=tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("*.gguf")
    for size, path in ((found["BF16"], weights), (found["Q4_0"], file)):
        assert size == pytest.approx(path.stat().st_size, rel=0.03)


def test_experts_are_counted_without_memory(tmp_path: Path) -> None:
    """256 experts a layer are 671 billion weights, and nothing of them is allocated."""
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "vocab_size": 129280,
        "quantization_config": {"quant_method": "fp8"},
    }
    found = estimate(write_config(tmp_path / "model", config), context=4096, concurrency=1)
    assert found.parameters == pytest.approx(671e9, rel=0.001)
    assert any("quantized model" in note for note in found.notes)
    assert any(row.context == 4096 and row.bytes_16bit == 287_834_112 for row in found.caches)


def test_gpus_are_counted_by_what_fits(tmp_path: Path) -> None:
    """Of an A100 with 40 GB 37.1 are free: four hold 138 GB of weights and 2.7 of cache."""
    model = write_config(tmp_path / "model", LLAMA_70B)
    found = estimate(model, context=4096, concurrency=2, gpus=[A100], prices={A100: 2.0})
    rows = {row.weights.split()[0]: row for row in found.gpus}
    assert (rows["BF16"].count, rows["fp8_dynamic"].count, rows["w4a16"].count) == (4, 2, 2)
    assert rows["BF16"].monthly_price == 4 * 2.0 * 730
    assert f"but for {A100}" in found.prices
    # A cache of 86 GB with one key/value head is the same on each of any number of them.
    model = write_config(tmp_path / "one-head", LLAMA_70B | {"num_key_value_heads": 1})
    found = estimate(model, context=4096, concurrency=512, gpus=[A100])
    assert {row.count for row in found.gpus if row.weights.startswith("w4a16")} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"concurrency": -1}, "concurrency is -1"),
        ({"context": 4097}, "4096 positions"),
        ({"gpus": ["H1000"]}, "did you mean 'H100'"),
        ({"prices": {"H100": float("nan")}}, "not a number of dollars"),
    ],
)
def test_numbers_that_make_no_sense(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Each is refused in one line."""
    with pytest.raises(InputError, match=message):
        estimate(write_config(tmp_path / "model", LLAMA_7B), **arguments)


def test_models_that_cannot_be_estimated(tmp_path: Path) -> None:
    """An encoder, a folder without a config, a config with absurd sizes, no model at all."""
    bert = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 64}
    endless = LLAMA_7B | {"num_hidden_layers": 10**8}
    (tmp_path / "empty").mkdir()
    for model, message in (
        (write_config(tmp_path / "bert", bert), "is an encoder"),
        (write_config(tmp_path / "endless", endless), "no model has so many"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "absent", "no such folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            estimate(model)
    with pytest.raises(InputError, match="no model has so many weights"):
        estimate("99999T")


def test_prices_on_the_command_line() -> None:
    """With or without a dollar sign."""
    assert read_prices(["H100=2.5", "L4=$0.5"]) == {"H100": 2.5, "L4": 0.5}
    with pytest.raises(InputError, match=r"as H100=2\.50"):
        read_prices(["H100:2.5"])


def test_the_public_name() -> None:
    assert quantkit.estimate is estimate
