"""The arithmetic that a job cannot do without, counted another way."""

from __future__ import annotations

import itertools

import torch
from bound import count_work
from shapes import SHAPES, Shape, make_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = Shape("small", 4, 6, layers=2, heads=2, kv_heads=1, vocabulary=11)
WINDOWS, LENGTH = 3, 5


def test_the_forward_is_counted_weight_by_weight_and_key_by_key() -> None:
    """Two operations each; the last layer of the last block feeds nobody."""
    weights = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 6 * 4 + 6 * 4 + 4 * 6
    linear = 2 * WINDOWS * LENGTH * (2 * weights - 4 * 6)
    attention = 0
    for _window, _layer, _head in itertools.product(range(WINDOWS), range(2), range(2)):
        for token in range(LENGTH):
            for _key in range(token + 1):
                attention += 2 * SMALL.head_dim  # its product with the query
                attention += 2 * SMALL.head_dim  # its value, weighed
    assert count_work(SMALL, WINDOWS, LENGTH).forward == linear + attention


def test_one_half_of_each_second_moment_is_counted() -> None:
    """Of q, k, v; of o; of gate and up; of down: each pair of columns once."""
    operations = 0
    for width in (4, 4, 4, 6):
        pairs = sum(1 for row in range(width) for column in range(width) if column <= row)
        operations += 2 * WINDOWS * LENGTH * pairs
    assert count_work(SMALL, WINDOWS, LENGTH).second_moments == 2 * operations


def test_both_are_what_a_job_must_do() -> None:
    """And nothing else is."""
    work = count_work(SMALL, WINDOWS, LENGTH)
    assert work.operations == work.forward + work.second_moments


def test_the_forward_agrees_with_torch() -> None:
    """Which counts all of a model: the head, the last layer, and both halves of the attention."""
    shape, length = SHAPES["tiny"], 16
    config = LlamaConfig(**make_config(shape), attn_implementation="eager")
    model, ids = LlamaForCausalLM(config), torch.zeros(WINDOWS, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)

    tokens = WINDOWS * length
    left_out = 2 * tokens * (shape.vocabulary + shape.intermediate) * shape.hidden
    upper_half = 2 * shape.hidden * WINDOWS * length * (length - 1) * shape.layers
    rotation = 2 * tokens * shape.head_dim // 2  # positions times frequencies, as a product
    counted = counter.get_total_flops() - left_out - upper_half
    assert counted - count_work(shape, WINDOWS, length).forward in (
        0,
        rotation,
        rotation // WINDOWS,
    )
