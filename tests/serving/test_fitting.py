"""Memory, the number of GPUs, and the context that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantkit.capacity import find_gpu, read_shape
from quantkit.errors import InputError, ResourceError
from quantkit.serving.fitting import Needs, list_divisions, plan_memory
from quantkit.serving.records import Machine, ServedLayer, Target, Wish

GB = 10**9
LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
NEEDS = Needs(share=0.9, bytes_per_value=2.0, base_bytes=1 << 30, step_tokens=8192)


def make_target(weight_bytes: int = 40 * GB, **changes: int) -> Target:
    """A model of 70 billion weights in about four bits."""
    return Target(
        name="llama-70b",
        location="llama-70b",
        revision=None,
        folder=None,
        format="compressed-tensors",
        scheme="w4a16 g128",
        kv_cache="none",
        weight_bytes=weight_bytes,
        shape=read_shape({**LLAMA_70B, **changes}),
        intermediate=28672,
        layers=(),
    )


def make_machine(gpus: int, name: str = "H100") -> Machine:
    """Some GPUs."""
    gpu = find_gpu(name)
    return Machine(gpu.name, gpus, gpu.memory_bytes, gpu.compute_capability)


def make_wish(context: int | None, concurrency: int) -> Wish:
    """What is asked for."""
    return Wish(context, concurrency, "127.0.0.1", 8000, None, "auto")


def test_the_cache_is_that_of_the_planning_tables() -> None:
    """80 layers, 2 x 8 heads of 128, 2 bytes: 320 KiB a token."""
    plan = plan_memory(make_target(), make_machine(8), NEEDS, make_wish(8192, 1))
    assert plan.gpus == 1
    assert plan.kv_cache == 327_680 * 8192
    assert plan.weights == 40 * GB


def test_the_fewest_gpus_that_hold_it_are_taken() -> None:
    """Weights and cache are divided; what does not fit on one goes on two, and so on."""
    target, machine = make_target(), make_machine(8)
    counts = [
        plan_memory(target, machine, NEEDS, make_wish(32768, each)).gpus for each in (1, 8, 16, 32)
    ]
    # 10.7 GB of cache a sequence.
    assert counts == [1, 2, 4, 8]
    plan = plan_memory(target, machine, NEEDS, make_wish(32768, 8))
    assert plan.weights == 20 * GB
    assert plan.kv_cache == 327_680 * 32768 * 8 // 2
    assert plan.total <= plan.available


def test_the_longest_context_is_found_where_the_wish_is_too_long() -> None:
    """One page more would not fit."""
    target, machine = make_target(), make_machine(1)
    plan = plan_memory(target, machine, NEEDS, make_wish(131072, 4))
    assert plan.context < plan.asked_context == 131072
    assert plan.context % 16 == 0
    longer = 327_680 * (plan.context + 16) * 4
    assert plan.total <= plan.available < plan.weights + plan.overhead + longer


def test_weights_that_do_not_fit_are_refused() -> None:
    """With what to do."""
    with pytest.raises(ResourceError, match=r"llama-70b does not fit: 140 GB .* --gpus"):
        plan_memory(make_target(140 * GB), make_machine(1), NEEDS, make_wish(None, 1))
    assert plan_memory(make_target(140 * GB), make_machine(8), NEEDS, make_wish(None, 1)).gpus == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 2, 4, 8]),
        ({"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128}, [1, 2, 4, 8]),
        ({"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 128}, [1, 2, 4]),
        # Two heads are held twice by four GPUs; six would cut the MLP of 28672.
        ({"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128}, [1, 2, 4]),
        # Three heads are neither divided by 2, 4 or 8 GPUs nor held equally often.
        ({"num_attention_heads": 24, "num_key_value_heads": 3, "head_dim": 128}, [1]),
    ],
)
def test_a_number_of_gpus_divides_the_heads(changes: dict[str, int], expected: list[int]) -> None:
    """Key/value heads are divided, or held several times."""
    target = make_target(**changes)
    assert list(list_divisions(target, make_machine(8), NEEDS)) == expected


def test_no_group_of_weights_is_cut() -> None:
    """A layer that is divided by its inputs needs whole groups on each GPU."""
    down = ServedLayer("model.layers.0.mlp.down_proj", 128, "group", (8192, 11008))
    up = ServedLayer("model.layers.0.mlp.up_proj", 128, "group", (11008, 8192))
    target = replace(make_target(), layers=(up, down))
    # 11008 is 86 groups of 128.
    assert list(list_divisions(target, make_machine(8), NEEDS)) == [1, 2]
    blocks = replace(up, sharing="block", group_size=None)
    target = replace(make_target(), layers=(blocks,))
    assert list(list_divisions(target, make_machine(8), NEEDS)) == [1, 2]


def test_a_key_value_head_is_not_divided() -> None:
    """Eight GPUs hold each of two heads four times."""
    target = make_target(num_key_value_heads=2)
    plan = plan_memory(target, make_machine(8), NEEDS, make_wish(131072, 64))
    assert plan.gpus == 8
    assert plan.kv_cache == pytest.approx(80 * 2 * 2 * 128 * 2 * plan.context * 64 / 2)


def test_a_context_beyond_the_models_own_is_refused() -> None:
    """As servers do."""
    with pytest.raises(InputError, match="made for 131072 tokens"):
        plan_memory(make_target(), make_machine(8), NEEDS, make_wish(131073, 1))
    with pytest.raises(InputError, match="at least 16"):
        plan_memory(make_target(), make_machine(8), NEEDS, make_wish(8, 1))
