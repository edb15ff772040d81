"""Scales of a key/value cache: they cover what was seen, and none is missing, zero or one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit.numerics.octaves import POSITIONS, measure_positions, place_scale
from quantkit.records import KvStats
from quantkit.solvers import choose_kv_scales, divide_values
from quantkit.solvers.kvscale import HEADROOM

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_stats(*heads: float, errors: Tensor | None = None) -> KvStats:
    """Heads of four channels with these largest magnitudes, for K and half of them for V."""
    shape = torch.tensor([[0.5, 1.0, 0.25, 0.0]])
    key = torch.tensor(heads).reshape(-1, 1) * shape
    return KvStats(key, key / 2, 100, errors)


def choose(stats: KvStats, *, per_head: bool, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The scales of K and of V."""
    scales, record = choose_kv_scales("attn", stats, per_head=per_head, scale_dtype=dtype)
    assert list(scales) == ["attn.k_scale", "attn.v_scale"]
    key, value = scales.values()
    assert record.name == "attn"
    assert (record.key_scale, record.value_scale) == (
        tuple(key.flatten().tolist()),
        tuple(value.flatten().tolist()),
    )
    return [key, value]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtype_are_those_that_readers_take(dtype: torch.dtype) -> None:
    """[1] for a layer, [kv_heads, 1, 1] for its heads."""
    stats = make_stats(3.0, 5.0)
    for per_head, shape in ((False, (1,)), (True, (2, 1, 1))):
        for scale in choose(stats, per_head=per_head, dtype=dtype):
            assert scale.shape == shape
            assert scale.dtype == dtype


@given(
    heads=st.lists(st.floats(2**-20, 2**20, width=32), min_size=1, max_size=4),
    per_head=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    position=st.integers(0, 7),
)
def test_no_value_that_was_seen_is_clipped(
    heads: list[float], per_head: bool, dtype: torch.dtype, position: int
) -> None:
    """Whatever the dtype rounds, and at every position of the octave."""
    errors = torch.ones(8, len(heads), dtype=torch.float64)
    errors[position] = 0
    stats = make_stats(*heads, errors=errors)

    key, value = choose(stats, per_head=per_head, dtype=dtype)

    limits = torch.finfo(dtype)
    for scale, seen in ((key, stats.key_absmax), (value, stats.value_absmax)):
        largest = seen.amax(dim=1) if per_head else seen.amax().reshape(1)
        stored = scale.flatten().float()
        assert bool((largest / stored <= 448).all())
        assert bool((stored.isfinite() & (stored >= limits.smallest_normal)).all())
        assert not bool((stored == 1).any())
        # Not much larger than needed either.
        assert bool((stored <= (largest * HEADROOM / 448 * 2.02).clamp(min=6.2e-5)).all())


def test_a_layer_has_the_scale_of_its_largest_head() -> None:
    """And a head has its own."""
    stats = make_stats(3.0, 300.0, 30.0)
    layer = choose(stats, per_head=False)[0].item()
    heads = choose(stats, per_head=True)[0].flatten().tolist()

    assert layer == heads[1] == pytest.approx(300 * HEADROOM / 448, rel=2**-8)
    assert heads[0] == pytest.approx(3 * HEADROOM / 448, rel=2**-8)


def test_heads_that_calibration_never_moved_have_a_sane_scale() -> None:
    """That of the layer; of a dead layer, as if its values reached 1."""
    heads = choose(make_stats(0.0, 4.0), per_head=True)[0].flatten().tolist()
    assert heads[0] == heads[1] > 0
    for per_head in (False, True):
        dead = choose(make_stats(0.0, 0.0), per_head=per_head)[0]
        assert dead.flatten()[0].item() == pytest.approx(HEADROOM / 448, rel=2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_is_never_exactly_one(dtype: torch.dtype) -> None:
    """It would look like the one that a server assumes where none is stored."""
    scale = choose(make_stats(448 / HEADROOM), per_head=False, dtype=dtype)[0]
    assert 1 < scale.item() < 1.01


def test_keys_take_the_position_at_which_they_are_rounded_best() -> None:
    """Keys that hardly change from token to token, against trying all positions."""
    generator = torch.Generator().manual_seed(0)
    keys = 21.0 + 0.3 * torch.randn(1, 1, 500, 4, generator=generator)
    largest = keys.amax(dim=(0, 2))

    def error(scale: Tensor) -> float:
        rounded = (keys / scale).to(torch.float8_e4m3fn).float() * scale
        return float((rounded - keys).square().mean())

    stats = KvStats(largest, largest, 500, measure_positions(keys))
    searched = choose(stats, per_head=False, dtype=torch.float32)[0]
    plain = choose(KvStats(largest, largest, 500), per_head=False, dtype=torch.float32)[0]

    lowest = (largest.amax() * HEADROOM / 448).reshape(1)
    tried = [error(place_scale(lowest, torch.tensor([position]))) for position in range(POSITIONS)]
    assert error(searched) == pytest.approx(min(tried), rel=1e-3)
    assert error(searched) < 0.5 * error(plain)


def test_values_are_divided_by_what_was_folded_into_them() -> None:
    """Channel by channel; the keys stay."""
    stats = make_stats(2.0, 8.0)
    fold = torch.tensor([1.0, 2.0, 4.0, 8.0, 1.0, 0.5, 1.0, 1.0])

    divided = divide_values(stats, fold)

    assert torch.equal(divided.key_absmax, stats.key_absmax)
    assert torch.equal(divided.value_absmax, stats.value_absmax / fold.reshape(2, 4))
