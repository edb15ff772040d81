"""`verify_artifact`: nothing to say about what is sound, one line for each thing that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint.reader import read_tensor
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.decode import read_layer
from quantkit.formats.verify import Verification, verify_artifact
from quantkit.numerics.affine import choose_absmax, quantize
from quantkit.records import QuantizedLayer
from quantkit.schemes import SCHEMES
from tests.formats.cases import UNLIKE, Case, make_case
from tests.helpers import make_pico_model

Tensors = dict[str, Tensor]
Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """Packed, integer and float layers, and a quantized cache."""
    root = tmp_path_factory.mktemp("verify")
    model = make_pico_model(root / "model", hidden=128, intermediate=256, kv_heads=4)
    case = make_case(model, UNLIKE, kv_cache="fp8_per_head")
    case.write(root / "artifact")
    return case, root / "artifact"


@pytest.fixture
def artifact(made: tuple[Case, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(made[1], tmp_path / "artifact")


def _edit_tensors(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def _answers(found: Verification) -> dict[str, str]:
    return {support.runtime: support.serves for support in found.runtimes}


def test_a_sound_artifact_has_no_problem(made: tuple[Case, Path]) -> None:
    """And everything about it is told."""
    case, folder = made
    found = verify_artifact(folder, str(case.checkpoint.source.folder))
    assert found.problems == ()
    assert found.notes == ()
    assert found.kv_cache == "fp8_per_head"
    assert found.layers == len(case.layers)
    assert found.tensors == len(load_file(folder / "model.safetensors"))
    assert found.comparison is not None
    assert found.comparison.changed == ()
    assert {layer.name for layer in found.comparison.layers} == case.layers.keys()
    assert 0.005 < found.comparison.largest_error < 0.2
    assert not [layer for layer in found.comparison.layers if layer.folded]


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "none"])
def test_every_scheme_is_sound_and_has_its_runtimes(tmp_path: Path, scheme: str) -> None:
    """transformers serves all of them; vLLM's answer is told with its source."""
    model = make_pico_model(tmp_path / "model", hidden=256, intermediate=384)
    grouped = SCHEMES[scheme].grouped
    make_case(model, [("*", scheme, 128 if grouped else None)]).write(tmp_path / "artifact")
    found = verify_artifact(tmp_path / "artifact", str(model))
    assert found.problems == ()
    assert found.scheme == (f"{scheme} g128" if grouped else scheme)
    assert _answers(found)["transformers"] == "yes"
    assert _answers(found)["vllm-cuda"] in ("yes", "partly")
    for support in found.runtimes:
        assert all(answer.what == scheme and answer.source for answer in support.answers)


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"tied": False}, {"dtype": "float32"}])
def test_a_plain_checkpoint_is_verified_too(tmp_path: Path, options: dict[str, Any]) -> None:
    """Complete and finite; every runtime serves it."""
    model = make_pico_model(tmp_path / "model", **options)
    found = verify_artifact(model, str(model))
    assert (found.problems, found.scheme, found.layers) == ((), "none", 0)
    assert set(_answers(found).values()) == {"yes"}
    assert found.comparison is not None
    assert found.comparison.equal == found.tensors


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return edit


def _spoil(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    return change


def _drop(*names: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def _ones(part: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(part):
                tensors[name] = torch.ones_like(tensors[name])

    return edit


def _move_scale(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.k_scale"
    tensors[name] = tensors[name].reshape(-1)[:1]


NORM = "model.layers.0.input_layernorm.weight"

DAMAGES: list[tuple[Callable[[Tensors], None], str]] = [
    (_drop(f"{Q}.weight_scale"), f"layer {Q} has no weight_scale"),
    (_drop(f"{DOWN}.input_scale"), f"layer {DOWN} lacks input_scale, which w8a8_static has"),
    (_drop(f"{GATE}.weight_zero_point"), f"layer {GATE} lacks weight_zero_point"),
    (_drop(f"{GATE}.weight_shape"), f"layer {GATE} has no weight_shape"),
    (_drop(f"{GATE}.weight_packed"), "1 tensors of the model are missing"),
    (_drop(NORM), "random numbers: model.layers.*.input_layernorm.weight"),
    (_set(f"{Q}.weight_scale", _spoil(0.0)), "holds 1 scales that are not positive, of 128"),
    (_set(f"{Q}.weight_scale", _spoil(-1.0)), "holds 1 scales that are not positive, of 128"),
    (_set(f"{Q}.weight_scale", _spoil(float("inf"))), "1 NaN or infinite value of 128"),
    (_set(NORM, _spoil(float("nan"))), "1 NaN or infinite value of 128"),
    (
        _set("model.layers.1.mlp.down_proj.weight", lambda codes: _nan_code(codes)),
        "1 NaN or infinite value",
    ),
    (_set(f"{Q}.weight_scale", lambda scale: scale[:64]), "[64, 1], but w8a8 has"),
    (
        _set(f"{Q}.weight_scale", lambda scale: scale.to(torch.int32)),
        "is I32 [128, 1], but w8a8 has BF16 or F16 or F32 [128, 1]",
    ),
    (_set(f"{Q}.weight", lambda codes: codes.to(torch.float8_e4m3fn)), "but w8a8 has I8"),
    (_set(f"{Q}.weight", lambda codes: codes.float()), f"layer {Q} is not quantized, but"),
    (
        _set(f"{GATE}.weight_shape", lambda shape: shape.flip(0)),
        "describes [256, 128]",
    ),
    (_drop("model.layers.0.self_attn.k_scale"), "1 of its scales are missing"),
    (_move_scale, "has the shape [1], not [4, 1, 1]"),
    (_ones(".k_scale"), "every k_scale of the 2 attention layers is exactly 1"),
    (_ones(".v_scale"), "every v_scale of the 2 attention layers is exactly 1"),
    (_set("model.layers.1.self_attn.v_scale", _spoil(0.0)), "scales that are not positive"),
]


def _nan_code(codes: Tensor) -> Tensor:
    spoilt = codes.clone().view(torch.uint8)
    spoilt.view(-1)[0] = 0x7F
    return spoilt.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("damage", "problem"), DAMAGES, ids=[text for _, text in DAMAGES])
def test_damaged_tensors_are_problems(
    artifact: Path, damage: Callable[[Tensors], None], problem: str
) -> None:
    """One line says which tensor and what is wrong with it."""
    _edit_tensors(artifact, damage)
    found = verify_artifact(artifact)
    assert [line for line in found.problems if problem in line], found.problems


def _groups(config: dict[str, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = config["quantization_config"]["config_groups"]
    return groups


def _retarget(config: dict[str, Any]) -> None:
    """Let k_proj be described as down_proj's fp8."""
    for group in _groups(config).values():
        group["targets"] = [name for name in group["targets"] if name != K]
        if group["weights"]["type"] == "float" and group["weights"]["strategy"] == "channel":
            group["targets"].append(K)


CONFIGS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (
        lambda config: config["quantization_config"].update(kv_cache_scheme=None),
        "config.json has no kv_cache_scheme",
    ),
    (
        lambda config: config["quantization_config"]["kv_cache_scheme"].update(num_bits=4),
        "a key/value cache that vLLM refuses",
    ),
    (
        lambda config: config["quantization_config"]["kv_cache_scheme"].update(strategy="tensor"),
        "has the shape [4, 1, 1], not [1]",
    ),
    (
        lambda config: config["quantization_config"]["ignore"].append(Q),
        "vLLM makes one layer of these",
    ),
    (lambda config: config.update(hidden_size=64), "but config.json describes"),
    (lambda config: config.update(num_hidden_layers=3), "tensors of the model are missing"),
    (
        lambda config: _groups(config)["group_0"]["targets"].clear(),
        "no group of config.json is for it",
    ),
    (
        lambda config: _groups(config)["group_0"]["weights"].update(num_bits=16),
        "1 config groups describe no layout",
    ),
    (
        lambda config: _groups(config)["group_0"]["targets"].append("model.layers.1.mlp.up_proj"),
        "layer model.layers.1.mlp.up_proj is not quantized, but config.json says that it is",
    ),
    (_retarget, f"{K} fp8_dynamic"),
    (_retarget, f"tensor {K}.weight is I8 [128, 128], but fp8_dynamic has F8_E4M3"),
]


@pytest.mark.parametrize(
    ("change", "problem"), CONFIGS, ids=[f"{index}-{row[1]}" for index, row in enumerate(CONFIGS)]
)
def test_a_config_at_odds_with_the_tensors_is_a_problem(
    artifact: Path, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    """What the readers would make of the tensors is not what they are."""
    _edit_config(artifact, change)
    found = verify_artifact(artifact)
    assert [line for line in found.problems if problem in line], found.problems


def test_input_scales_of_fused_layers_must_be_one(tmp_path: Path) -> None:
    """vLLM keeps one of them for q, k and v: the others' inputs would be rounded with it."""
    model = make_pico_model(tmp_path / "model")
    make_case(model, [("*", "w8a8_static", None)]).write(tmp_path / "artifact")
    _edit_tensors(tmp_path / "artifact", _set(f"{K}.input_scale", lambda scale: scale * 2))
    (problem,) = verify_artifact(tmp_path / "artifact").problems
    assert "vLLM rounds the input of these with one scale" in problem
    assert f"{K}.input_scale 0.0625" in problem


def test_codes_out_of_their_bits_are_told(tmp_path: Path) -> None:
    """4-bit codes that lie in whole bytes, as some tools store them."""
    model = make_pico_model(tmp_path / "model", tokenizer=False)
    case = make_case(model, [("*", "w8a8", None)])
    case.write(tmp_path / "artifact")
    _edit_config(
        tmp_path / "artifact",
        lambda config: _groups(config)["group_0"]["weights"].update(num_bits=4),
    )
    found = verify_artifact(tmp_path / "artifact")
    assert len([line for line in found.problems if "not of 4 bits" in line]) == 14
    assert found.notes == ("there is no tokenizer: a server needs one",)


def test_an_index_with_another_total_is_a_problem(tmp_path: Path) -> None:
    """And files that no index names are noted."""
    model = make_pico_model(tmp_path / "model", shards=2)
    index = model / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["metadata"]["total_size"] += 1
    index.write_text(json.dumps(document))
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "old.safetensors")
    found = verify_artifact(model)
    assert "says" in found.problems[0]
    assert found.notes == ("not read, since no index names them: old.safetensors",)


def test_what_nobody_reads_is_noted(artifact: Path) -> None:
    """A tensor without a place in the model does no harm."""
    _edit_tensors(artifact, lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    found = verify_artifact(artifact)
    assert found.problems == ()
    assert "no place in the model" in found.notes[0]


def test_a_model_that_cannot_be_built_is_checked_as_far_as_it_goes(artifact: Path) -> None:
    """What was not checked is said."""
    _edit_config(artifact, lambda config: config.update(model_type="martian"))
    found = verify_artifact(artifact)
    assert found.problems == ()
    assert found.notes[0].startswith("not checked whether all tensors are there")
    _edit_tensors(artifact, _drop(f"{DOWN}.input_scale"))
    assert verify_artifact(artifact).problems


def test_nothing_to_read_is_an_error(tmp_path: Path, made: tuple[Case, Path]) -> None:
    """One line, as for every command; a base that is quantized is none."""
    with pytest.raises(ArtifactError, match="there is no artifact"):
        verify_artifact(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="quantized already"):
        verify_artifact(made[1], str(made[1]))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        verify_artifact(made[1], str(tmp_path / "absent"))


# --- against the base ---------------------------------------------------------------------------


def test_weights_of_another_model_are_problems(made: tuple[Case, Path], tmp_path: Path) -> None:
    """Same shapes, other numbers: every layer is far from what rounding could do."""
    options = {"hidden": 128, "intermediate": 256, "kv_heads": 4}
    other = make_pico_model(tmp_path / "other", **options, seed=1)
    found = verify_artifact(made[1], str(other))
    assert found.comparison is not None
    assert len(found.comparison.problems) == len(made[0].layers)
    assert found.comparison.largest_error > 1
    assert found.comparison.equal == 0
    smaller = make_pico_model(tmp_path / "smaller", hidden=64)
    assert "has the shape" in verify_artifact(made[1], str(smaller)).problems[0]


def test_names_that_only_one_of_both_has_are_problems(
    artifact: Path, made: tuple[Case, Path]
) -> None:
    """A lost norm, and a tensor that came from nowhere."""
    _edit_tensors(artifact, _drop(NORM))
    _edit_tensors(artifact, lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    found = verify_artifact(artifact, str(made[0].checkpoint.source.folder))
    assert f"1 tensors of the base are missing, for instance {NORM}" in found.problems
    assert "1 tensors are not in the base, for instance model.extra" in found.problems


def _rescale(case: Case, name: str, rows: Tensor, columns: Tensor) -> QuantizedLayer:
    """Quantize a layer's weight after its rows and columns were scaled."""
    layer = case.layers[name]
    weight = read_tensor(case.checkpoint, f"{name}.weight").float() * rows[:, None] * columns
    scale, zero_point = choose_absmax(weight, layer.scheme, layer.group_size, torch.bfloat16)
    codes = quantize(weight, scale, zero_point, layer.scheme)
    return replace(layer, codes=codes, scale=scale, zero_point=zero_point)


def test_folded_scales_are_explained_and_not_taken_for_errors(tmp_path: Path) -> None:
    """Into a norm: by its ratio. Between v_proj and o_proj: by a fit of rows and columns."""
    model = make_pico_model(tmp_path / "model", hidden=128, intermediate=256, kv_heads=4)
    case = make_case(model, [("*", "w4a16", 32)])
    generator = torch.Generator().manual_seed(0)
    into_norm, between = torch.exp(torch.randn(2, 128, generator=generator))
    prefix, ones = "model.layers.0", torch.ones(128)
    norm = read_tensor(case.checkpoint, f"{prefix}.input_layernorm.weight").float() / into_norm
    changed = {
        f"{prefix}.self_attn.q_proj": (ones, into_norm),
        f"{prefix}.self_attn.k_proj": (ones, into_norm),
        f"{prefix}.self_attn.v_proj": (1 / between, into_norm),
        f"{prefix}.self_attn.o_proj": (ones, between),
    }
    layers = tuple(
        _rescale(case, layer.name, *changed[layer.name]) if layer.name in changed else layer
        for layer in case.blocks[0].layers
    )
    dense = {f"{prefix}.input_layernorm.weight": norm.to(torch.bfloat16)}
    blocks = {**case.blocks, 0: replace(case.blocks[0], layers=layers, dense=dense)}
    Case(case.checkpoint, case.plan, blocks).write(tmp_path / "artifact")
    found = verify_artifact(tmp_path / "artifact", str(model))
    assert found.problems == ()
    assert found.comparison is not None
    assert found.comparison.changed == (f"{prefix}.input_layernorm.weight",)
    assert found.comparison.largest_error < 0.2
    folded = {layer.name: layer.folded for layer in found.comparison.layers if layer.folded}
    assert folded == {
        f"{prefix}.self_attn.q_proj": f"{prefix}.input_layernorm",
        f"{prefix}.self_attn.k_proj": f"{prefix}.input_layernorm",
        f"{prefix}.self_attn.v_proj": "rows and columns",
        f"{prefix}.self_attn.o_proj": "rows and columns",
    }


def test_shapes_that_a_runtime_cannot_serve_are_told(tmp_path: Path) -> None:
    """The artifact is sound; who can serve it is another matter."""
    odd = {"hidden": 80, "intermediate": 100, "kv_heads": 1}
    model = make_pico_model(tmp_path / "odd", **odd)
    make_case(model, [("*", "w4a16", None)]).write(tmp_path / "odd4")
    found = verify_artifact(tmp_path / "odd4")
    assert found.problems == ()
    assert _answers(found) == {"transformers": "yes", "vllm-cuda": "yes", "vllm-cpu": "no"}
    make_case(model, [("*", "fp8_block", None)]).write(tmp_path / "blocks")
    found = verify_artifact(tmp_path / "blocks")
    assert found.problems == ()
    assert _answers(found) == {"transformers": "no", "vllm-cuda": "no", "vllm-cpu": "no"}
    make_case(model, [("*q_proj", "w4a8_fp8", None)]).write(tmp_path / "w4a8")
    assert _answers(verify_artifact(tmp_path / "w4a8"))["vllm-cuda"] == "no"


def test_four_bit_codes_in_whole_bytes_are_served_by_others(tmp_path: Path) -> None:
    """As llm-compressor stores W4A8: the same scheme, but another kernel reads it."""
    model = make_pico_model(tmp_path / "model", hidden=128)
    case = make_case(model, [("*", "w4a8", 32)])
    case.write(tmp_path / "artifact")

    def unpack(tensors: Tensors) -> None:
        for name, layer in case.layers.items():
            del tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"]
            tensors[f"{name}.weight"] = layer.codes

    _edit_tensors(tmp_path / "artifact", unpack)
    _edit_config(
        tmp_path / "artifact",
        lambda config: _groups(config)["group_0"].update(format="int-quantized"),
    )
    found = verify_artifact(tmp_path / "artifact", str(model))
    assert (found.problems, found.scheme) == ((), "w4a8 g32")
    assert _answers(found) == {"transformers": "yes", "vllm-cuda": "no", "vllm-cpu": "yes"}
    layer = case.layers[GATE]
    read = read_layer(tmp_path / "artifact", GATE)
    assert (read.scheme, read.group_size) == (layer.scheme, layer.group_size)
    assert torch.equal(read.codes, layer.codes)
