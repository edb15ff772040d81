"""`inspect_artifact` on the checkpoints of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.errors import ArtifactError
from quantkit.formats.inspect import inspect_artifact
from tests.formats.cases import stored_tensors
from tests.formats.readers.packers import Foreign, make_awq, make_fp8, make_gptq
from tests.helpers import make_pico_model

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, its head not tied."""
    return make_pico_model(
        tmp_path_factory.mktemp("inspection") / "model", layers=1, tied=False, tokenizer=False
    )


@pytest.mark.parametrize(
    ("make", "options", "scheme", "sharing", "bits"),
    [
        (make_gptq, {}, "w4a16_asym g32", "group", 4),
        (make_gptq, {"sym": True, "group_size": -1}, "w4a16 channel", "channel", 4),
        (make_gptq, {"bits": 8, "sym": True}, "w8a16 g32", "group", 8),
        (make_gptq, {"bits": 2}, "w2a16_asym g32", "group", 2),
        (make_awq, {}, "w4a16_asym g32", "group", 4),
        (make_fp8, {}, "fp8_block", "block", 8),
    ],
)
def test_layers_schemes_and_sizes_are_shown(
    model: Path,
    tmp_path: Path,
    make: Callable[..., Foreign],
    options: dict[str, Any],
    scheme: str,
    sharing: str,
    bits: int,
) -> None:
    """Weights are those of the 16-bit model, bytes those of the files."""
    made = make(model, tmp_path / "made", **options)
    found, original = inspect_artifact(made.folder), inspect_artifact(model)
    assert (found.format, found.scheme, found.problems) == (make.__name__[5:], scheme, ())
    assert found.parameters == original.parameters
    stored = stored_tensors(made.folder)
    assert found.tensor_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert found.bits_per_weight == 8 * found.tensor_bytes / found.parameters
    rows = {row.name: row for row in found.layers}
    assert rows.keys() == {row.name for row in original.layers}
    for name, weight in made.weights.items():
        row = rows.pop(name)
        assert (row.shape, row.bits, row.sharing) == (tuple(weight.shape), bits, sharing)
        parts = [tensor for key, tensor in stored.items() if key.startswith(f"{name}.")]
        assert row.size == sum(tensor.nbytes for tensor in parts)
    assert {(row.name, row.scheme) for row in rows.values()} == {
        ("lm_head", "none"),
        ("model.embed_tokens", "none"),
    }


def test_problems_are_listed_and_the_rest_is_shown(model: Path, tmp_path: Path) -> None:
    """One layer without zero points."""
    made = make_gptq(model, tmp_path / "made")
    made.edit_tensors({f"{DOWN}.qzeros": None})
    found = inspect_artifact(made.folder)
    assert found.problems == (f"layer {DOWN} has no qzeros",)
    assert sum(row.scheme == "w4a16_asym" for row in found.layers) == 6


def test_a_description_beside_the_config_is_read(model: Path, tmp_path: Path) -> None:
    """quantize_config.json of the first GPTQ models."""
    made = make_gptq(model, tmp_path / "made")
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    described = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    del described["quant_method"]
    (made.folder / "quantize_config.json").write_text(json.dumps(described))
    found = inspect_artifact(made.folder)
    assert (found.format, found.scheme, found.problems) == ("gptq", "w4a16_asym g32", ())
    assert found.quantization_config is None


def test_what_cannot_be_read_is_an_error(model: Path, tmp_path: Path) -> None:
    """With the file and the number of bits."""
    made = make_gptq(model, tmp_path / "made")
    made.edit_config(bits=3)
    with pytest.raises(ArtifactError, match=r"made/config\.json: codes of 3 bits cannot be read"):
        inspect_artifact(made.folder)


def test_a_file_that_is_cut_short_is_an_error(model: Path, tmp_path: Path) -> None:
    """As for any checkpoint."""
    made = make_awq(model, tmp_path / "made")
    path = made.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ArtifactError, match="is cut short"):
        inspect_artifact(made.folder)


def test_one_scale_a_tensor_is_named(model: Path, tmp_path: Path) -> None:
    """FP8 with static activations."""
    made = make_fp8(model, tmp_path / "made")
    made.edit_tensors({f"{name}.weight_scale_inv": None for name in made.weights})
    made.edit_tensors({f"{name}.weight_scale": torch.ones(()) for name in made.weights})
    made.edit_config(weight_block_size=None, activation_scheme="static")
    found = inspect_artifact(made.folder)
    assert (found.scheme, found.problems) == ("fp8_static", ())
    assert {row.sharing for row in found.layers} == {"tensor", "none"}
