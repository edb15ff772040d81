"""The compressed-tensors writer against compressed-tensors and transformers as readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from quantkit.formats.decode import read_layer
from quantkit.formats.layouts import PARTS
from quantkit.numerics.affine import dequantize_layer
from tests.formats.cases import MIXED, UNLIKE, Case, Choice, list_files, make_case, stored_tensors
from tests.helpers import make_pico_model

CASES: dict[str, tuple[dict[str, Any], list[Choice]]] = {
    "llama-w4a16-g32": ({}, [("*", "w4a16", 32)]),
    "llama-w4a16-g64-untied": ({"tied": False}, [("*", "w4a16", 64)]),
    "llama-w4a16-g128": ({}, [("*", "w4a16", 128)]),
    "llama-w4a16-channel-odd-rows": (
        {"hidden": 80, "intermediate": 100, "kv_heads": 1},
        [("*", "w4a16", None)],
    ),
    "qwen2-w4a16-g64-bias": ({"family": "qwen2"}, [("*", "w4a16", 64)]),
    "qwen3-w8a16-g128": ({"family": "qwen3"}, [("*", "w8a16", 128)]),
    "mistral-w8a16-channel-float16": (
        {"family": "mistral", "dtype": "float16"},
        [("*", "w8a16", None)],
    ),
    "llama-mixed": ({}, MIXED),
    "llama-nothing": ({}, []),
    "qwen2-w4a16_asym-g32-bias": ({"family": "qwen2"}, [("*", "w4a16_asym", 32)]),
    "llama-w4a16_asym-g128": ({}, [("*", "w4a16_asym", 128)]),
    "llama-w4a16_asym-channel-odd-rows": (
        {"hidden": 80, "intermediate": 100, "kv_heads": 1},
        [("*", "w4a16_asym", None)],
    ),
    "llama-mixed-asym": ({}, [("*.down_proj", "w4a16_asym", 32), ("*", "w8a16", 64)]),
    "llama-w4a8-g32": ({}, [("*", "w4a8", 32)]),
    "qwen3-w4a8-channel": ({"family": "qwen3"}, [("*", "w4a8", None)]),
    "llama-w4a8_fp8-g128": ({}, [("*", "w4a8_fp8", 128)]),
    "qwen2-w8a8-bias": ({"family": "qwen2"}, [("*", "w8a8", None)]),
    "llama-w8a8_static-odd-rows": (
        {"hidden": 80, "intermediate": 100, "kv_heads": 1},
        [("*", "w8a8_static", None)],
    ),
    "mistral-fp8_dynamic-float16": (
        {"family": "mistral", "dtype": "float16"},
        [("*", "fp8_dynamic", None)],
    ),
    "llama-fp8_static": ({}, [("*", "fp8_static", None)]),
    "llama-fp8_block": (
        {"hidden": 256, "intermediate": 384, "kv_heads": 2},
        [("*", "fp8_block", None)],
    ),
    "llama-unlike": ({"kv_heads": 4}, UNLIKE),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Path]]:
    """Every case, written once."""
    root = tmp_path_factory.mktemp("artifacts")
    written = {}
    for name, (options, choices) in CASES.items():
        shape = {"hidden": 128, "intermediate": 256} | options
        model = make_pico_model(root / name / "model", **shape)
        case = make_case(model, choices, scale_dtype=options.get("dtype", "bfloat16"))
        case.write(root / name / "artifact")
        written[name] = (case, root / name / "artifact")
    return written


def _quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama-nothing"])
def test_the_library_decompresses_exactly_the_recorded_values(
    artifacts: dict[str, tuple[Case, Path]], name: str
) -> None:
    """compressed-tensors' own decompressor, in float32, gives each record's weights bit for bit."""
    case, folder = artifacts[name]
    stored = stored_tensors(folder)
    groups = QuantizationConfig.model_validate(_quantization_config(folder)).config_groups
    schemes = {target: scheme for scheme in groups.values() for target in scheme.targets}
    assert case.layers
    for layer in case.layers.values():
        prefix = f"{layer.name}."
        parts = {
            tensor.removeprefix(prefix): value
            for tensor, value in stored.items()
            if tensor.startswith(f"{prefix}weight")
        }
        assert parts["weight_scale"].dtype == layer.scale.dtype
        parts["weight_scale"] = parts["weight_scale"].float()
        scheme = schemes.get(layer.name) or schemes["Linear"]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        assert parts.keys() == set(compressor.compression_param_names(scheme))
        found = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(found, dequantize_layer(layer))


def _load(folder: Path, dtype: torch.dtype, *, dequantize: bool = False) -> Any:
    config = CompressedTensorsConfig(dequantize=True) if dequantize else None
    options = {"quantization_config": config} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    with torch.no_grad():
        # The first forward decompresses the weights.
        assert torch.isfinite(model(torch.arange(3, 19)[None]).logits).all()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_exactly_the_recorded_values(
    artifacts: dict[str, tuple[Case, Path]],
    name: str,
    dtype: torch.dtype,
) -> None:
    """Each loaded weight equals the record: bit for bit in float32, else rounded once.

    compressed-tensors multiplies codes by scales in the dtype of the model; the exact product of
    both is a float32, so in bfloat16 it is rounded once.
    """
    case, folder = artifacts[name]
    model = _load(folder, dtype)
    _compare_model(case, model, dtype)
    generated = model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 10)


def _compare_model(case: Case, model: Any, dtype: torch.dtype) -> None:
    """Compare every parameter with the record or, where there is none, with the checkpoint."""
    if case.checkpoint.config["dtype"] == "float16" and dtype == torch.bfloat16:
        # Scales of 11 significant bits are rounded on their own before the product is.
        def expect(layer: Any) -> Tensor:
            scale = (
                layer.scale.to(dtype)
                .float()
                .repeat_interleave(layer.codes.shape[1] // layer.scale.shape[1], dim=1)
            )
            return (layer.codes.float() * scale).to(dtype)
    else:

        def expect(layer: Any) -> Tensor:
            return dequantize_layer(layer).to(dtype)

    for name, layer in case.layers.items():
        assert torch.equal(model.get_submodule(name).weight, expect(layer))
    original = load_file(case.checkpoint.source.folder / "model.safetensors")
    compared = 0
    for name, parameter in model.named_parameters():
        if name in original and name.removesuffix(".weight") not in case.layers:
            assert torch.equal(parameter, original[name].to(dtype))
            compared += 1
    assert compared == len(original) - len(case.layers)


@pytest.mark.parametrize("name", ["qwen2-w4a16_asym-g32-bias", "llama-w4a16_asym-channel-odd-rows"])
def test_transformers_dequantizes_zero_points_on_loading(
    artifacts: dict[str, tuple[Case, Path]], name: str
) -> None:
    """The way that every version reads: `dequantize=True` gives the record rounded to bfloat16."""
    case, folder = artifacts[name]
    model = _load(folder, torch.bfloat16, dequantize=True)
    _compare_model(case, model, torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama-nothing"])
def test_read_layer_returns_the_record(artifacts: dict[str, tuple[Case, Path]], name: str) -> None:
    """quantkit's own reader finds codes, scales, zero points, scheme and group size again."""
    case, folder = artifacts[name]
    for layer in case.layers.values():
        found = read_layer(folder, layer.name)
        assert (found.name, found.scheme, found.group_size) == (
            layer.name,
            layer.scheme,
            layer.group_size,
        )
        assert torch.equal(found.codes, layer.codes)
        assert torch.equal(found.scale, layer.scale)
        if found.zero_point is None or layer.zero_point is None:
            assert found.zero_point is layer.zero_point
        else:
            assert torch.equal(found.zero_point, layer.zero_point)


@pytest.mark.parametrize("name", CASES)
def test_all_other_tensors_keep_their_bytes(
    artifacts: dict[str, tuple[Case, Path]], name: str
) -> None:
    """Nothing but quantized weights is missing, and what was not quantized is equal."""
    case, folder = artifacts[name]
    original = load_file(case.checkpoint.source.folder / "model.safetensors")
    stored = stored_tensors(folder)
    parts = {f"{layer}.{part}" for layer in case.layers for part in PARTS}
    kept = original.keys() - {f"{layer}.weight" for layer in case.layers}
    assert stored.keys() - parts == kept
    assert all(stored[name].dtype == original[name].dtype for name in kept)
    assert all(torch.equal(stored[name], original[name]) for name in kept)


@pytest.mark.parametrize("name", CASES)
def test_the_sizes_are_those_of_thelist_files(
    artifacts: dict[str, tuple[Case, Path]], name: str, tmp_path: Path
) -> None:
    """`tensor_bytes` and bits per weight count every tensor on the disk, and `files` every file."""
    case, folder = artifacts[name]
    artifact = case.write(tmp_path / "again")
    total = sum(tensor.nbytes for tensor in stored_tensors(folder).values())
    assert artifact.tensor_bytes == total
    assert artifact.bits_per_weight == 8 * total / case.plan.parameters
    written = {
        path.relative_to(tmp_path / "again").as_posix() for path in list_files(tmp_path / "again")
    }
    assert artifact.files.keys() == written
    for path in list_files(folder):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()


def test_one_group_targets_all_linears_and_names_the_rest(
    artifacts: dict[str, tuple[Case, Path]],
) -> None:
    """`Linear` is the target and every linear module that stays 16-bit is ignored by name."""
    config = _quantization_config(artifacts["llama-w4a16-g32"][1])
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    assert config["format"] == group["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["kv_cache_scheme"] is None


def test_several_groups_name_their_layers(artifacts: dict[str, tuple[Case, Path]]) -> None:
    """Every quantized layer is a target of exactly its group; all other linears are ignored."""
    case, folder = artifacts["llama-mixed"]
    config = _quantization_config(folder)
    targets: dict[str, tuple[int, int | None, str]] = {}
    for group in config["config_groups"].values():
        weights = group["weights"]
        for target in group["targets"]:
            assert target not in targets
            targets[target] = (weights["num_bits"], weights["group_size"], weights["strategy"])
    assert targets == {
        name: (
            layer.scheme.weight_bits,
            layer.group_size,
            "channel" if layer.group_size is None else "group",
        )
        for name, layer in case.layers.items()
    }
    attention = [f"model.layers.1.self_attn.{part}_proj" for part in "koqv"]
    assert config["ignore"] == ["lm_head", *attention]


def test_the_config_keeps_everything_else(artifacts: dict[str, tuple[Case, Path]]) -> None:
    """Only `quantization_config` is added, with keys that compressed-tensors knows."""
    for case, folder in artifacts.values():
        config = json.loads((folder / "config.json").read_text())
        description = config.pop("quantization_config", None)
        assert config == dict(case.checkpoint.config)
        assert (description is None) == (not case.layers)
        if description is not None:
            known = {
                *QuantizationConfig.model_fields,
                "version",
                "sparsity_config",
                "transform_config",
            }
            assert description.keys() <= known


def test_every_tensor_starts_at_a_multiple_of_its_element_size(
    artifacts: dict[str, tuple[Case, Path]],
) -> None:
    """Readers map tensors as they lie, so wide elements come first in a block."""
    for _, folder in artifacts.values():
        for file in folder.glob("*.safetensors"):
            data = file.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118
                    start = header[name]["data_offsets"][0]
                    assert start % reader.get_tensor(name).element_size() == 0
