"""Several roundings of a row at a time, against a loop over lists of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics.affine import (
    choose_absmax,
    code_range,
    decode,
    quantize,
    round_second,
    round_values,
)
from quantkit.numerics.linalg import Factor, factor_moment
from quantkit.schemes import SCHEMES, Scheme
from quantkit.solvers.gptq import compensate
from tests.solvers.cases import DEVICES, exact_losses, make_moment, make_weight

SHAPES = {"w4a16": 32, "w4a16_asym": 32, "w8a8": None, "fp8_dynamic": None}


def make_factor(columns: int, seed: int) -> Factor:
    factor = factor_moment(make_moment(columns, seed), torch.arange(columns), damping=0.01)
    assert factor is not None
    return factor


def follow_slowly(
    row: Tensor, step: Tensor, zero_point: Tensor | None, scheme: Scheme, lower: Tensor, width: int
) -> list[float]:
    """The best of `width` roundings of one row in float64, as lists of (cost, values)."""
    roundings: list[tuple[float, list[float]]] = [(0.0, [])]
    for column in range(len(row) - 1, -1, -1):
        here, others = [], []
        for cost, values in roundings:
            # What was rounded last comes first in the list.
            errors = row[column + 1 :] - torch.tensor(values, dtype=row.dtype) * step[column + 1 :]
            makes_up = errors @ lower[column + 1 :, column] / lower[column, column]
            exact = ((row[column] + makes_up) / step[column]).float()
            offset = None if zero_point is None else zero_point[column]
            nearest = round_values(exact.clone(), scheme, offset)
            second = round_second(exact, nearest, scheme, offset)
            costs = [
                cost + float((lower[column, column] * step[column] * (exact - value)) ** 2)
                for value in (nearest, second)
            ]
            here.append((costs[0], [nearest.item(), *values]))
            if second != nearest:
                others.append((costs[1], [second.item(), *values]))
        if others:
            best_other = min(others)
            if len(here) < width:
                here.append(best_other)
            elif best_other[0] < max(here)[0]:
                here.remove(max(here))
                here.append(best_other)
        roundings = here
    return min(roundings)[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_values_are_those_of_the_slow_loop(name: str, device: str) -> None:
    """96 columns: one block, three panels; four roundings of every row."""
    scheme = SCHEMES[name]
    weight, factor = make_weight(6, 96, seed=1), make_factor(96, seed=2)
    scale, zero_point = choose_absmax(weight, scheme, SHAPES[name], torch.bfloat16)

    there = [None if part is None else part.to(device) for part in (weight, scale, zero_point)]
    moved = Factor(factor.order.to(device), factor.lower.to(device), factor.damping)
    codes = compensate(*there, scheme, moved, width=4).cpu().float()

    columns = 96 // scale.shape[1]
    steps = scale.double().repeat_interleave(columns, dim=1)
    offsets = None
    if zero_point is not None:
        offsets = zero_point.float().repeat_interleave(columns, dim=1)
        codes -= offsets
    for row in range(6):
        expected = follow_slowly(
            weight[row].double(),
            steps[row],
            None if offsets is None else offsets[row],
            scheme,
            factor.lower.tril(),
            width=4,
        )
        assert codes[row].tolist() == expected


@pytest.mark.parametrize("name", [*SHAPES, "fp8_block"])
def test_more_roundings_find_lower_losses(name: str) -> None:
    """Of all rows together, over two blocks of columns."""
    scheme, moment = SCHEMES[name], make_moment(160, seed=3)
    weight = make_weight(64, 160, seed=3)
    factor = factor_moment(moment, torch.arange(160), damping=0.01)
    scale, zero_point = choose_absmax(weight, scheme, SHAPES.get(name), torch.bfloat16)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(160)

    assert factor is not None
    losses = [
        exact_losses(
            decode(
                compensate(weight, scale, zero_point, scheme, factor, width=width),
                scale,
                zero_point,
                scheme,
            )
            - weight,
            damped,
        ).sum()
        for width in (1, 4, 16)
    ]

    assert losses[0] > losses[1] > losses[2]


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    """The nearest code is then the best in every column."""
    weight, scheme = make_weight(16, 64, seed=4), SCHEMES["w4a16"]
    scale, _ = choose_absmax(weight, scheme, 32, torch.bfloat16)
    factor = factor_moment(torch.diag(torch.rand(64) + 0.1), torch.arange(64), damping=0.01)

    assert factor is not None
    codes = compensate(weight, scale, None, scheme, factor, width=4)

    assert torch.equal(codes, quantize(weight, scale, None, scheme))


def test_rows_are_followed_independently_and_repeatably() -> None:
    """Together, alone, or again: the same codes."""
    weight, factor, scheme = make_weight(9, 96, seed=5), make_factor(96, 5), SCHEMES["w4a16_asym"]
    scale, zero_point = choose_absmax(weight, scheme, 32, torch.bfloat16)
    assert zero_point is not None

    together, again = (
        compensate(weight, scale, zero_point, scheme, factor, width=8) for _ in range(2)
    )
    alone = [
        compensate(*row, scheme, factor, width=8)
        for row in zip(weight.split(2), scale.split(2), zero_point.split(2), strict=True)
    ]

    assert torch.equal(together, again)
    assert torch.equal(together, torch.cat(alone))


def test_steps_of_very_different_size_do_not_overflow() -> None:
    """A huge group beside zeros, whose scale is 1, beside weights that are nothing to it."""
    weight = torch.zeros(2, 96)
    weight[:, :32] = make_weight(2, 32, seed=6) * 1e30
    weight[1, 64:] = 1e-38
    scheme = SCHEMES["w4a16"]
    scale, _ = choose_absmax(weight, scheme, 32, torch.bfloat16)

    codes = compensate(weight, scale, None, scheme, make_factor(96, 6), width=4)

    smallest, largest = code_range(4)
    assert bool(((codes >= smallest) & (codes <= largest)).all())
    plain = decode(quantize(weight, scale, None, scheme), scale, None, scheme)
    moment = make_moment(96, 6)
    before, after = (
        exact_losses((found - weight) / 1e30, moment)
        for found in (plain, decode(codes, scale, None, scheme))
    )
    assert bool((after < before).all())
