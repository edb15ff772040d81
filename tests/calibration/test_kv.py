"""Keys and values that the walk sees, against a plain forward and a rotary embedding by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.errors import CheckpointError
from quantkit.numerics.octaves import measure_positions
from quantkit.records import KvStats, Plan, TokenWindows
from tests.calibration.test_walk import load_float, make_recipe, make_windows, open_model
from tests.helpers import make_pico_model, write_shards

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def walk_kv(
    checkpoint: Checkpoint, plan: Plan, windows: TokenWindows, model: nn.Module | None = None
):
    """A walk that watches the cache and takes no second moment."""
    outside = [
        name for name in checkpoint.tensors if "layers." not in name and name != "lm_head.weight"
    ]
    return walk(
        build_skeleton(checkpoint) if model is None else model,
        plan.blocks,
        lambda block: {
            name: read_tensor(checkpoint, name)
            for name in checkpoint.tensors
            if name.startswith(f"{block.prefix}.")
        },
        lambda: {name: read_tensor(checkpoint, name) for name in outside},
        windows,
        device=torch.device("cpu"),
        dtype=torch.float32,
        needs_stats=lambda block, group: False,
        kv_cache=plan.kv_cache,
    )


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of states [B, T, H, D]: pairs of channels D/2 apart are turned."""
    half = states.shape[-1] // 2
    first, second = states[..., :half], states[..., half:]
    c, s = (table[:, :, None, :half] for table in (cos, sin))
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def cached_by_hand(model: nn.Module, windows: TokenWindows) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, T, kv_heads, D] of every layer, from hooks on a plain forward."""
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "k_norm", "v_proj")):
            module.register_forward_hook(
                lambda _, __, output, name=name: seen.__setitem__(name, output)
            )
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    cached = []
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.self_attn"
        shape = (*ids.shape, -1, layer.self_attn.head_dim)
        key = seen.get(f"{prefix}.k_norm", seen[f"{prefix}.k_proj"]).reshape(shape)
        cached.append((rotate(key, cos, sin), seen[f"{prefix}.v_proj"].reshape(shape)))
    return cached


def assert_equal(stats: KvStats, cached: tuple[Tensor, Tensor]) -> None:
    """The statistics are those of these keys and values."""
    key, value = cached
    for found, states in ((stats.key_absmax, key), (stats.value_absmax, value)):
        torch.testing.assert_close(found, states.abs().amax(dim=(0, 1)), rtol=1e-4, atol=1e-5)
    assert stats.tokens == key.shape[0] * key.shape[1]
    expected = measure_positions(key.transpose(1, 2).contiguous())
    torch.testing.assert_close(stats.key_errors, expected, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_watched_is_what_a_cache_holds(tmp_path: Path, family: str) -> None:
    """Also where nothing but the cache is quantized; mistral looks back four tokens only."""
    folder = make_pico_model(tmp_path / "model", family=family)
    if family == "mistral":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 4}))
    checkpoint, plan = open_model(folder, make_recipe(scheme="none", kv_cache="fp8"))
    windows = make_windows(count=270)  # More than one micro-batch.

    stops = list(walk_kv(checkpoint, plan, windows))

    assert [type(stop) for stop in stops] == [BlockEnd, BlockEnd]
    assert [stop.block for stop in stops] == list(plan.blocks)
    for stop, cached in zip(stops, cached_by_hand(load_float(folder), windows), strict=True):
        assert_equal(stop.kv, cached)


def test_replaced_weights_are_in_what_is_watched(tmp_path: Path) -> None:
    """Those of the block itself and of the blocks before it; all tokens count, whatever weight."""
    folder = make_pico_model(tmp_path / "model", family="qwen2")
    checkpoint, plan = open_model(folder, make_recipe(kv_cache="fp8_per_head"))
    windows = make_windows()
    windows.weights[:, 8:] = 0
    reference = load_float(folder)

    ends = []
    for stop in walk_kv(checkpoint, plan, windows):
        if isinstance(stop, GroupStop):
            for linear in stop.group.linears:
                name = f"{linear.name}.weight"
                weight = (stop.tensors[name].float() * 8).round() / 8
                stop.replace(name, weight)
                reference.get_parameter(name).data = weight
                if linear.has_bias:
                    stop.replace(f"{linear.name}.bias", torch.ones(linear.out_features))
                    reference.get_parameter(f"{linear.name}.bias").data.fill_(1.0)
        else:
            ends.append(stop.kv)

    for stats, cached in zip(ends, cached_by_hand(reference, windows), strict=True):
        assert_equal(stats, cached)


def test_only_a_parameter_can_be_replaced(tmp_path: Path) -> None:
    """A misspelt name would leave the walk with the old weight."""
    checkpoint, plan = open_model(make_pico_model(tmp_path / "model"), make_recipe())
    stop = next(iter(walk_kv(checkpoint, plan, make_windows())))
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj"):
        with pytest.raises(ValueError, match="no parameter"):
            stop.replace(name, torch.zeros(1))


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
def test_attention_is_as_it_was_after_a_walk(tmp_path: Path, kv_cache: str) -> None:
    """Another walk of the same model knows nothing of the first; one without a cache never did."""
    checkpoint, plan = open_model(
        make_pico_model(tmp_path / "model"), make_recipe(kv_cache=kv_cache)
    )
    model = build_skeleton(checkpoint)
    walking = walk_kv(checkpoint, plan, make_windows(), model)
    next(walking)
    assert (model.config._attn_implementation == "sdpa") is (kv_cache == "none")

    walking.close()

    assert model.config._attn_implementation == "sdpa"


def test_keys_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    """A scale of infinity would make zeros of the whole cache."""
    folder = make_pico_model(tmp_path / "model", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3] = 3e38
    write_shards(folder, tensors)
    checkpoint, plan = open_model(folder, make_recipe(scheme="none", kv_cache="fp8"))

    with pytest.raises(CheckpointError, match=r"values of model\.layers\.1\.self_attn are not"):
        list(walk_kv(checkpoint, plan, make_windows()))


def test_heads_other_than_planned_are_an_error(tmp_path: Path) -> None:
    """Scales for them would be in the wrong shape."""
    checkpoint, plan = open_model(
        make_pico_model(tmp_path / "model"), make_recipe(scheme="none", kv_cache="fp8")
    )
    wrong = replace(plan, kv_cache=replace(plan.kv_cache, kv_heads=4))

    with pytest.raises(CheckpointError, match=r"caches \[2, 16\] .* expected \[4, 16\]"):
        list(walk_kv(checkpoint, wrong, make_windows()))


def test_attention_that_cannot_be_watched_is_an_error(tmp_path: Path) -> None:
    """Nothing is assumed about keys and values that were not seen."""
    checkpoint, plan = open_model(
        make_pico_model(tmp_path / "model"), make_recipe(scheme="none", kv_cache="fp8")
    )
    model = build_skeleton(checkpoint)
    model.set_attn_implementation("eager")

    with pytest.raises(CheckpointError, match="computes attention by 'eager'"):
        next(walk_kv(checkpoint, plan, make_windows(), model))
