"""What transformers computes where a scheme rounds inputs, against a slow emulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.numerics.affine import dequantize_layer
from quantkit.schemes import SCHEMES
from tests.formats.cases import INPUT_SCALE, Case, make_case
from tests.helpers import make_pico_model

ROUNDED = [name for name, scheme in SCHEMES.items() if scheme.activations is not None]
LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Any]]:
    """Each scheme's artifact in transformers, in float32."""
    root = tmp_path_factory.mktemp("rounded")
    model = make_pico_model(root / "model", hidden=256, intermediate=384, tokenizer=False)
    found = {}
    for name in ROUNDED:
        case = make_case(model, [("*", name, 128 if SCHEMES[name].grouped else None)])
        case.write(root / name)
        found[name] = (
            case,
            AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32),
        )
    return found


def _record(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """Run the model and return what one layer reads [T, I] and gives [T, O]."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0][0], output[0]))
    )
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return seen[0]


def _round_slowly(inputs: Tensor, name: str) -> Tensor:
    """Each scale and each code by the words of its definition."""
    activations = SCHEMES[name].activations
    assert activations is not None
    largest = 127.5 if activations.kind == "int" else 448.0
    width = 128 if SCHEMES[name].granularity == "block" else inputs.shape[1]
    rounded = torch.empty_like(inputs)
    for token, row in enumerate(inputs):
        for start in range(0, inputs.shape[1], width):
            part = row[start : start + width]
            scale = part.abs().max() / largest
            if not activations.dynamic:
                scale = torch.tensor(INPUT_SCALE)
            if activations.kind == "int":
                codes = torch.clamp(torch.round(part / scale), -128, 127)
            else:
                codes = torch.clamp(part / scale, -448, 448).to(torch.float8_e4m3fn).float()
            rounded[token, start : start + width] = codes * scale
    return rounded


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ROUNDED)
def test_a_layer_computes_with_rounded_inputs_and_the_recorded_weights(
    loaded: dict[str, tuple[Case, Any]], name: str, layer: str
) -> None:
    """Its output is that of the emulation, and clearly not that of inputs in 16 bits."""
    case, model = loaded[name]
    inputs, output = _record(model, layer)
    weight = dequantize_layer(case.layers[layer])
    expected = _round_slowly(inputs, name) @ weight.T
    plain = inputs @ weight.T
    # Codes at a tie may fall either way: a step of one input is far below the rounding's effect.
    effect = float((expected - plain).norm() / plain.norm())
    missed = float((output - expected).norm() / plain.norm())
    assert effect > 1e-3
    assert missed < 0.05 * effect


@pytest.mark.parametrize("name", ROUNDED)
def test_nothing_is_missing_or_left_over(
    loaded: dict[str, tuple[Case, Any]], name: str, tmp_path: Path
) -> None:
    """transformers finds every key that it looks for, and looks for every key."""
    case, _ = loaded[name]
    case.write(tmp_path / "artifact")
    _, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "artifact", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
