"""ModelOpt's layout: what is written to the byte, read back, verified, refused and converted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.reader import read_tensor
from quantkit.errors import ArtifactError
from quantkit.formats.decode import open_artifact
from quantkit.formats.inspect import inspect_artifact
from quantkit.formats.modelopt.writing import write_modelopt
from quantkit.formats.readers.stored import open_stored, read_quantized, read_weight
from quantkit.formats.verify import verify_artifact
from quantkit.numerics.affine import dequantize_layer, quantize
from quantkit.records import Artifact, QuantizedLayer
from tests.formats.cases import ALL_IN_ONE, Case, make_case, stored_tensors
from tests.helpers import make_pico_model

Q = "model.layers.0.self_attn.q_proj"
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of 64 divide its rows."""
    return make_pico_model(
        tmp_path_factory.mktemp("modelopt") / "model", hidden=128, intermediate=256, tied=False
    )


def with_one_scale(case: Case) -> Case:
    """Round every layer anew under the largest scale of its rows."""

    def share(layer: QuantizedLayer) -> QuantizedLayer:
        scale = layer.scale.amax(dim=0, keepdim=True).expand_as(layer.scale).contiguous()
        weight = read_tensor(case.checkpoint, f"{layer.name}.weight").float()
        return replace(layer, scale=scale, codes=quantize(weight, scale, None, layer.scheme))

    blocks = {
        index: replace(block, layers=tuple(map(share, block.layers)))
        for index, block in case.blocks.items()
    }
    return replace(case, blocks=blocks)


def solve(model: Path, scheme: str, kv_cache: str = "none", ignored: str | None = None) -> Case:
    """Round all layers, those of FP8 under one scale each."""
    group_size = 64 if scheme == "w4a16" else None
    choices = [("*", scheme, group_size)]
    if ignored is not None:
        choices.insert(0, (ignored, "none", None))
    case = make_case(model, choices, kv_cache=kv_cache)
    return with_one_scale(case) if scheme == "fp8_static" else case


def write(case: Case, folder: Path) -> Artifact:
    """Write the artifact."""
    return write_modelopt(case.checkpoint, case.plan, case.blocks.__getitem__, folder, ALL_IN_ONE)


def read_json(path: Path) -> Any:
    """Return a document."""
    return json.loads(path.read_text())


SCHEMES = ("fp8_static", "fp8_dynamic", "w8a8_static", "w4a16")


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (
            "fp8_static",
            {
                "weight": ("float8_e4m3fn", (128, 128)),
                "weight_scale": ("float32", ()),
                "input_scale": ("float32", ()),
            },
        ),
        (
            "fp8_dynamic",
            {"weight": ("float8_e4m3fn", (128, 128)), "weight_scale": ("float32", (128,))},
        ),
        (
            "w8a8_static",
            {
                "weight": ("int8", (128, 128)),
                "weight_scale": ("float32", (128,)),
                "input_scale": ("float32", ()),
                "pre_quant_scale": ("bfloat16", (128,)),
            },
        ),
        (
            "w4a16",
            {
                "weight": ("uint8", (64, 128)),
                "weight_scale": ("float32", (128, 2)),
                "pre_quant_scale": ("bfloat16", (128,)),
            },
        ),
    ],
)
def test_a_layer_has_the_tensors_of_its_algorithm(
    model: Path, tmp_path: Path, scheme: str, expected: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """Names, dtypes, shapes and numbers; everything else is the checkpoint's."""
    case = solve(model, scheme)
    artifact = write(case, tmp_path / "modelopt")
    stored = stored_tensors(artifact.folder)
    found = {
        name.rpartition(".")[2]: (str(each.dtype).removeprefix("torch."), tuple(each.shape))
        for name, each in stored.items()
        if name.startswith(f"{Q}.")
    }
    assert found == expected
    layer, scale = case.layers[Q], stored[f"{Q}.weight_scale"]
    rows = scale if scale.ndim == 2 else scale.reshape(-1, 1).expand(128, 1)
    assert torch.equal(rows, layer.scale.float())
    if layer.input_scale is not None:
        assert float(stored[f"{Q}.input_scale"]) == float(layer.input_scale)
    assert all(bool((stored[name] == 1).all()) for name in stored if "pre_quant" in name)
    original = stored_tensors(model)
    kept = [name for name in original if name.removesuffix(".weight") not in case.layers]
    assert kept
    assert all(torch.equal(stored[name], original[name]) for name in kept)
    assert artifact.tensor_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_two_rows_share_a_byte(model: Path, tmp_path: Path) -> None:
    """The even row in the low half, both in two's complement."""
    case = solve(model, "w4a16")
    stored = stored_tensors(write(case, tmp_path / "modelopt").folder)
    packed = stored[f"{Q}.weight"].int()
    codes = case.layers[Q].codes.int()
    assert int(codes.min()) == -8
    assert torch.equal(packed & 15, codes[0::2] % 16)
    assert torch.equal(packed >> 4, codes[1::2] % 16)


def test_the_description_is_written_twice(model: Path, tmp_path: Path) -> None:
    """In hf_quant_config.json as TensorRT-LLM reads it, in config.json as vLLM does."""
    case = solve(model, "w4a16", "fp8", ignored="*.layers.1.mlp.*")
    folder = write(case, tmp_path / "modelopt").folder
    ignored = [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
    excluded = ["lm_head", "model.embed_tokens", *ignored]
    assert read_json(folder / "hf_quant_config.json") == {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": "W4A16_AWQ",
            "kv_cache_quant_algo": "FP8",
            "group_size": 64,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": excluded,
        },
    }
    config = read_json(folder / "config.json")
    described = config.pop("quantization_config")
    assert config == read_json(model / "config.json")
    assert described == {
        "config_groups": {
            "group_0": {
                "weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": 64},
                "targets": ["Linear"],
            }
        },
        "ignore": excluded,
        "quant_algo": "W4A16_AWQ",
        "group_size": 64,
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def test_scales_of_the_cache_lie_at_the_projections(model: Path, tmp_path: Path) -> None:
    """Their numbers are those of the other formats."""
    case = solve(model, "fp8_static", "fp8")
    stored = stored_tensors(write(case, tmp_path / "modelopt").folder)
    for part, place in (("k_scale", "k_proj"), ("v_scale", "v_proj")):
        scale = stored[f"{ATTENTION}.{place}.{part}"]
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert float(scale) == float(case.blocks[0].added[f"{ATTENTION}.{part}"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_written_is_read_back(model: Path, tmp_path: Path, scheme: str) -> None:
    """Codes and scales are the solved ones; `inspect` and `verify --against` find no fault."""
    case = solve(model, scheme, "fp8")
    folder = write(case, tmp_path / "modelopt").folder
    stored = open_stored(open_artifact(folder))
    assert stored is not None
    for name, layer in case.layers.items():
        found = read_quantized(stored, name)
        assert torch.equal(found.codes.view(torch.int8), layer.codes.view(torch.int8))
        assert torch.equal(found.scale, layer.scale.float())
        assert (found.scheme, found.group_size) == (layer.scheme, layer.group_size)
        assert torch.equal(read_weight(stored, name), dequantize_layer(layer))
    inspected = inspect_artifact(folder)
    assert (inspected.format, inspected.kv_cache) == ("modelopt", "fp8")
    assert inspected.parameters == inspect_artifact(model).parameters
    checked = verify_artifact(folder, str(model))
    assert checked.problems == ()
    assert checked.comparison is not None
    assert {layer.name for layer in checked.comparison.layers} == case.layers.keys()
    assert checked.runtimes[0].runtime == "tensorrt-llm"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_gets_the_same_bytes(model: Path, tmp_path: Path, scheme: str) -> None:
    """Converted, it is what the other writer makes of the same solved blocks."""
    case = solve(model, scheme, "fp8")
    case.write(tmp_path / "compressed")
    folder = write(case, tmp_path / "modelopt").folder
    made = quantkit.convert(folder, to="compressed-tensors", output=tmp_path / "converted")
    assert made.notes == ()
    mine, other = (stored_tensors(tmp_path / name) for name in ("compressed", "converted"))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape)
        assert torch.equal(as_bytes(tensor), as_bytes(other[name]))
    assert read_json(tmp_path / "compressed" / "config.json") == read_json(
        tmp_path / "converted" / "config.json"
    )


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_weights_are_multiplied_by_a_pre_quant_scale(model: Path, tmp_path: Path) -> None:
    """What is multiplied to the input of a layer belongs to the columns of its weight."""
    case = solve(model, "w4a16")
    folder = write(case, tmp_path / "modelopt").folder
    tensors = stored_tensors(folder)
    tensors[f"{Q}.pre_quant_scale"][5] = 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = dequantize_layer(case.layers[Q])
    expected[:, 5] *= 2
    quantkit.convert(folder, to="safetensors", output=tmp_path / "plain", dtype="float32")
    assert torch.equal(stored_tensors(tmp_path / "plain")[f"{Q}.weight"], expected)
    with pytest.raises(ArtifactError, match=f"{Q} has a pre_quant_scale that is not 1"):
        quantkit.convert(folder, to="compressed-tensors", output=tmp_path / "converted")


def test_rows_with_scales_of_their_own_are_not_written_as_one(model: Path, tmp_path: Path) -> None:
    """Nothing is rounded a second time to make it fit."""
    case = make_case(model, [("*", "fp8_static", None)])
    with pytest.raises(ValueError, match="rows with scales of their own"):
        write(case, tmp_path / "modelopt")
    assert not list((tmp_path / "modelopt").glob("*.safetensors"))
    assert not (tmp_path / "modelopt" / "config.json").exists()


def test_layers_of_two_kinds_are_refused(model: Path, tmp_path: Path) -> None:
    case = make_case(model, [("*.mlp.*", "w4a16", 64), ("*", "w8a8_static", None)])
    with pytest.raises(ValueError, match="one algorithm for all layers"):
        write(case, tmp_path / "modelopt")


def change_description(folder: Path, **changes: object) -> None:
    """Change hf_quant_config.json alone."""
    path = folder / "hf_quant_config.json"
    document = read_json(path)
    document["quantization"] |= changes
    path.write_text(json.dumps(document))


def damage_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace or drop parts of the first query layer, or scales of its cache."""
    tensors = stored_tensors(folder)
    for part, tensor in changes.items():
        tensors.pop(f"{Q}.{part}", None)
        if tensor is not None:
            tensors[f"{Q}.{part}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_scale": None}, "has no weight_scale"),
        ({"weight_scale": torch.ones(128)}, "not as FP8"),
        ({"weight_scale": torch.tensor(-1.0)}, "scales that are not positive"),
        ({"input_scale": torch.tensor(torch.nan)}, "input_scale"),
        ({"weight": torch.zeros(128, 128, dtype=torch.bfloat16)}, "not as FP8"),
    ],
)
def test_damage_is_found(
    model: Path, tmp_path: Path, changes: dict[str, Tensor | None], words: str
) -> None:
    """By `verify`, and so by the gate."""
    folder = write(solve(model, "fp8_static"), tmp_path / "modelopt").folder
    damage_tensors(folder, **changes)
    problems = verify_artifact(folder).problems
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, "contradict each other in quant_algo"),
        ({"kv_cache_quant_algo": None}, "contradict each other in the key/value cache"),
        ({"exclude_modules": ["lm_head", "model.layers.0.*"]}, f"{Q} is quantized, but"),
        ({"exclude_modules": ["model.embed_tokens"]}, "lm_head is not quantized, but"),
    ],
)
def test_descriptions_that_are_wrong_are_found(
    model: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    folder = write(solve(model, "fp8_static", "fp8"), tmp_path / "modelopt").folder
    change_description(folder, **changes)
    problems = verify_artifact(folder).problems
    assert any(words in problem for problem in problems), problems


def test_missing_scales_of_the_cache_are_found(model: Path, tmp_path: Path) -> None:
    """Servers would take 1 for them."""
    folder = write(solve(model, "fp8_dynamic", "fp8"), tmp_path / "modelopt").folder
    tensors = stored_tensors(folder)
    del tensors[f"{ATTENTION}.k_proj.k_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (problem,) = verify_artifact(folder).problems
    assert "1 of its scales are missing" in problem


def test_algorithms_that_are_not_read_are_named(model: Path, tmp_path: Path) -> None:
    folder = write(solve(model, "fp8_static"), tmp_path / "modelopt").folder
    change_description(folder, quant_algo="NVFP4")
    with pytest.raises(ArtifactError, match="quant_algo 'NVFP4' cannot be read yet") as caught:
        inspect_artifact(folder)
    assert "W4A16_AWQ" in str(caught.value)


def test_one_changed_layer_is_found_against_the_original(model: Path, tmp_path: Path) -> None:
    """Codes of other rows."""
    case = solve(model, "fp8_static")
    folder = write(case, tmp_path / "modelopt").folder
    damage_tensors(folder, weight=case.layers[Q].codes.float().roll(1, 0).to(torch.float8_e4m3fn))
    problems = verify_artifact(folder, str(model)).problems
    assert any(Q in problem for problem in problems), problems


def test_solved_blocks_may_not_lose_a_scale(model: Path, tmp_path: Path) -> None:
    """A cache that was planned and not solved."""
    case = solve(model, "fp8_static", "fp8")
    blocks = {index: replace(block, added={}) for index, block in case.blocks.items()}
    with pytest.raises(ValueError, match="other added tensors than planned"):
        write(replace(case, blocks=blocks), tmp_path / "modelopt")
