"""How many windows are computed at a time where memory is short."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.calibration.walk import walk
from quantkit.checkpoint.reader import read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.errors import ResourceError
from quantkit.records import BlockPlan, LayerStats
from tests.calibration.test_walk import make_recipe, make_windows, open_model
from tests.helpers import make_pico_model

CPU = torch.device("cpu")


def walk_with_limit(
    folder: Path, limit: int, *, probe: bool, **quantize: object
) -> tuple[dict[str, LayerStats], list[int]]:
    """Walk through a model that has memory for `limit` windows; return the batches it met, too."""
    checkpoint, plan = open_model(folder, make_recipe(**quantize))
    model = build_skeleton(checkpoint)
    batches: list[int] = []

    def run_out(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        batches.append(len(args[0]))
        if len(args[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(run_out)

    def load_block(block: BlockPlan) -> Mapping[str, Tensor]:
        names = [name for name in checkpoint.tensors if name.startswith(f"{block.prefix}.")]
        return {name: read_tensor(checkpoint, name) for name in names}

    stops: Any = walk(
        model,
        plan.blocks,
        load_block,
        lambda: {
            name: read_tensor(checkpoint, name)
            for name in checkpoint.tensors
            if "layers." not in name and name != "lm_head.weight"
        },
        make_windows(count=10),
        device=CPU,
        dtype=torch.float32,
        needs_stats=lambda block, group: True,
        kv_cache=plan.kv_cache,
        probe_batch=probe,
    )
    found = {stop.group.linears[0].name: stop.stats for stop in stops if hasattr(stop, "group")}
    return found, batches


@pytest.mark.parametrize("cache", ["none", "fp8"])
def test_micro_batches_are_halved_until_one_fits(tmp_path: Path, cache: str) -> None:
    """All ten windows would be one micro-batch; statistics are the same but for their rounding."""
    folder = make_pico_model(tmp_path / "model", tokenizer=False)
    expected, _ = walk_with_limit(folder, 100, probe=True, kv_cache=cache)

    found, batches = walk_with_limit(folder, 4, probe=True, kv_cache=cache)

    # Tried with all ten, with five and with two, which are taken.
    assert batches == [10, 5, 2, 2, 2, 2, 2, 2]
    assert found.keys() == expected.keys()
    for name, stats in found.items():
        assert stats.tokens == expected[name].tokens == 160
        torch.testing.assert_close(
            stats.second_moment, expected[name].second_moment, rtol=1e-4, atol=1e-5
        )


def test_a_window_that_does_not_fit_is_a_lack_of_resources(tmp_path: Path) -> None:
    """The error says what to lower, and torch is as it was."""
    folder = make_pico_model(tmp_path / "model", tokenizer=False)

    with pytest.raises(ResourceError, match=r"16 tokens: lower calibration\.sequence_length"):
        walk_with_limit(folder, 0, probe=True)

    assert not torch.is_inference_mode_enabled()


def test_on_a_cpu_nothing_is_tried(tmp_path: Path) -> None:
    """What is free at the moment must not choose how sums are rounded."""
    folder = make_pico_model(tmp_path / "model", tokenizer=False)

    with pytest.raises(torch.OutOfMemoryError):
        walk_with_limit(folder, 4, probe=False)
    _, batches = walk_with_limit(folder, 10, probe=False)

    assert batches == [10]
