"""The gate looks at every weight, since numbers over ordinary text do not tell of all damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.judging.weights import WeightFindings, compare_weights
from quantkit.running import silent
from tests.formats.cases import UNLIKE, Case, make_case
from tests.helpers import make_pico_model

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    root = tmp_path_factory.mktemp("weights")
    model = make_pico_model(root / "model", hidden=128, intermediate=256, kv_heads=4)
    case = make_case(model, UNLIKE)
    case.write(root / "artifact")
    return case, root / "artifact"


@pytest.fixture
def artifact(made: tuple[Case, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(made[1], tmp_path / "artifact"))


@pytest.fixture(scope="module")
def baseline(made: tuple[Case, Path]) -> Checkpoint:
    return open_checkpoint(resolve_source(str(made[0].checkpoint.source.folder)))


def edit_config(folder: Path, quantization: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def test_a_sound_artifact_and_the_original_itself_raise_no_suspicion(
    baseline: Checkpoint, artifact: Path
) -> None:
    assert compare_weights(baseline, artifact, silent) == WeightFindings()
    assert compare_weights(baseline, baseline.source.folder, silent) == WeightFindings()


def test_scales_of_another_row_are_suspicious(baseline: Checkpoint, artifact: Path) -> None:
    """The damage that costs one layer in forty hardly anything."""
    tensors = load_file(artifact / "model.safetensors")
    name = f"{Q}.weight_scale"
    tensors[name] = tensors[name].roll(1, dims=0).contiguous()
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})

    found = compare_weights(baseline, artifact, silent)

    assert found.notes == ()
    assert found.suspicions
    assert Q in found.suspicions[0]


def test_an_artifact_that_cannot_be_read_is_suspicious(
    baseline: Checkpoint, artifact: Path
) -> None:
    tensors = load_file(artifact / "model.safetensors")
    del tensors[f"{Q}.weight_scale"]
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})

    assert any(Q in line for line in compare_weights(baseline, artifact, silent).suspicions)


def test_what_cannot_be_compared_is_said(baseline: Checkpoint, artifact: Path) -> None:
    """Codes of other tools have no comparison, and a quantized baseline is no original."""
    edit_config(artifact, {"quant_method": "gptq", "bits": 4, "group_size": 128})

    found = compare_weights(baseline, artifact, silent)
    assert found.suspicions == ()
    assert "were not compared with the original's: quantkit does not verify" in found.notes[0]

    described = {**baseline.config, "quantization_config": {"quant_method": "fp8"}}
    quantized = Checkpoint(**{**vars(baseline), "config": described})
    found = compare_weights(quantized, artifact, silent)
    assert found.suspicions == ()
    assert "the baseline is quantized itself" in found.notes[0]


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
    ],
)
def test_weights_that_are_no_roundings_are_left_with_a_note(
    baseline: Checkpoint, artifact: Path, part: str, content: dict[str, object]
) -> None:
    """Rotated or pruned ones are far from the original's, and sound."""
    described = json.loads((artifact / "config.json").read_text())["quantization_config"]
    tensors = load_file(artifact / "model.safetensors")
    name = f"{Q}.weight_scale"
    tensors[name] = tensors[name].roll(1, dims=0).contiguous()
    save_file(tensors, artifact / "model.safetensors", metadata={"format": "pt"})

    edit_config(artifact, described | {part: content})
    found = compare_weights(baseline, artifact, silent)
    assert found.suspicions == ()
    assert f"quantization_config has a {part}" in found.notes[0]

    edit_config(
        artifact, described | {"transform_config": {}, "sparsity_config": {"format": "dense"}}
    )
    assert compare_weights(baseline, artifact, silent).suspicions


def test_many_problems_are_counted(baseline: Checkpoint, artifact: Path) -> None:
    """A file with every layer wrong does not fill the report."""
    tensors = load_file(artifact / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "scale" not in name},
        artifact / "model.safetensors",
        metadata={"format": "pt"},
    )

    found = compare_weights(baseline, artifact, silent).suspicions

    assert len(found) == 9
    assert "`quantkit verify` lists them" in found[-1]
