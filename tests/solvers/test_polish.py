"""Polishing lowers the output error and stops where no single change helps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, code_range, dequantize, quantize
from quantkit.records import LayerStats
from quantkit.schemes import SCHEMES, Scheme
from quantkit.solvers.polish import polish
from tests.solvers.cases import (
    DEVICES,
    INTEGER_SCHEMES,
    exact_losses,
    hard_stats,
    hard_weights,
    make_moment,
    make_weight,
)


def test_a_code_moves_to_where_the_other_error_is_made_up_for() -> None:
    """Both weights of 0.4 steps rounded to 0 under H = [[1, .9], [.9, 1]]: the first becomes 1."""
    weight, codes = torch.tensor([[0.4, 0.4]]), torch.zeros(1, 2, dtype=torch.int8)
    moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    # A group of two columns in a matrix of two: its scale is refitted too, from 1 to
    # (v H w^T) / (v H v^T) = 0.76 with v = [1, 0].
    new_codes, new_scale, _ = polish(
        weight, codes, torch.ones(1, 1), None, SCHEMES["w4a16"], moment, ridge=0.0, sweeps=1
    )

    assert new_codes.tolist() == [[1, 0]]
    assert new_scale.item() == pytest.approx(0.76)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", INTEGER_SCHEMES)
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (256, 128), (160, None)])
def test_no_single_code_can_be_improved_in_the_end(
    name: str, columns: int, group_size: int | None, device: str
) -> None:
    """After many sweeps, one step up or down of any code raises the loss: by brute force."""
    scheme = SCHEMES[name]
    weight, moment = make_weight(3, columns, seed=1).to(device), make_moment(columns, 1).to(device)
    scale, zero_point = choose_absmax(weight, scheme, group_size, torch.bfloat16)
    codes = quantize(weight, scale, zero_point, scheme.weight_bits)

    codes, scale, final_losses = polish(
        weight, codes, scale, zero_point, scheme, moment, ridge=0.0, sweeps=40
    )

    smallest, largest = code_range(scheme.weight_bits)

    def losses(changed: Tensor) -> Tensor:
        return exact_losses(dequantize(changed, scale, zero_point) - weight, moment)

    final = losses(codes)
    torch.testing.assert_close(final_losses, final, rtol=1e-4, atol=0)
    for column in range(columns):
        for step in (-1, 1):
            changed = codes.clone()
            changed[:, column] = (codes[:, column] + step).clamp(smallest, largest)
            assert bool((losses(changed) >= final * (1 - 1e-5)).all())


@given(
    weight=hard_weights(rows=3, columns=64),
    stats=hard_stats(columns=64),
    scheme=st.sampled_from([SCHEMES[name] for name in INTEGER_SCHEMES]),
    group_size=st.sampled_from((32, 64, None)),
)
def test_polishing_raises_no_loss(
    weight: Tensor, stats: LayerStats, scheme: Scheme, group_size: int | None
) -> None:
    """Each row, in float64, up to the resolution of float32."""
    scale, zero_point = choose_absmax(weight, scheme, group_size, torch.bfloat16)
    codes = quantize(weight, scale, zero_point, scheme.weight_bits)

    *polished, _ = polish(
        weight, codes, scale, zero_point, scheme, stats.second_moment, ridge=0.0, sweeps=2
    )

    largest = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-45)
    errors = [
        (dequantize(*pair, zero_point).double() - weight) / largest
        for pair in ((codes, scale), tuple(polished))
    ]
    before, after = (exact_losses(error, stats.second_moment) for error in errors)
    resolution = 1e-5 * errors[0].square().sum(1) * stats.second_moment.diagonal().sum()
    assert bool((after <= before + resolution).all())


def test_dead_columns_keep_their_codes() -> None:
    """No calibration token tells anything about them."""
    weight, moment = make_weight(4, 64, seed=2), make_moment(64, seed=2)
    moment[:, 10] = 0.0
    moment[10] = 0.0
    scheme = SCHEMES["w4a16"]
    scale, _ = choose_absmax(weight, scheme, None, torch.bfloat16)
    codes = quantize(weight, scale, None, 4)

    polished, _, _ = polish(weight, codes, scale, None, scheme, moment, ridge=0.0, sweeps=2)

    assert torch.equal(polished[:, 10], codes[:, 10])
    assert not torch.equal(polished, codes)


def test_the_rounding_that_is_polished_is_left_as_it_was() -> None:
    """Also where it has a single row or a single group, whose transposes are no copies."""
    scheme = SCHEMES["w4a16"]
    for rows, group_size in ((1, 32), (3, None)):
        weight, moment = make_weight(rows, 64, seed=3), make_moment(64, seed=3)
        scale, _ = choose_absmax(weight, scheme, group_size, torch.bfloat16)
        codes = quantize(weight, scale, None, 4)
        copies = codes.clone(), scale.clone()

        polish(weight, codes, scale, None, scheme, moment, ridge=0.0, sweeps=1)

        assert torch.equal(codes, copies[0])
        assert torch.equal(scale, copies[1])
