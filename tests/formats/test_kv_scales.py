"""Scales of the key/value cache: written as their readers look for them, and told when wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.formats.inspect import inspect_artifact
from quantkit.planning.kv import scale_bytes
from tests.formats.cases import Case, Choice, make_case, stored_tensors
from tests.helpers import make_pico_model

CHOICES: dict[str, list[Choice]] = {
    "nothing else": [],
    "w4a16": [("*", "w4a16", 32)],
    "static": [("*.mlp.*", "fp8_static", None), ("*", "w4a16_asym", 32)],
}
SHAPES: dict[str, tuple[int, ...]] = {"fp8": (1,), "fp8_per_head": (2, 1, 1)}


def _write(folder: Path, kv_cache: str, choices: list[Choice]) -> tuple[Case, Path]:
    model = make_pico_model(folder / "model", hidden=128, layers=3, tokenizer=False)
    case = make_case(model, choices, kv_cache=kv_cache)
    case.write(folder / "artifact")
    return case, folder / "artifact"


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("kv_cache", SHAPES)
def test_scales_are_written_and_described(tmp_path: Path, kv_cache: str, choices: str) -> None:
    """Two an attention layer, shaped for their strategy, in one file, all of them aligned."""
    case, folder = _write(tmp_path, kv_cache, CHOICES[choices])
    added = {name: each for block in case.blocks.values() for name, each in block.added.items()}
    stored = stored_tensors(folder)
    assert len(added) == 6
    for name, scale in added.items():
        assert torch.equal(stored[name], scale)
        assert tuple(stored[name].shape) == SHAPES[kv_cache]
        assert stored[name].dtype == torch.bfloat16
    assert scale_bytes(case.plan.kv_cache, "bfloat16") == sum(
        each.nbytes for each in added.values()
    )
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = described["kv_cache_scheme"]
    assert scheme["strategy"] == {"fp8": "tensor", "fp8_per_head": "attn_head"}[kv_cache]
    assert (scheme["num_bits"], scheme["type"]) == (8, "float")
    assert described["format"] == "dense" or case.layers
    # A few odd bytes between blocks would open a new file for each.
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    found = inspect_artifact(folder)
    assert (found.kv_cache, found.problems) == (kv_cache, ())


@pytest.mark.parametrize("kv_cache", SHAPES)
def test_every_tensor_starts_at_a_multiple_of_its_element_size(
    tmp_path: Path, kv_cache: str
) -> None:
    """With scales of one number, too."""
    _, folder = _write(tmp_path, kv_cache, CHOICES["static"])
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    with safe_open(file, framework="pt") as reader:
        for name in reader.keys():  # noqa: SIM118
            start = header[name]["data_offsets"][0]
            assert start % reader.get_tensor(name).element_size() == 0


@pytest.mark.parametrize("choices", ["nothing else", "w4a16"])
@pytest.mark.parametrize("kv_cache", SHAPES)
def test_transformers_loads_the_scales_and_rounds_the_cache(
    tmp_path: Path, kv_cache: str, choices: str
) -> None:
    """With the stored numbers, nothing left over, and keys and values rounded with them."""
    case, folder = _write(tmp_path, kv_cache, CHOICES[choices])
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for block in case.blocks.values():
        for name, scale in block.added.items():
            assert torch.equal(model.get_parameter(name), scale.float())
    with torch.no_grad():
        cache = model(torch.arange(3, 20)[None], use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        for part, held in (("k_scale", layer.keys), ("v_scale", layer.values)):
            scale = case.blocks[index].added[f"model.layers.{index}.self_attn.{part}"].float()
            assert _is_rounded(held[0], scale)
            assert not _is_rounded(held[0] * 1.01, scale)


def _is_rounded(held: Tensor, scale: Tensor) -> bool:
    """Whether values [H, T, D] are codes of eight bits times the scale [1] or [H, 1, 1]."""
    codes = held / scale
    return torch.allclose(codes, codes.to(torch.float8_e4m3fn).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "unplanned"])
def test_scales_other_than_planned_are_refused(tmp_path: Path, change: str) -> None:
    """A block that forgot one, or brought one too many, never becomes an artifact."""
    model = make_pico_model(tmp_path / "model", tokenizer=False)
    case = make_case(model, [], kv_cache="fp8")
    name = "model.layers.1.self_attn.k_scale"
    added: dict[str, Any] = dict(case.blocks[1].added)
    if change == "missing":
        del added[name]
    elif change == "extra":
        added["model.layers.1.self_attn.q_scale"] = added[name]
    elif change == "shape":
        added[name] = added[name].reshape(())
    blocks = {**case.blocks, 1: replace(case.blocks[1], added=added)}
    plan = replace(case.plan, kv_cache=None) if change == "unplanned" else case.plan
    with pytest.raises(ValueError, match=r"added tensors than planned|was announced as"):
        Case(case.checkpoint, plan, blocks).write(tmp_path / "artifact")
    assert not list((tmp_path / "artifact").glob("*.safetensors"))
