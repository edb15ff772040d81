"""Round to nearest under searched scales."""

from __future__ import annotations

import torch

from quantkit.numerics.affine import decode, dequantize, quantize
from quantkit.records import LayerStats
from quantkit.schemes import SCHEMES
from quantkit.solvers.rtn import round_plainly
from quantkit.solvers.search import round_searched
from tests.solvers.cases import NORMAL, exact_losses, make_moment, make_weight


def test_every_code_is_the_nearest_under_the_chosen_scales() -> None:
    """The method chooses scales; the rounding itself is plain."""
    weight, moment = make_weight(16, 64, seed=0), make_moment(64, seed=0)
    scheme = SCHEMES["w4a16_asym"]

    solved = round_searched(weight, scheme, 32, torch.bfloat16, LayerStats(moment, 1000), NORMAL)

    assert torch.equal(solved.codes, quantize(weight, solved.scale, solved.zero_point, scheme))


def test_no_row_is_worse_than_with_plain_rounding() -> None:
    """And all rows together are clearly better."""
    weight, moment = make_weight(64, 128, seed=1), make_moment(128, seed=1)
    scheme = SCHEMES["w4a16"]

    solved = round_searched(weight, scheme, 32, torch.bfloat16, LayerStats(moment, 1000), NORMAL)
    plain = round_plainly(weight, scheme, 32, torch.bfloat16)

    before, after = (
        exact_losses(dequantize(each.codes, each.scale, None) - weight, moment)
        for each in (plain, solved)
    )
    assert bool((after <= before * (1 + 1e-6)).all())
    assert after.sum() < 0.8 * before.sum()


def test_blocks_are_searched_by_the_diagonal_and_kept_only_where_they_are_better() -> None:
    """Nearest codes under the chosen scales; no block of rows loses more than with absmax."""
    weight, moment = make_weight(200, 160, seed=2), make_moment(160, seed=2)
    scheme = SCHEMES["fp8_block"]

    solved = round_searched(weight, scheme, None, torch.bfloat16, LayerStats(moment, 1000), NORMAL)
    plain = round_plainly(weight, scheme, None, torch.bfloat16)

    nearest = quantize(weight, solved.scale, None, scheme)
    assert torch.equal(solved.codes.view(torch.int8), nearest.view(torch.int8))
    before, after = (
        exact_losses(decode(each.codes, each.scale, None, scheme) - weight, moment)
        for each in (plain, solved)
    )
    assert solved.losses is not None
    torch.testing.assert_close(solved.losses, after, rtol=1e-4, atol=0)
    for rows in (slice(0, 128), slice(128, 200)):
        assert after[rows].sum() <= before[rows].sum() * (1 + 1e-6)
    assert after.sum() < before.sum()
