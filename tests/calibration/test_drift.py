"""The original model followed beside the quantized one: what inputs would be in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit.calibration.stats import SAMPLED_TOKENS, accumulate, empty_moment, finish
from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.reader import read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.records import TokenWindows
from tests.calibration.test_walk import load_float, make_recipe, make_windows, open_model
from tests.helpers import make_pico_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_is_the_mean_product_of_change_and_input(dtype: torch.dtype) -> None:
    """Against float64, with tokens that do not count and two batches."""
    generator = torch.Generator().manual_seed(0)
    inputs, originals = torch.randn(2, 40, 300, generator=generator).to(dtype)
    weights = (torch.rand(40, generator=generator) > 0.3).float()
    moment = empty_moment(300, CPU)

    for part in (slice(0, 16), slice(16, 40)):
        accumulate(moment, inputs[part], weights[part], originals[part])
    found = finish(moment)

    counted = weights > 0
    rows, change = inputs[counted].double(), (originals - inputs)[counted].double()
    expected = change.T @ rows / len(rows)
    assert found.drift is not None
    assert (found.drift.double() - expected).norm() < 1e-4 * expected.norm()


def test_the_drift_of_sampled_tokens_is_that_of_the_sample() -> None:
    """With more tokens than a sample holds, in batches, some of which do not count."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.arange(3 * SAMPLED_TOKENS).float().unsqueeze(1).expand(-1, 8)
    weights = (torch.rand(len(inputs), generator=generator) > 0.3).float()
    moment = empty_moment(8, CPU)

    for part in torch.arange(len(inputs)).split(700):
        accumulate(moment, inputs[part], weights[part], 3 * inputs[part])
    found = finish(moment)

    assert found.sample is not None
    assert found.drift_sample is not None
    assert len(found.sample) > SAMPLED_TOKENS // 3
    assert torch.equal(found.drift_sample, 2 * found.sample)


def inputs_of(model: torch.nn.Module, windows: TokenWindows) -> dict[str, Tensor]:
    """What every linear layer is given in a plain forward, as rows."""
    found: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows.ids), use_cache=False)
    return found


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
def test_the_walk_follows_the_original_through_replaced_weights(
    tmp_path: Path, kv_cache: str
) -> None:
    """Every group's drift is that of two whole models; a group that stays as it is does not stop.

    Both forwards see their own weights, though one model holds them.
    """
    folder = make_pico_model(tmp_path / "model", family="qwen3")
    overrides = [{"match": "*.1.self_attn.o_proj", "scheme": "none"}]
    checkpoint, plan = open_model(folder, make_recipe(overrides=overrides, kv_cache=kv_cache))
    windows = make_windows(300, 16)
    quantized, found = load_float(folder), {}
    outside = ["model.embed_tokens.weight", "model.norm.weight"]
    stops = walk(
        build_skeleton(checkpoint),
        plan.blocks,
        lambda block: {
            name: read_tensor(checkpoint, name)
            for name in checkpoint.tensors
            if name.startswith(block.prefix + ".")
        },
        lambda: {name: read_tensor(checkpoint, name) for name in outside},
        windows,
        device=CPU,
        dtype=torch.float32,
        needs_stats=lambda block, group: True,
        kv_cache=plan.kv_cache,
        follow_original=True,
    )
    for stop in stops:
        if isinstance(stop, BlockEnd):
            continue
        assert isinstance(stop, GroupStop)
        assert stop.stats is not None
        for linear in stop.group.linears:
            found[linear.name] = stop.stats.drift
            weight = stop.tensors[f"{linear.name}.weight"].float() * 1.1
            stop.replace(f"{linear.name}.weight", weight)
            quantized.get_submodule(linear.name).weight.data = weight

    originals = inputs_of(load_float(folder), windows)
    inputs = inputs_of(quantized, windows)
    assert len(found) == 13
    for name, drift in found.items():
        assert drift is not None
        expected = (originals[name] - inputs[name]).T @ inputs[name] / len(inputs[name])
        tolerance = 1e-5 * (inputs[name].T @ inputs[name] / len(inputs[name])).norm()
        assert (drift.double() - expected).norm() < tolerance, name
    assert float(found["model.layers.1.mlp.down_proj"].abs().max()) > 0
