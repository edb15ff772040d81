"""The key/value cache in a plan: found by family, refused where it cannot be observed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.reader import open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import PlanError
from quantkit.planning import make_plan
from quantkit.recipe import validate
from quantkit.records import KvCachePlan, Plan
from tests.helpers import make_pico_model

CALIBRATION = {"data": "x.txt", "samples": 8, "sequence_length": 64}


def plan_of(
    folder: Path, calibration: dict[str, Any] | None = CALIBRATION, **quantize: Any
) -> Plan:
    """The plan of an ungated job."""
    settings = {"group_size": 32, **quantize}
    recipe = validate({"version": 1, "quantize": settings, "calibration": calibration})
    return make_plan(recipe, open_checkpoint(resolve_source(str(folder))), gate=False)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_model(tmp_path_factory.mktemp("pico") / "llama", tokenizer=False)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_knows_its_attention(tmp_path: Path, family: str) -> None:
    """One layer a block, with the heads of its config."""
    folder = make_pico_model(tmp_path / "model", family=family, tokenizer=False)
    names = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert plan_of(folder, kv_cache="fp8").kv_cache == KvCachePlan(False, names, 2, 16)
    assert plan_of(folder, kv_cache="fp8_per_head").kv_cache == KvCachePlan(True, names, 2, 16)
    assert plan_of(folder).kv_cache is None


def test_a_model_without_a_family_is_refused(tmp_path: Path) -> None:
    """Tracing finds linear layers, not attention; the problem is one among all."""
    folder = make_pico_model(tmp_path / "model", family="olmo2", tokenizer=False)
    with pytest.raises(PlanError) as caught:
        plan_of(folder, None, kv_cache="fp8", method="gptq")
    text = "\n".join(caught.value.problems)
    assert "no family file says where the attention of Olmo2ForCausalLM is" in text
    assert "calibration" in text


def test_calibration_data_is_needed(pico: Path) -> None:
    """Also where no layer's method asks for it."""
    with pytest.raises(PlanError, match=r"kv_cache fp8 .*calibration"):
        plan_of(pico, None, kv_cache="fp8", scheme="none")


def test_bytes_memory_and_notes_know_of_the_cache(pico: Path) -> None:
    """Two scales a layer, or two a head; and a walk for the cache alone holds activations."""
    without = plan_of(pico, scheme="none", method="rtn")
    layer = plan_of(pico, scheme="none", kv_cache="fp8")
    heads = plan_of(pico, scheme="none", kv_cache="fp8_per_head")

    assert layer.artifact_bytes == without.artifact_bytes + 2 * 2 * 2
    assert heads.artifact_bytes == without.artifact_bytes + 2 * 2 * 2 * 2
    assert layer.activation_bytes > 0 == without.activation_bytes
    assert any("compute capability 8.9" in note for note in layer.notes)
    assert any("FlashAttention 3" in note for note in heads.notes)
    assert any("head_dim that 32 divides, and it is 16" in note for note in layer.notes)
    assert any(note.startswith("no weight will be quantized") for note in layer.notes)
    assert not any("calibration data is not used" in note for note in layer.notes)


def test_heads_are_as_many_as_transformers_makes(tmp_path: Path) -> None:
    """A config that leaves the number out has as many as query heads."""
    folder = make_pico_model(tmp_path / "model", kv_heads=4, tokenizer=False)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_key_value_heads": None}))
    assert plan_of(folder, kv_cache="fp8").kv_cache.kv_heads == 4
