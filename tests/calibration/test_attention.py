"""The quicker attention in walks, where it stands for transformers' own and where it must not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from quantkit.calibration import attention
from quantkit.calibration.attention import choose_attention
from quantkit.calibration.walk import BlockEnd, GroupStop, walk
from quantkit.checkpoint.skeleton import build_skeleton
from quantkit.errors import CheckpointError
from quantkit.numerics.products import sums_products
from tests.calibration.test_walk import loaders, make_recipe, make_windows, open_model
from tests.helpers import make_pico_model

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    not sums_products(CPU), reason="the processor has no AVX512-BF16, or AMX, or numba is missing"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, list[Any]]:
    """What the kernel is called with, and transformers' function."""
    seen: dict[str, list[Any]] = {"attend_causally": [], "sdpa_attention_forward": []}

    def watch(name: str) -> None:
        call = getattr(attention, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            seen[name].append(options)
            return call(*arguments, **options)

        monkeypatch.setattr(attention, name, watched)

    for name in seen:
        watch(name)
    return seen


def walk_through(
    folder: Path,
    *,
    kv_cache: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    usual: str = "sdpa",
) -> tuple[dict[str, Tensor], str]:
    """The second moments by layer, and the absolute maxima of keys by block; and what the config
    said inside."""
    checkpoint, plan = open_model(folder, make_recipe(kv_cache=kv_cache))
    model = build_skeleton(checkpoint)
    model.set_attn_implementation(usual)
    found, inside = {}, ""
    for stop in walk(
        model,
        plan.blocks,
        *loaders(checkpoint),
        make_windows(),
        device=CPU,
        dtype=dtype,
        needs_stats=lambda block, group: True,
        kv_cache=plan.kv_cache,
    ):
        inside = model.config._attn_implementation
        if isinstance(stop, BlockEnd):
            found[stop.block.prefix] = stop.kv.key_absmax
        elif isinstance(stop, GroupStop) and stop.stats is not None:
            found[stop.group.linears[0].name] = stop.stats.second_moment
    assert model.config._attn_implementation == usual
    return found, inside


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_statistics_are_those_of_torchs_attention(
    tmp_path: Path,
    calls: Mapping[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kv_cache: str,
) -> None:
    """Up to what rounding to bfloat16 makes of a last bit; masks are left out as they are there."""
    folder = make_pico_model(tmp_path / "model", family=family)

    found, _ = walk_through(folder, kv_cache=kv_cache)

    assert len(calls["attend_causally"]) == 2
    assert not calls["sdpa_attention_forward"]
    monkeypatch.setattr(attention, "sums_products", lambda _: False)
    expected, inside = walk_through(folder, kv_cache=kv_cache)
    assert len(calls["attend_causally"]) == 2
    assert (inside == "sdpa") is (kv_cache == "none")
    assert found.keys() == expected.keys()
    for name, moment in found.items():
        assert (moment - expected[name]).norm() <= 0.01 * expected[name].norm(), name


@pytest.mark.parametrize("usual", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_cannot_be_quicker_is_left_alone(
    tmp_path: Path, calls: Mapping[str, list[Any]], usual: str, dtype: torch.dtype
) -> None:
    """Another dtype, or attention that is not scaled dot product attention by name."""
    _, inside = walk_through(make_pico_model(tmp_path / "model"), dtype=dtype, usual=usual)

    quick = usual == "sdpa" and dtype == torch.bfloat16
    assert (inside == usual) is not quick
    assert len(calls["attend_causally"]) == (2 if quick else 0)


@pytest.mark.parametrize("kv_cache", ["none", "fp8"])
def test_a_window_that_slides_is_for_transformers(
    tmp_path: Path, calls: Mapping[str, list[Any]], kv_cache: str
) -> None:
    """Here 8 of 16 tokens are seen: there is a mask, and it counts."""
    folder = make_pico_model(tmp_path / "model", family="mistral")
    wide, _ = walk_through(folder, kv_cache=kv_cache)
    before = len(calls["attend_causally"])
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"sliding_window": 4096', '"sliding_window": 8'), "utf-8")

    narrow, _ = walk_through(folder, kv_cache=kv_cache)

    assert len(calls["attend_causally"]) == before
    assert len(calls["sdpa_attention_forward"]) == 2
    name = "model.layers.0.self_attn.o_proj"
    assert not torch.equal(wide[name], narrow[name])


def test_nothing_stays_registered(tmp_path: Path) -> None:
    """Nor is a walk in the way of another that is in the middle of its own."""
    checkpoint, plan = open_model(make_pico_model(tmp_path / "model"), make_recipe())
    before = [dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)]
    models = [build_skeleton(checkpoint) for _ in range(2)]
    first, second = (
        walk(
            model,
            plan.blocks,
            *loaders(checkpoint),
            make_windows(),
            device=CPU,
            dtype=torch.bfloat16,
            needs_stats=lambda block, group: False,
        )
        for model in models
    )
    next(first)
    next(second)
    assert len(AttentionInterface._global_mapping) == len(before[0]) + 2

    second.close()
    left = list(first)

    assert left
    for kind, mapping in zip((AttentionInterface, AttentionMaskInterface), before, strict=True):
        assert kind._global_mapping == mapping
    assert [model.config._attn_implementation for model in models] == ["sdpa", "sdpa"]


def test_activations_that_overflow_are_found(
    tmp_path: Path, calls: Mapping[str, list[Any]]
) -> None:
    """Attention passes on what is not finite."""
    folder = make_pico_model(tmp_path / "model")
    checkpoint, plan = open_model(folder, make_recipe())
    load_block, load_outside = loaders(checkpoint)

    def load_broken(block: Any) -> Mapping[str, Tensor]:
        tensors = dict(load_block(block))
        tensors[f"{block.prefix}.self_attn.v_proj.weight"][3] = torch.inf
        return tensors

    stops = walk(
        build_skeleton(checkpoint),
        plan.blocks,
        load_broken,
        load_outside,
        make_windows(),
        device=CPU,
        dtype=torch.bfloat16,
        needs_stats=lambda block, group: True,
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.o_proj is not finite"):
        list(stops)
    assert calls["attend_causally"]


@pytest.mark.parametrize(
    ("options", "quick"),
    [
        ({}, True),
        ({"scaling": 0.3, "is_causal": True, "dropout": 0.0, "softcap": None}, True),
        ({"position_ids": torch.arange(6)[None], "use_cache": True, "s_aux": None}, True),
        ({"sliding_window": 6}, True),
        ({"sliding_window": 5}, False),
        ({"is_causal": False}, False),
        ({"scaling": -1.0}, False),
        ({"dropout": 0.1}, False),
        ({"s_aux": torch.zeros(4)}, False),
        ({"position_bias": torch.zeros(1, 4, 6, 6).bfloat16()}, False),
        ({"anything": 1}, False),
        ({"attention_mask": torch.ones(1, 1, 6, 6).tril().bool()}, False),
    ],
)
def test_options_that_mean_more_are_for_transformers(
    calls: Mapping[str, list[Any]], options: dict[str, Any], quick: bool
) -> None:
    """Also what nobody has heard of yet."""
    module, mask = nn.Module(), options.pop("attention_mask", None)
    module.num_key_value_groups = 2
    query, key, value = (torch.randn(1, heads, 6, 16).bfloat16() for heads in (4, 2, 2))

    with torch.inference_mode():
        choose_attention(CPU, torch.bfloat16)(module, query, key, value, mask, **options)

    assert len(calls["attend_causally"]) == quick
    assert len(calls["sdpa_attention_forward"]) == (not quick)


def test_states_that_mean_more_are_for_transformers(calls: Mapping[str, list[Any]]) -> None:
    """A single query, more keys than queries, gradients, a module that looks both ways."""
    attend = choose_attention(CPU, torch.bfloat16)
    module, both_ways = nn.Module(), nn.Module()
    both_ways.is_causal = False
    states = torch.randn(1, 4, 6, 16).bfloat16()
    with torch.inference_mode():
        attend(module, states[:, :, :1], states[:, :, :1], states[:, :, :1], None)
        attend(module, states[:, :, :1], states, states, None)
        attend(module, states[:, :, :4], states, states, None)
        attend(both_ways, states, states, states, None)
    attend(module, states.requires_grad_(), states, states, None)[0].sum().backward()

    assert states.grad is not None
    assert not calls["attend_causally"]
    assert len(calls["sdpa_attention_forward"]) == 5


def test_another_processor_or_dtype_has_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step between."""
    own = attention.sdpa_attention_forward
    assert choose_attention(CPU, torch.float32) is own
    assert choose_attention(torch.device("meta"), torch.bfloat16) is own
    monkeypatch.setattr(attention, "sums_products", lambda _: False)
    assert choose_attention(CPU, torch.bfloat16) is own
