"""Fisher matrices block by block, against autograd through the whole model at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit import fisher
from quantkit.blocks import Draft, finish_block, solve_input_group
from quantkit.calibration.walk import GroupStop
from quantkit.errors import CheckpointError
from quantkit.fisher import measure_fisher
from quantkit.numerics.affine import dequantize_layer
from quantkit.numerics.divergence import compare_logits
from quantkit.records import Event, TokenWindows
from tests.calibration.test_walk import make_recipe, make_windows, open_model, start_walk
from tests.helpers import make_pico_model

CPU = torch.device("cpu")


def silent(_: Event) -> None:
    """Nobody watches."""


def measure(folder: Path, windows: TokenWindows, **quantize: object) -> dict[str, Tensor]:
    """All matrices of a model, by layer."""
    checkpoint, plan = open_model(folder, make_recipe(**quantize))
    matrices: dict[str, Tensor] = {}
    indexes = []
    for block in measure_fisher(checkpoint, plan, windows, device=CPU, tell=silent):
        matrices |= block.matrices
        indexes.append(block.index)
    assert indexes == sorted(indexes, reverse=True)
    return matrices


def load_float(folder: Path) -> torch.nn.Module:
    """The whole model by transformers alone, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def differentiate_whole(folder: Path, windows: TokenWindows) -> dict[str, Tensor]:
    """Mean of g g^T at the output of every linear layer, by one backward of the whole model."""
    model = load_float(folder)
    outputs: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(watch(name))
    logits = model(input_ids=torch.from_numpy(windows.ids), use_cache=False).logits
    flat = logits.reshape(-1, logits.shape[-1])
    draws = torch.rand(len(flat), 1, generator=torch.Generator().manual_seed(0))
    sums = flat.detach().double().softmax(dim=-1).cumsum(dim=-1)
    labels = (sums < draws).sum(dim=-1)
    losses = torch.nn.functional.cross_entropy(flat, labels, reduction="none")
    (losses * torch.from_numpy(windows.weights).flatten().sqrt()).sum().backward()
    gradients = {name: output.grad.flatten(0, 1) for name, output in outputs.items()}
    return {name: slope.T @ slope / len(slope) for name, slope in gradients.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_matrices_equal_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    """Half of the tokens do not count: no label is drawn there."""
    folder = make_pico_model(tmp_path / "model", family=family)
    windows = make_windows()
    weights = windows.weights.copy()
    weights[:, 8:] = 0.0
    windows = replace(windows, weights=weights)

    found = measure(folder, windows)

    expected = differentiate_whole(folder, windows)
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        assert torch.allclose(matrix, expected[name], rtol=1e-3, atol=1e-4 * matrix.max()), name


def test_large_layers_are_known_in_diagonal_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows further apart than a block are left out; the last block may be smaller."""
    folder = make_pico_model(tmp_path / "model")
    whole = measure(folder, make_windows())
    monkeypatch.setattr(fisher, "FISHER_ENTRIES", 2048)

    parts = measure(folder, make_windows())

    sizes = {matrix.shape for matrix in parts.values()}
    assert sizes == {(64, 32), (32, 32), (128, 16)}
    for name, matrix in parts.items():
        size = matrix.shape[1]
        for row in range(len(matrix)):
            start = row // size * size
            width = min(size, len(matrix) - start)
            assert torch.equal(matrix[row, :width], whole[name][row, start : start + width])
            assert not matrix[row, width:].any()


def test_the_same_windows_give_the_same_matrices(tmp_path: Path) -> None:
    """Bit by bit, though labels are drawn; only quantized layers have one."""
    folder = make_pico_model(tmp_path / "model")
    overrides = [{"match": "model.layers.0.*", "scheme": "none"}]
    first, second = (measure(folder, make_windows(), overrides=overrides) for _ in range(2))

    assert first.keys() == second.keys()
    assert all(name.startswith("model.layers.1.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_that_overflow_are_an_error(tmp_path: Path) -> None:
    """The layer is named."""
    folder = make_pico_model(tmp_path / "model")
    windows = make_windows()
    weights = np.full_like(windows.weights, np.float32(3e38))

    with pytest.raises(CheckpointError, match=r"layers\.1\..* is not finite"):
        measure(folder, replace(windows, weights=weights))


def test_coupled_rounding_comes_nearer_to_the_model(tmp_path: Path) -> None:
    """The divergence that gptq leaves falls, even where the weights are noise."""
    folder = make_pico_model(tmp_path / "model")
    windows = make_windows(24, 32)
    matrices = measure(folder, windows)
    checkpoint, plan = open_model(folder, make_recipe())
    divergences = []
    for fishers in ({}, matrices):
        model, draft = load_float(folder), Draft()
        for stop in start_walk(checkpoint, plan, windows):
            assert isinstance(stop, GroupStop)
            live = solve_input_group(
                stop.group, stop.stats, stop.tensors, draft, torch.bfloat16, fishers
            )
            for name, weight in live.items():
                stop.replace(name, weight)
        for layer in finish_block(plan.blocks[0], draft).layers:
            model.get_submodule(layer.name).weight.data = dequantize_layer(layer)
        ids = torch.from_numpy(windows.ids)
        with torch.no_grad():
            original, quantized = (
                each(input_ids=ids).logits.flatten(0, 1) for each in (load_float(folder), model)
            )
        metrics = compare_logits(original, quantized, ids.flatten())
        divergences.append(float(metrics.kl.mean()))
    assert divergences[1] < 0.98 * divergences[0]
