"""Scales folded for GGUF files: the function of the model stays, and the error falls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.calibration.data import load_tokenizer
from quantkit.ggml_types import GGML_TYPES
from quantkit.numerics.ggml.codec import decode, divide_rows, encode_rows
from quantkit.recipe import Recipe
from quantkit.records import Result
from tests.helpers import make_pico_model, pico_text, write_shards


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a few channels that are much larger than the others, in norms and layers."""
    folder = make_pico_model(tmp_path_factory.mktemp("smoothing") / "model")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", ("q_proj", "k_proj", "v_proj")),
            ("post_attention_layernorm", ("gate_proj", "up_proj")),
        ):
            tensors[f"{prefix}.{norm}.weight"][3] *= 64
            group = "mlp" if norm.startswith("post") else "self_attn"
            for reader in readers:
                tensors[f"{prefix}.{group}.{reader}.weight"][:, 3] /= 64
        tensors[f"{prefix}.mlp.up_proj.weight"][5] *= 64
        tensors[f"{prefix}.mlp.down_proj.weight"][:, 5] /= 64
        # Heads 0 and 1 read the first head of values, of 16 channels.
        tensors[f"{prefix}.self_attn.v_proj.weight"][7] *= 64
        tensors[f"{prefix}.self_attn.o_proj.weight"][:, [7, 23]] /= 64
    write_shards(folder, tensors)
    return folder


def run(model: Path, output: Path, *types: str, effort: str = "normal") -> Result:
    """A job without a gate; the first type leads."""
    (output.parent / "text.txt").write_text(pico_text(900, seed=1))
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": str(model),
            "output": str(output),
            "calibration": {
                "data": str(output.parent / "text.txt"),
                "samples": 16,
                "sequence_length": 32,
            },
            "quantize": {"effort": effort},
            "export": [{"format": "gguf", "type": name} for name in types],
        }
    )
    return quantkit.quantize(recipe, gate=False, device="cpu")


def weights_of(file: Path, model: Path, folder: Path) -> dict[str, Tensor]:
    """What the tensors of a file stand for, by their names in the checkpoint."""
    quantkit.convert(file, to="safetensors", base=model, output=folder, dtype="float32")
    return load_file(folder / "model.safetensors")


def logits_of(folder: Path) -> Tensor:
    """Of text like that of the calibration, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = load_tokenizer(folder)(pico_text(300, seed=9), return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=text["input_ids"][:, :256]).logits


def test_what_the_columns_gain_the_operation_in_front_loses(model: Path, tmp_path: Path) -> None:
    """The model that a file stands for is the checkpoint's, up to its rounding."""
    result = run(model, tmp_path / "out", "Q8_0")
    weights_of(tmp_path / "out/gguf/model-Q8_0.gguf", model, tmp_path / "plain")

    folded = [each.name for each in result.report.layers if each.smoothing_exponent is not None]
    # Behind norms, up_proj and v_proj.
    assert {name.rpartition(".")[2] for name in folded} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "o_proj",
    }
    found, original = logits_of(tmp_path / "plain"), logits_of(model)
    # One division that was lost would change them beyond recognition.
    assert (found - original).norm() < 0.05 * original.norm()


def test_the_files_of_a_job_are_smoothed_alike(model: Path, tmp_path: Path) -> None:
    """Norms are the same in all of them."""
    run(model, tmp_path / "out", "Q8_0", "Q5_1")
    one, two = (
        weights_of(tmp_path / f"out/gguf/{name}/model-{name}.gguf", model, tmp_path / name)
        for name in ("Q8_0", "Q5_1")
    )
    norms = [name for name in one if "layernorm" in name]
    original = load_file(model / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in norms)
    assert not all(torch.equal(one[name], original[name].float()) for name in norms)


def test_a_layer_that_a_file_holds_as_it_is_keeps_its_group_unscaled(
    model: Path, tmp_path: Path
) -> None:
    """Float types have no columns that could be multiplied."""
    run(model, tmp_path / "out", "Q8_0", "F16")
    found = weights_of(tmp_path / "out/gguf/F16/model-F16.gguf", model, tmp_path / "plain")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(found[name], tensor.half().float()), name


def test_the_fast_effort_leaves_everything_in_front(model: Path, tmp_path: Path) -> None:
    """It makes llama.cpp's own files."""
    result = run(model, tmp_path / "out", "Q8_0", effort="fast")
    assert all(layer.smoothing_exponent is None for layer in result.report.layers)


@pytest.mark.parametrize("kind", [kind for kind in GGML_TYPES.values() if kind.quantized])
def test_rows_are_divided_by_their_scales_alone(kind) -> None:
    """To float16's precision; a scale that float16 cannot hold is refused."""
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    packed = encode_rows(kind, weight, None)
    divisor = torch.linspace(0.25, 4, 8)

    divided = divide_rows(kind, packed, divisor)

    assert divided is not None
    wanted = decode(kind, packed) / divisor.unsqueeze(1)
    assert (decode(kind, divided) - wanted).norm() < 2e-3 * wanted.norm()
    assert divide_rows(kind, packed, torch.full((8,), 1e8)) is None
