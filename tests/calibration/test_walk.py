"""The walk against plain hooks on transformers' own forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.calibration.walk import LoadBlock, LoadOutside, walk
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CheckpointError
from quantkit.planning import make_plan
from quantkit.recipe import Recipe, validate
from quantkit.records import BlockPlan, GroupPlan, Plan, TokenWindows
from tests.helpers import make_pico_model, write_shards

CPU = torch.device("cpu")


def make_windows(count: int = 6, length: int = 16, vocabulary: int = 300) -> TokenWindows:
    """Random tokens, of which the first half of every window counts."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, vocabulary, (count, length))
    return TokenWindows(ids, np.ones((count, length), np.float32), "random", "0")


def make_recipe(**quantize: object) -> Recipe:
    """A gptq recipe with group size 32."""
    settings = {"scheme": "w4a16", "group_size": 32, "method": "gptq", **quantize}
    calibration = {"data": "x.txt", "samples": 6, "sequence_length": 16}
    return validate({"version": 1, "calibration": calibration, "quantize": settings})


def open_model(folder: Path, recipe: Recipe) -> tuple[Checkpoint, Plan]:
    """A checkpoint and its plan."""
    checkpoint = open_checkpoint(resolve_source(str(folder)))
    return checkpoint, make_plan(recipe, checkpoint, gate=False)


def loaders(checkpoint: Checkpoint) -> tuple[LoadBlock, LoadOutside]:
    """What a walk reads blocks, and what lies outside of them, with."""
    outside = [
        name for name in checkpoint.tensors if "layers." not in name and name != "lm_head.weight"
    ]

    def load_block(block: BlockPlan) -> Mapping[str, Tensor]:
        names = [name for name in checkpoint.tensors if name.startswith(f"{block.prefix}.")]
        return {name: read_tensor(checkpoint, name) for name in names}

    return load_block, lambda: {name: read_tensor(checkpoint, name) for name in outside}


def start_walk(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: TokenWindows,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    needs_sample: Callable[[GroupPlan], bool] | None = None,
):
    """A walk that takes every statistic."""
    return walk(
        build_skeleton(checkpoint),
        plan.blocks,
        *loaders(checkpoint),
        windows,
        device=device,
        dtype=dtype,
        needs_stats=lambda block, group: True,
        needs_sample=needs_sample,
    )


def hook_moments(model: torch.nn.Module, windows: TokenWindows) -> dict[str, Tensor]:
    """Second moments of every linear layer's input by hooks on a whole, ordinary forward."""
    sums: dict[str, Tensor] = {}
    weights = torch.from_numpy(windows.weights).reshape(-1, 1)

    def watch(name: str):
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = (rows * weights).T @ rows

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows.ids), use_cache=False)
    return {name: total / windows.weights.sum() for name, total in sums.items()}


def load_float(folder: Path) -> torch.nn.Module:
    """The whole model by transformers alone, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_moments_equal_those_of_plain_hooks(tmp_path: Path, family: str) -> None:
    """Suspending a forward changes nothing in what it computes."""
    folder = make_pico_model(tmp_path / "model", family=family)
    checkpoint, plan = open_model(folder, make_recipe())
    windows = make_windows()
    expected = hook_moments(load_float(folder), windows)

    found = {}
    for stop in start_walk(checkpoint, plan, windows):
        for linear in stop.group.linears:
            found[linear.name] = stop.stats.second_moment
        assert stop.stats.tokens == windows.ids.size

    assert set(found) == {name for name in expected if name != "lm_head"}
    for name, moment in found.items():
        torch.testing.assert_close(moment.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({}, False),
        ({"method": "awq"}, False),
        ({"scheme": "w8a8"}, True),
        ({"effort": "best"}, True),
    ],
    ids=["gptq", "awq", "rounded inputs", "the whole model"],
)
def test_tokens_are_kept_where_they_are_looked_at(
    tmp_path: Path, settings: dict[str, object], sampled: bool
) -> None:
    """Everything else that is known of an input is the same without them."""
    checkpoint, plan = open_model(make_pico_model(tmp_path / "model"), make_recipe(**settings))
    windows = make_windows()

    every = [stop.stats for stop in start_walk(checkpoint, plan, windows)]
    wanted = start_walk(checkpoint, plan, windows, needs_sample=lambda group: group.needs_sample)
    some = [stop.stats for stop in wanted]

    for one, other in zip(every, some, strict=True):
        assert len(one.sample) == one.tokens == other.tokens == windows.ids.size
        assert len(other.sample) == (windows.ids.size if sampled else 0)
        for name in ("second_moment", "mean", "absmax"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_token_weights_leave_tokens_out(tmp_path: Path) -> None:
    """A token of weight 0 is seen by the forward and not by the statistics."""
    folder = make_pico_model(tmp_path / "model")
    checkpoint, plan = open_model(folder, make_recipe())
    windows = make_windows()
    windows.weights[:, 8:] = 0
    expected = hook_moments(load_float(folder), windows)

    for stop in start_walk(checkpoint, plan, windows):
        moment = stop.stats.second_moment.double()
        assert stop.stats.tokens == windows.ids.size // 2
        torch.testing.assert_close(
            moment, expected[stop.group.linears[0].name], rtol=1e-4, atol=1e-5
        )


def test_later_layers_see_replaced_weights(tmp_path: Path) -> None:
    """Statistics of a layer are those of the model whose earlier layers were replaced."""
    folder = make_pico_model(tmp_path / "model")
    checkpoint, plan = open_model(folder, make_recipe())
    windows = make_windows()
    reference = load_float(folder)

    for stop in start_walk(checkpoint, plan, windows):
        expected = hook_moments(reference, windows)
        for linear in stop.group.linears:
            torch.testing.assert_close(
                stop.stats.second_moment.double(), expected[linear.name], rtol=1e-3, atol=1e-4
            )
            weight = (stop.tensors[f"{linear.name}.weight"].float() * 8).round() / 8
            stop.replace(f"{linear.name}.weight", weight)
            reference.get_submodule(linear.name).weight.data = weight


def test_only_one_block_has_weights(tmp_path: Path) -> None:
    """When a block is being solved, all other blocks are on the meta device."""
    folder = make_pico_model(tmp_path / "model", layers=3)
    checkpoint, plan = open_model(folder, make_recipe())
    model = build_skeleton(checkpoint)
    walking = walk(
        model,
        plan.blocks,
        lambda block: {
            name: read_tensor(checkpoint, name)
            for name in checkpoint.tensors
            if name.startswith(block.prefix + ".")
        },
        lambda: {
            name: read_tensor(checkpoint, name)
            for name in checkpoint.tensors
            if "layers." not in name
        },
        make_windows(),
        device=CPU,
        dtype=torch.float32,
        needs_stats=lambda block, group: False,
    )

    for stop in walking:
        real = {name for name, weight in model.named_parameters() if weight.device.type == "cpu"}
        assert all(name.startswith(stop.block.prefix) for name in real if "layers." in name)
        assert not any("embed" in name for name in real)
    assert all("layers." not in n for n, w in model.named_parameters() if w.device.type == "cpu")


def test_a_wrong_order_of_groups_is_an_error(tmp_path: Path) -> None:
    """A plan that the forward does not follow is refused, not worked around."""
    folder = make_pico_model(tmp_path / "model")
    checkpoint, plan = open_model(folder, make_recipe())
    first = plan.blocks[0]
    swapped = type(first)(first.index, first.prefix, first.groups[::-1])
    wrong = Plan(**{**plan.__dict__, "blocks": (swapped, *plan.blocks[1:])})

    with pytest.raises(CheckpointError, match="where the plan expected"):
        list(start_walk(checkpoint, wrong, make_windows()))


def test_tensors_without_a_place_in_the_model_are_left_aside(tmp_path: Path) -> None:
    """Checkpoints of old have rotary frequencies, which today's modules compute by themselves."""
    folder = make_pico_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(8, 8)
    write_shards(folder, tensors)
    checkpoint, plan = open_model(folder, make_recipe())
    assert "2 tensors of the checkpoint have no place" in " ".join(plan.notes)

    stops = list(start_walk(checkpoint, plan, make_windows()))

    assert len(stops) == sum(len(block.groups) for block in plan.blocks)


def test_a_walk_that_is_closed_early_leaves_nothing_switched(tmp_path: Path) -> None:
    """Whoever catches an error in the middle of a job would go on in torch's inference mode."""
    folder = make_pico_model(tmp_path / "model")
    checkpoint, plan = open_model(folder, make_recipe())
    walking = start_walk(checkpoint, plan, make_windows())
    next(walking)
    assert torch.is_inference_mode_enabled()

    walking.close()

    assert not torch.is_inference_mode_enabled()
    assert not [thread for thread in threading.enumerate() if thread.name == "reading ahead"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_walk_is_the_same_on_cuda(tmp_path: Path) -> None:
    """Moments and tensors are on the device, and agree with those of the CPU."""
    folder = make_pico_model(tmp_path / "model")
    checkpoint, plan = open_model(folder, make_recipe())
    expected = start_walk(checkpoint, plan, make_windows())
    found = start_walk(checkpoint, plan, make_windows(), device=torch.device("cuda"))

    for ours, theirs in zip(found, expected, strict=True):
        moment = ours.stats.second_moment
        assert moment.is_cuda
        assert all(tensor.is_cuda for tensor in ours.tensors.values())
        torch.testing.assert_close(moment.cpu(), theirs.stats.second_moment, rtol=1e-3, atol=1e-4)
