"""Every rounder with every scheme on hard weights and hard statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, code_range, quantize
from quantkit.records import LayerStats
from quantkit.schemes import EFFORTS, METHODS, SCHEMES, Effort
from quantkit.solvers.group import CALIBRATED_ROUNDERS, solve_group
from quantkit.solvers.rounding import Rounding
from tests.solvers.cases import (
    DEVICES,
    SETTINGS,
    assert_not_worse,
    exact_losses,
    hard_stats,
    hard_weights,
    make_moment,
    make_plan,
    make_weight,
)

choices = st.sampled_from(SETTINGS)
efforts = st.sampled_from(list(EFFORTS.values()))
dtypes = st.sampled_from((torch.bfloat16, torch.float16))
rounders = pytest.mark.parametrize("rounder", list(CALIBRATED_ROUNDERS))


@rounders
@settings(max_examples=40, deadline=None)
@given(
    weight=hard_weights(rows=4, columns=160),
    stats=hard_stats(columns=160),
    setting=choices,
    effort=efforts,
    dtype=dtypes,
)
def test_nothing_is_worse_than_plain_rounding_or_infinite(
    rounder: str,
    weight: Tensor,
    stats: LayerStats,
    setting: tuple[str, int | None],
    effort: Effort,
    dtype: torch.dtype,
) -> None:
    """Codes within their range, finite scales, the loss of no row above that of plain rounding."""
    scheme, group_size = SCHEMES[setting[0]], setting[1]

    solved = CALIBRATED_ROUNDERS[rounder](weight, scheme, group_size, dtype, stats, effort)

    scale, zero_point = choose_absmax(weight, scheme, group_size, dtype)
    plain = quantize(weight, scale, zero_point, scheme), scale, zero_point
    found = solved.codes, solved.scale, solved.zero_point
    assert_in_range(solved, scheme.weight_bits)
    assert solved.scale.shape == scale.shape
    assert solved.scale.dtype == dtype
    assert_not_worse(weight, scheme, stats, plain, found)


def assert_in_range(solved: Rounding, bits: int) -> None:
    """Codes and zero points that their bits can hold, scales that can be multiplied by."""
    smallest, largest = code_range(bits)
    assert bool((solved.scale.float() > 0).all())
    assert bool(solved.scale.float().isfinite().all())
    for whole in (solved.codes, solved.zero_point):
        if whole is not None and whole.dtype == torch.int8:
            assert bool(((whole >= smallest) & (whole <= largest)).all())
    if solved.codes.dtype != torch.int8:
        assert solved.codes.dtype == torch.float8_e4m3fn
        assert bool(solved.codes.float().isfinite().all())


@rounders
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9).map(lambda part: 32 * part),
    setting=choices,
    seed=st.integers(0, 9),
)
def test_every_shape_is_solved_and_the_same_again(
    rounder: str, rows: int, columns: int, setting: tuple[str, int | None], seed: int
) -> None:
    """One row or one group, blocks that are cut off; the second time the same bits come out."""
    scheme, group_size = SCHEMES[setting[0]], setting[1]
    if group_size is not None and columns % group_size:
        group_size = None
    weight, moment = make_weight(rows, columns, seed), make_moment(columns, seed)
    arguments = weight, scheme, group_size, torch.bfloat16, LayerStats(moment, 9999)

    first, second = (CALIBRATED_ROUNDERS[rounder](*arguments, EFFORTS["best"]) for _ in range(2))

    assert first.codes.shape == (rows, columns)
    assert torch.equal(first.codes.view(torch.int8), second.codes.view(torch.int8))
    assert torch.equal(first.scale, second.scale)


@rounders
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "group_size"), SETTINGS)
def test_the_error_falls_clearly_on_realistic_weights(
    rounder: str, name: str, group_size: int | None, device: str
) -> None:
    """Of plain rounding at most nine tenths are left, with the losses that are reported."""
    scheme = SCHEMES[name]
    weight, moment = make_weight(48, 160, seed=0).to(device), make_moment(160, seed=0).to(device)
    method = {"search": "awq", "gptq": "gptq"}[rounder]
    assert METHODS[method].rounder == rounder

    (solution,) = solve_group(
        [weight],
        LayerStats(moment, 9999),
        [make_plan("a", weight, method, name, group_size)],
        torch.bfloat16,
    )

    assert solution.loss is not None
    assert solution.plain_loss is not None
    most = 0.99 if scheme.granularity == "block" and rounder == "search" else 0.9
    assert solution.loss < most * solution.plain_loss
    scale, zero_point = choose_absmax(weight, scheme, group_size, torch.bfloat16)
    plain = quantize(weight, scale, zero_point, scheme)
    expected = exact_losses(_decoded(plain, scale, zero_point, name) - weight, moment).sum()
    assert solution.plain_loss == pytest.approx(float(expected), rel=1e-4)


def _decoded(codes: Tensor, scale: Tensor, zero_point: Tensor | None, name: str) -> Tensor:
    """Weights from codes by repeating each scale over what shares it."""
    rows, columns = codes.shape
    if SCHEMES[name].granularity == "block":
        spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return codes.float() * spread[:rows, :columns]
    size = columns // scale.shape[1]
    offset = torch.zeros_like(scale) if zero_point is None else zero_point
    values = codes.float() - offset.float().repeat_interleave(size, 1)
    return values * scale.float().repeat_interleave(size, 1)
