"""The position of a scale within an octave, against torch's own cast."""

from __future__ import annotations

import torch

from quantkit.numerics.octaves import (
    POSITIONS,
    measure_positions,
    place_scale,
    round_significand,
)


def cast(values: torch.Tensor) -> torch.Tensor:
    """To FP8 and back, as torch does it."""
    return values.to(torch.float8_e4m3fn).float()


def test_rounding_is_that_of_the_cast_in_its_normal_range() -> None:
    """Ties included: every float16 between the smallest normal value and the largest."""
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16).float()
    values = values[values.isfinite() & (values.abs() >= 2**-6) & (values.abs() <= 448)]

    assert len(values) > 30000
    torch.testing.assert_close(round_significand(values), cast(values), rtol=0, atol=0)
    assert torch.equal(round_significand(torch.tensor([0.0, -0.0])), torch.zeros(2))


def test_positions_are_measured_as_the_cast_would_round() -> None:
    """Each position against a cast with such a scale."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 5, 8, generator=generator) + 3.0

    found = measure_positions(values)

    assert found.shape == (POSITIONS, 3)
    for position in range(POSITIONS):
        scale = 2.0 ** (position / POSITIONS - 4)
        error = (cast(values / scale) * scale - values).double()
        expected = error.square().sum(dim=(0, 2, 3))
        torch.testing.assert_close(found[position], expected, rtol=1e-3, atol=1e-6)


def test_a_placed_scale_is_the_first_at_its_position() -> None:
    """Not below the lowest that is allowed, and less than an octave above."""
    lowest = torch.logspace(-5, 3, 200, dtype=torch.float64)
    for position in range(POSITIONS):
        scale = place_scale(lowest, torch.full_like(lowest, position, dtype=torch.int64))
        assert bool(((scale >= lowest * (1 - 1e-12)) & (scale < 2 * lowest)).all())
        octaves = torch.log2(scale) - position / POSITIONS
        torch.testing.assert_close(octaves, octaves.round(), rtol=0, atol=1e-9)
