"""Compensated rounding, against the textbook loop over the inverse and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.numerics.affine import choose_absmax, code_range, decode, quantize
from quantkit.numerics.linalg import factor_moment
from quantkit.records import LayerStats
from quantkit.schemes import EFFORTS, SCHEMES, Scheme
from quantkit.solvers.gptq import (
    compensate,
    curvature,
    factor_by_activity,
    factor_by_pivot,
    round_compensated,
)
from quantkit.solvers.rtn import round_plainly
from tests.solvers.cases import (
    DEVICES,
    INTEGER_SCHEMES,
    NORMAL,
    exact_losses,
    make_moment,
    make_weight,
)


def round_by_the_textbook(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: Scheme,
    damped: Tensor,
    order: list[int],
) -> Tensor:
    """Optimal brain quantization of all rows in a fixed order, in float64.

    After a column is rounded, the rest moves by error * inverse[j, rest] / inverse[j, j], and
    column j is eliminated from the inverse of H.
    """
    working = weight.double().clone()
    size = weight.shape[1]
    if scheme.granularity == "block":
        scale = scale.repeat_interleave(128, dim=0)[: len(weight)]
        steps = scale.double().repeat_interleave(128, dim=1)[:, :size]
    else:
        steps = scale.double().repeat_interleave(size // scale.shape[1], dim=1)
    offsets = torch.zeros_like(steps)
    if zero_point is not None:
        offsets = zero_point.double().repeat_interleave(size // zero_point.shape[1], dim=1)
    inverse = torch.linalg.inv(damped.double())
    codes = torch.zeros_like(working)
    for position, column in enumerate(order):
        value = working[:, column] / steps[:, column]
        if scheme.weight_kind == "float":
            codes[:, column] = value.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
        else:
            code = value.round() + offsets[:, column]
            codes[:, column] = code.clamp(*code_range(scheme.weight_bits))
        rounded = steps[:, column] * (codes[:, column] - offsets[:, column])
        error = (working[:, column] - rounded) / inverse[column, column]
        rest = order[position + 1 :]
        working[:, rest] -= torch.outer(error, inverse[column, rest])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "columns", "group_size"),
    [
        *(
            (name, *shape)
            for name in INTEGER_SCHEMES
            for shape in ((64, 32), (96, None), (160, 32))
        ),
        ("fp8_dynamic", 160, None),
        ("fp8_block", 160, None),
    ],
)
def test_the_codes_are_those_of_the_textbook(
    name: str, columns: int, group_size: int | None, device: str
) -> None:
    """Same scales, order and damping: the same codes; 160 columns are two blocks."""
    scheme = SCHEMES[name]
    weight, moment = make_weight(24, columns, seed=1), make_moment(columns, seed=2)
    scale, zero_point = choose_absmax(weight, scheme, group_size, torch.bfloat16)
    order = torch.argsort(moment.diagonal())
    factor = factor_moment(moment.to(device), order.to(device), damping=0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(columns)

    assert factor is not None
    codes = compensate(
        weight.to(device),
        scale.to(device),
        None if zero_point is None else zero_point.to(device),
        scheme,
        factor,
    )

    # The factor is walked from its last column to its first.
    expected = round_by_the_textbook(
        weight, scale, zero_point, scheme, damped, order.flip(0).tolist()
    )
    assert torch.equal(codes.cpu().double(), expected)


def test_the_second_column_makes_up_for_the_first() -> None:
    """Two equal weights of 0.4 steps whose inputs nearly coincide: one rounds up, not none."""
    weight = torch.tensor([[0.4, 0.4]])
    moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    factor = factor_moment(moment, torch.arange(2), damping=0.01)
    scale = torch.ones(1, 1)

    assert factor is not None
    codes = compensate(weight, scale, None, SCHEMES["w4a16"], factor)

    # Column 1 rounds to 0; column 0 sees 0.4 + 0.4 * 0.9 / 1.01 = 0.756.
    assert codes.tolist() == [[1, 0]]


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    """A diagonal second moment leaves nothing to compensate."""
    weight = make_weight(16, 64, seed=3)
    scheme = SCHEMES["w4a16"]
    scale, zero_point = choose_absmax(weight, scheme, 32, torch.bfloat16)
    factor = factor_moment(torch.diag(torch.rand(64) + 0.1), torch.arange(64), damping=0.01)

    assert factor is not None
    codes = compensate(weight, scale, zero_point, scheme, factor)

    assert torch.equal(codes, quantize(weight, scale, zero_point, scheme))


def test_the_curvature_is_what_remains_of_the_diagonal_after_compensation() -> None:
    """In the order of the walk, 1 / (H^-1)_jj of the columns that are still free."""
    moment = make_moment(8, seed=4)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    factor = factor_moment(moment, order, damping=0.01)
    mean = moment.diagonal().mean()
    damped = (moment / mean + 0.01 * torch.eye(8)).double()

    assert factor is not None
    found = curvature(factor)

    for position in range(8):
        free = order[: position + 1]
        inverse = torch.linalg.inv(damped[free][:, free])
        assert found[order[position]].item() == pytest.approx(1 / inverse[-1, -1].item(), rel=1e-5)


def test_a_channel_scale_is_the_same_as_scaling_weight_and_factor() -> None:
    """Codes for W * s under L / s are those for W with channel scale s under L."""
    weight, moment = make_weight(8, 64, seed=5), make_moment(64, seed=5)
    channel = torch.exp2(torch.arange(64) % 5 - 2.0)
    scheme = SCHEMES["w4a16_asym"]
    found = choose_absmax(weight * channel, scheme, 32, torch.bfloat16)
    factor = factor_moment(moment, torch.arange(64), damping=0.01)
    assert factor is not None
    ridge = 0.01 * moment.diagonal().mean() * torch.eye(64)
    damped = (moment + ridge) / channel / channel.unsqueeze(1)

    codes = compensate(weight, *found, scheme, factor, channel.expand_as(weight))

    order = list(reversed(range(64)))
    expected = round_by_the_textbook(weight * channel, *found, scheme, damped, order)
    assert torch.equal(codes.double(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        *((name, size) for name in INTEGER_SCHEMES for size in (32, 128, None)),
        ("w8a8", None),
        ("fp8_dynamic", None),
        ("fp8_block", None),
    ],
)
def test_compensated_rounding_halves_the_error_of_plain_rounding(
    name: str, group_size: int | None, device: str
) -> None:
    """On correlated inputs, with no row left to plain rounding."""
    weight, moment = make_weight(48, 256, seed=6).to(device), make_moment(256, seed=6).to(device)
    scheme, stats = SCHEMES[name], LayerStats(moment, 1 << 16)

    solved = round_compensated(weight, scheme, group_size, torch.bfloat16, stats, NORMAL)
    plain = round_plainly(weight, scheme, group_size, torch.bfloat16)

    def loss(rounding: object) -> float:
        codes, scale, zero_point = rounding.codes, rounding.scale, rounding.zero_point
        found = decode(codes, scale, zero_point, scheme)
        return float(exact_losses(found - weight, moment).sum())

    assert loss(solved) < 0.5 * loss(plain)
    assert solved.damping == 0.01
    assert solved.plain_rows is not None
    assert not bool(solved.plain_rows.any())


def test_an_indefinite_moment_is_reported_as_a_fallback() -> None:
    """The codes are those of plain rounding, and the reason is given."""
    weight = make_weight(4, 32, seed=7)
    stats = LayerStats(torch.diag(torch.tensor([1.0] * 31 + [-9.0])), 1000)
    scheme = SCHEMES["w4a16"]

    solved = round_compensated(weight, scheme, 32, torch.bfloat16, stats, NORMAL)

    assert solved.fallback is not None
    assert solved.fallback.startswith("rtn: ")
    assert torch.equal(solved.codes, quantize(weight, solved.scale, None, scheme))


def test_rows_are_solved_independently_and_repeatably() -> None:
    """Together, alone, or again: the same codes and scales."""
    weight, moment = make_weight(10, 96, seed=8), make_moment(96, seed=8)
    stats, scheme = LayerStats(moment, 4000), SCHEMES["w4a16_asym"]

    together = round_compensated(weight, scheme, 32, torch.bfloat16, stats, NORMAL)
    again = round_compensated(weight, scheme, 32, torch.bfloat16, stats, NORMAL)
    halves = [
        round_compensated(half, scheme, 32, torch.bfloat16, stats, NORMAL)
        for half in weight.split(5)
    ]

    assert torch.equal(together.codes, again.codes)
    assert torch.equal(together.scale, again.scale)
    assert torch.equal(together.codes, torch.cat([half.codes for half in halves]))
    assert torch.equal(together.scale, torch.cat([half.scale for half in halves]))


def test_few_tokens_are_damped_more() -> None:
    """As many tokens as columns: half the mean diagonal instead of a hundredth."""
    moment = make_moment(32, seed=9)

    few = factor_by_activity(LayerStats(moment, 32))
    many = factor_by_activity(LayerStats(moment, 3200))

    assert few is not None
    assert many is not None
    assert few.damping == 0.5
    assert many.damping == 0.01
    assert torch.equal(moment.diagonal()[few.order], moment.diagonal().sort().values)


def test_both_orders_are_damped_alike() -> None:
    """By the tokens there are; only the order of the columns differs."""
    moment = make_moment(32, seed=10)
    for tokens, damping in ((32, 0.5), (3200, 0.01)):
        pivot, activity = (
            factorize(LayerStats(moment, tokens))
            for factorize in (factor_by_pivot, factor_by_activity)
        )

        assert pivot is not None
        assert activity is not None
        assert pivot.damping == activity.damping == damping
        assert not torch.equal(pivot.order, activity.order)


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "fp8_dynamic", "fp8_block"])
def test_every_effort_lowers_the_error_further(name: str) -> None:
    """From one pass to polished codes to several roundings at a time."""
    scheme, stats = SCHEMES[name], LayerStats(make_moment(160, seed=11), 16000)
    weight, group_size = make_weight(32, 160, seed=11), 32 if scheme.grouped else None

    losses = [
        round_compensated(weight, scheme, group_size, torch.bfloat16, stats, effort).losses
        for effort in EFFORTS.values()
    ]

    sums = [float(rows.sum()) for rows in losses if rows is not None]
    assert len(sums) == 3
    assert sums[0] > sums[1] > sums[2]
