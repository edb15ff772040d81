"""Polishing lowers the output error and stops where no single change helps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, code_range, decode, dequantize, quantize
from quantkit.records import LayerStats
from quantkit.schemes import SCHEMES
from quantkit.solvers import polish as polishing
from quantkit.solvers.polish import polish
from tests.solvers.cases import (
    DEVICES,
    INTEGER_SCHEMES,
    SETTINGS,
    assert_not_worse,
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
    codes = quantize(weight, scale, zero_point, scheme)

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "columns"), [("fp8_dynamic", 160), ("fp8_block", 96)])
def test_no_floating_point_code_can_be_improved_in_the_end(
    name: str, columns: int, device: str
) -> None:
    """No other value of any code lowers the loss: by brute force."""
    scheme = SCHEMES[name]
    weight, moment = make_weight(3, columns, seed=1).to(device), make_moment(columns, 1).to(device)
    scale, _ = choose_absmax(weight, scheme, None, torch.bfloat16)
    codes = quantize(weight, scale, None, scheme)

    codes, scale, final_losses = polish(
        weight, codes, scale, None, scheme, moment, ridge=0.0, sweeps=40
    )

    decoded = decode(codes, scale, None, scheme).double()
    final = exact_losses(decoded - weight, moment)
    torch.testing.assert_close(final_losses, final, rtol=1e-4, atol=0)
    bits = torch.arange(256, device=device).to(torch.uint8)
    values = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn).double()
    slopes, steps = (decoded - weight) @ moment.double(), scale.double()[:, :1]
    for column in range(columns):
        change = values * steps - decoded[:, column : column + 1]
        slope = slopes[:, column : column + 1]
        more = change * (2 * slope + change * moment[column, column].double())
        assert bool((more >= -1e-5 * final.unsqueeze(1)).all())


@pytest.mark.parametrize(
    ("name", "columns", "group_size"),
    [("w4a16", 160, None), ("w4a16_asym", 192, 96), ("fp8_dynamic", 160, None)],
)
def test_scales_of_wide_groups_are_the_best_for_their_codes(
    name: str, columns: int, group_size: int | None
) -> None:
    """None alone has a slope left, in float32: groups wider than a block or across two."""
    scheme = SCHEMES[name]
    weight, moment = make_weight(3, columns, seed=4), make_moment(columns, seed=4)
    scale, zero_point = choose_absmax(weight, scheme, group_size, torch.float32)
    codes = quantize(weight, scale, zero_point, scheme)

    codes, scale, _ = polish(weight, codes, scale, zero_point, scheme, moment, 0.0, sweeps=30)

    error = decode(codes, scale, zero_point, scheme).double() - weight
    values = decode(codes, torch.ones_like(scale), zero_point, scheme).double()
    parts = (error @ moment.double() * values).reshape(*scale.shape, -1)
    assert bool((parts.sum(2).abs() <= 1e-3 * parts.abs().sum(2)).all())


def test_the_scale_of_a_block_is_the_best_for_all_its_rows() -> None:
    """No slope is left in the sum over its 128 rows, which keep one scale."""
    scheme = SCHEMES["fp8_block"]
    weight, moment = make_weight(130, 140, seed=5), make_moment(140, seed=5)
    scale, _ = choose_absmax(weight, scheme, None, torch.float32)
    codes = quantize(weight, scale, None, scheme)

    codes, scale, losses = polish(weight, codes, scale, None, scheme, moment, 0.0, sweeps=30)

    assert scale.shape == (2, 2)
    error = decode(codes, scale, None, scheme).double() - weight
    torch.testing.assert_close(losses, exact_losses(error, moment), rtol=1e-4, atol=0)
    parts = error @ moment.double() * codes.double()
    for row in range(2):
        for column in range(2):
            block = parts[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            assert float(block.sum().abs()) <= 1e-3 * float(block.abs().sum())


@settings(max_examples=40, deadline=None)
@given(
    weight=hard_weights(rows=3, columns=160),
    stats=hard_stats(columns=160),
    setting=st.sampled_from(SETTINGS),
)
def test_polishing_raises_no_loss(
    weight: Tensor, stats: LayerStats, setting: tuple[str, int | None]
) -> None:
    """Of each row, or of all that share a scale, in float64, up to the resolution of float32."""
    scheme, group_size = SCHEMES[setting[0]], setting[1]
    scale, zero_point = choose_absmax(weight, scheme, group_size, torch.bfloat16)
    codes = quantize(weight, scale, zero_point, scheme)

    *polished, _ = polish(
        weight, codes, scale, zero_point, scheme, stats.second_moment, ridge=0.0, sweeps=2
    )

    after = polished[0], polished[1], zero_point
    assert_not_worse(weight, scheme, stats, (codes, scale, zero_point), after)


def test_dead_columns_keep_their_codes() -> None:
    """No calibration token tells anything about them."""
    weight, moment = make_weight(4, 64, seed=2), make_moment(64, seed=2)
    moment[:, 10] = 0.0
    moment[10] = 0.0
    scheme = SCHEMES["w4a16"]
    scale, _ = choose_absmax(weight, scheme, None, torch.bfloat16)
    codes = quantize(weight, scale, None, scheme)

    polished, _, _ = polish(weight, codes, scale, None, scheme, moment, ridge=0.0, sweeps=2)

    assert torch.equal(polished[:, 10], codes[:, 10])
    assert not torch.equal(polished, codes)


def test_the_rounding_that_is_polished_is_left_as_it_was() -> None:
    """Also where it has a single row or a single group, whose transposes are no copies."""
    scheme = SCHEMES["w4a16"]
    for rows, group_size in ((1, 32), (3, None)):
        weight, moment = make_weight(rows, 64, seed=3), make_moment(64, seed=3)
        scale, _ = choose_absmax(weight, scheme, group_size, torch.bfloat16)
        codes = quantize(weight, scale, None, scheme)
        copies = codes.clone(), scale.clone()

        polish(weight, codes, scale, None, scheme, moment, ridge=0.0, sweeps=1)

        assert torch.equal(codes, copies[0])
        assert torch.equal(scale, copies[1])


def test_blocks_learn_of_what_changed_on_both_sides() -> None:
    """Four blocks: in the end no code has a better neighbour, by the slope of the exact loss."""
    scheme, columns = SCHEMES["w4a16"], 400
    weight, moment = make_weight(4, columns, seed=8), make_moment(columns, seed=8)
    scale, _ = choose_absmax(weight, scheme, None, torch.float32)
    codes = quantize(weight, scale, None, scheme)

    codes, scale, _ = polish(weight, codes, scale, None, scheme, moment, 0.0, sweeps=40)
    grouped, grouped_scale, _ = polish(
        weight, codes, scale.expand(-1, 25).contiguous(), None, scheme, moment, 0.0, sweeps=40
    )

    for found, steps in ((codes, scale), (grouped, grouped_scale)):
        error = dequantize(found, steps, None).double() - weight
        slope, final = error @ moment.double(), exact_losses(error, moment)
        for step in (-1, 1):
            allowed = (found + step).clamp(-8, 7) - found
            change = allowed * steps.repeat_interleave(columns // steps.shape[1], 1).double()
            more = change * (2 * slope + change * moment.diagonal().double())
            assert bool((more >= -1e-5 * final.unsqueeze(1)).all())


@pytest.mark.parametrize("name", ["w4a16_asym", "fp8_dynamic", "fp8_block"])
def test_rows_are_polished_alike_however_many_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each for itself, or with those that share its scale; the last part is narrow."""
    scheme, weight, moment = SCHEMES[name], make_weight(300, 96, 9), make_moment(96, 9)
    scale, zero_point = choose_absmax(
        weight, scheme, 32 if scheme.grouped else None, torch.bfloat16
    )
    codes = quantize(weight, scale, zero_point, scheme)

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return polish(weight, codes, scale, zero_point, scheme, moment, 0.0, sweeps=1)

    whole = run()
    monkeypatch.setitem(polishing._ROWS_AT_ONCE, "cpu", 128)
    parts = run()

    same = (parts[0].view(torch.int8) == whole[0].view(torch.int8)).float().mean()
    assert same > 0.999
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-3, atol=0)
    assert parts[1].shape == whole[1].shape


def test_quick_products_change_a_loss_by_little() -> None:
    """And the losses that come back are those of the codes that come back."""
    scheme, weight, moment = SCHEMES["w4a16"], make_weight(64, 512, 10), make_moment(512, 10)
    scale, _ = choose_absmax(weight, scheme, 128, torch.bfloat16)
    codes = quantize(weight, scale, None, scheme)

    exact, quick = (
        polish(weight, codes, scale, None, scheme, moment, 0.0, sweeps=2, quick=quick)
        for quick in (False, True)
    )

    assert float(quick[2].sum()) == pytest.approx(float(exact[2].sum()), rel=0.02)
    error = dequantize(quick[0], quick[1], None) - weight
    torch.testing.assert_close(quick[2], exact_losses(error, moment), rtol=2e-3, atol=0)
