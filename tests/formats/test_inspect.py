"""`inspect_artifact` on our artifacts, on checkpoints, and on what is damaged or foreign."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.errors import ArtifactError
from quantkit.formats.decode import read_layer
from quantkit.formats.inspect import inspect_artifact
from tests.formats.cases import ALL_IN_ONE, Case, make_case
from tests.helpers import make_pico_model

CHOICES = [
    ("*.layers.1.self_attn.*", "none", None),
    ("*.down_proj", "w8a16", None),
    ("*.layers.0.mlp.*", "w4a16_asym", 32),
    ("*", "w4a16", 64),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """A mixed artifact, and what it was made from."""
    root = tmp_path_factory.mktemp("inspect")
    case = make_case(make_pico_model(root / "model", family="qwen2", tied=False), CHOICES)
    case.write(root / "artifact", max_shard_bytes=40_000)
    return case, root / "artifact"


@pytest.fixture
def artifact(written: tuple[Case, Path], tmp_path: Path) -> Path:
    """A copy of the artifact, in one file, to be damaged."""
    case, _ = written
    case.write(tmp_path / "artifact", ALL_IN_ONE)
    return tmp_path / "artifact"


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def _edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {
        name: value for name, value in changes.items() if value is not None
    }
    kept = {
        name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None
    }
    save_file(kept, path, metadata={"format": "pt"})


def test_every_layer_is_reported_as_it_was_planned(written: tuple[Case, Path]) -> None:
    """Scheme, group size, bits and shape of each matrix are those of the records."""
    case, folder = written
    found = inspect_artifact(folder)
    rows = {row.name: row for row in found.layers}
    for name, layer in case.layers.items():
        row = rows.pop(name)
        assert (row.scheme, row.group_size) == (layer.scheme.name, layer.group_size)
        assert (row.bits, row.shape) == (layer.scheme.weight_bits, tuple(layer.codes.shape))
    assert {row.scheme for row in rows.values()} == {"none"}
    assert {row.bits for row in rows.values()} == {16}
    assert {"lm_head", "model.embed_tokens"} < rows.keys()
    assert found.problems == ()


def test_the_sums_are_those_of_the_model_and_the_files(written: tuple[Case, Path]) -> None:
    """Parameters equal the model's, bytes and dtype counts equal what safetensors finds."""
    case, folder = written
    found = inspect_artifact(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    assert found.parameters == case.plan.parameters
    assert found.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.bits_per_weight == 8 * found.tensor_bytes / found.parameters
    assert sum(found.tensors.values()) == len(tensors)
    assert found.tensors["I64"] == len(case.layers)
    sizes = {row.name: row.size for row in found.layers}
    name = "model.layers.0.mlp.gate_proj"
    assert sizes[name] == sum(
        tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"{name}.weight")
    )


def test_format_scheme_and_architecture_are_named(written: tuple[Case, Path]) -> None:
    """The headline facts are there in words."""
    _, folder = written
    found = inspect_artifact(folder)
    assert found.format == "compressed-tensors"
    assert found.scheme == "w4a16 g64, w4a16_asym g32, w8a16 channel"
    assert found.architecture == "Qwen2ForCausalLM"
    assert found.quantization_config is not None
    assert found.verdict is None


def test_an_output_folder_leads_to_its_artifact_and_verdict(artifact: Path) -> None:
    """With quantkit.json around it, the artifact is found from both folders, with its verdict."""
    output = artifact.parent / "output"
    output.mkdir()
    artifact.rename(output / "compressed-tensors")
    (output / "quantkit.json").write_text('{"verdict": "FAIL"}')
    for path in (output, output / "compressed-tensors"):
        found = inspect_artifact(path)
        assert found.folder == output / "compressed-tensors"
        assert found.verdict == "FAIL"
    (output / "quantkit.json").write_text('{"verdict": "MAYBE"}')
    assert inspect_artifact(output).verdict is None
    (output / "quantkit.json").write_text("{")
    assert "not valid JSON" in inspect_artifact(output).problems[0]


def test_a_plain_checkpoint_is_16_bits(tmp_path: Path) -> None:
    """A checkpoint that is not quantized has the scheme `none` and 16 bits per weight."""
    found = inspect_artifact(make_pico_model(tmp_path / "model", shards=2))
    assert (found.format, found.scheme) == ("safetensors", "none")
    assert found.bits_per_weight == 16
    assert found.quantization_config is None
    assert found.problems == ()


def test_int8_and_fp8_weights_of_other_tools_are_recognised(artifact: Path) -> None:
    """Weights of one byte an element beside a scale are named after their dtype."""
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    codes = torch.ones(64, 64)
    _edit_tensors(
        artifact,
        {
            f"{names[0]}.weight": codes.to(torch.int8),
            f"{names[0]}.weight_scale": torch.ones(64, 1),
            f"{names[1]}.weight": codes.to(torch.float8_e4m3fn),
            f"{names[1]}.weight_scale": torch.ones(1),
        },
    )
    rows = {row.name: row for row in inspect_artifact(artifact).layers}
    assert [rows[name].scheme for name in names] == ["int8", "fp8"]
    assert [rows[name].bits for name in names] == [8, 8]


LAYER = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({f"{LAYER}.weight_scale": None}, "has no weight_scale"),
        ({f"{LAYER}.weight_zero_point": None}, "no group of config.json fits"),
        ({f"{LAYER}.weight_scale": torch.ones(128, 3)}, "no group of config.json fits"),
        ({f"{LAYER}.weight_shape": torch.tensor([128, 65])}, "no group of config.json fits"),
        ({f"{LAYER}.weight_shape": torch.tensor([-128, 64])}, "which is no shape"),
        ({f"{LAYER}.weight_shape": torch.tensor([1 << 60, 1 << 60])}, "no group of config.json"),
        ({f"{LAYER}.weight_shape": torch.ones(2)}, "expected two numbers"),
        ({f"{LAYER}.weight": torch.ones(128, 64)}, "stored twice"),
    ],
)
def test_a_layer_that_cannot_be_decoded_is_a_problem(
    artifact: Path, changes: dict[str, torch.Tensor | None], problem: str
) -> None:
    """Missing and misshapen parts are reported with the layer's name."""
    _edit_tensors(artifact, changes)
    found = inspect_artifact(artifact)
    assert [line for line in found.problems if problem in line and LAYER in line]


def test_reading_a_damaged_or_absent_layer_is_an_artifact_error(artifact: Path) -> None:
    """`read_layer` names the layer that it cannot read."""
    _edit_tensors(artifact, {f"{LAYER}.weight_scale": None})
    for name in (LAYER, "model.layers.9.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            read_layer(artifact, name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ignore": ["lm_head", LAYER]}, f"{LAYER} is quantized, but config.json ignores it"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "4 of its scales are missing"),
        ({"config_groups": {}}, "no layer is quantized"),
    ],
)
def test_a_config_at_odds_with_the_tensors_is_a_problem(
    artifact: Path, changes: dict[str, Any], problem: str
) -> None:
    """What a reader would silently get wrong is reported."""
    _edit_config(artifact, **changes)
    assert [line for line in inspect_artifact(artifact).problems if problem in line]


def test_a_target_that_is_not_quantized_is_a_problem(artifact: Path) -> None:
    """A layer that the config names and the file has in 16 bits is reported."""
    groups = json.loads((artifact / "config.json").read_text())["quantization_config"]
    name = "model.layers.1.self_attn.q_proj"
    groups["config_groups"]["group_0"]["targets"].append(name)
    _edit_config(artifact, **groups)
    assert f"layer {name} is not quantized, but config.json says that it is" in (
        inspect_artifact(artifact).problems
    )


@pytest.mark.parametrize(
    ("method", "name"),
    [("modelopt", "ModelOpt"), ("bitsandbytes", "bitsandbytes")],
)
def test_other_quantization_methods_are_named_and_not_read_yet(
    artifact: Path, method: str, name: str
) -> None:
    """The method that config.json names is in the message."""
    _edit_config(artifact, quant_method=method)
    with pytest.raises(ArtifactError, match=f"{name}.*cannot be read yet"):
        inspect_artifact(artifact)


def test_config_files_of_other_tools_are_named_and_not_read_yet(tmp_path: Path) -> None:
    """ModelOpt describes the quantization in a file of its own."""
    model = make_pico_model(tmp_path / "model", layers=1)
    (model / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"ModelOpt.*cannot be read yet"):
        inspect_artifact(model)


def test_other_layouts_of_compressed_tensors_are_not_read_yet(artifact: Path) -> None:
    """Packed 4-bit floats, for instance, are refused by the name of their layout."""
    _edit_config(artifact, format="nvfp4-pack-quantized")
    with pytest.raises(ArtifactError, match="nvfp4-pack-quantized"):
        inspect_artifact(artifact)


def test_what_is_not_there_or_no_artifact_is_an_artifact_error(
    artifact: Path, tmp_path: Path
) -> None:
    """Missing paths, plain files, empty folders and cut files give one clear line each."""
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        inspect_artifact(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is a file"):
        inspect_artifact(artifact / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        inspect_artifact(tmp_path / "empty")
    with (artifact / "model.safetensors").open("r+b") as handle:
        handle.truncate(5000)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        inspect_artifact(artifact)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)
WEIGHTS = JSON | st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("num_bits", "group_size", "type", "strategy", "symmetric"), JSON)
    | {"num_bits": st.sampled_from([4, 8]) | JSON},
)
GROUP = JSON | st.fixed_dictionaries({"weights": WEIGHTS}, optional={"targets": JSON})
DESCRIPTION = st.fixed_dictionaries(
    {},
    optional={"config_groups": JSON | st.dictionaries(st.text(max_size=1), GROUP, max_size=3)}
    | dict.fromkeys(("ignore", "kv_cache_scheme"), JSON),
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(description=DESCRIPTION | st.fixed_dictionaries({"format": JSON, "quant_method": JSON}))
def test_any_description_is_read_or_refused(artifact: Path, description: dict[str, Any]) -> None:
    """Whatever JSON stands in the config, the answer is an inspection or an ArtifactError."""
    copy = artifact.with_name("copy")
    if not copy.exists():
        shutil.copytree(artifact, copy)
    config = json.loads((artifact / "config.json").read_text())
    usual = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config["quantization_config"] = usual | description
    (copy / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(ArtifactError):
        assert inspect_artifact(copy).tensor_bytes > 0
