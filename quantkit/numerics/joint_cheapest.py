"""The cheapest of many scales for a group of each row by e H e^T + 2 e l, by compiled loops.

Torch passes over the weights some seven times for every scale, one of which is a product with all
of H. Loops that numba compiles, if it is installed, keep some rows at hand while all scales are
tried on them, and use H's symmetry. Their sums have another order than torch's, so that of two
scales whose costs differ by less than about 1e-6 of them either may be chosen.

Shapes: R rows, G groups of g columns, C candidates.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from quantkit.numerics.affine import code_range, relative_steps
from quantkit.numerics.scale_candidates import Candidates, Choice, Part
from quantkit.numerics.threads import share_out
from quantkit.schemes import Scheme

_FEWEST_WEIGHTS = 1 << 16
"""Fewer are searched before numba is imported."""

_WIDEST = 512
"""Columns of a group: its factors and the errors of some rows are to stay in a core's cache."""

_PRODUCTS_A_THREAD = 1 << 23
"""So few take about as long as waking a thread."""


def suits_loops(scheme: Scheme, size: int) -> bool:
    """Whether the loops are for the codes of a scheme in groups of so many columns."""
    return scheme.weight_kind == "int" and size <= _WIDEST


def chooses_jointly(weight: Tensor, scheme: Scheme, size: int) -> bool:
    """Whether `cheapest_jointly` can search a weight [O, I] in groups of so many columns."""
    if weight.device.type != "cpu" or not suits_loops(scheme, size):
        return False
    if weight.numel() < _FEWEST_WEIGHTS or find_spec("numba") is None:
        return False
    from quantkit.numerics.joint_cheapest_compiled import ROWS

    return size % ROWS == 0


def cheapest_jointly(
    part: Part,
    group: int,
    candidates: Candidates,
    block: Tensor,
    linear: Tensor,
    errors: Tensor,
) -> Choice:
    """Choose the scale of one group of each row, [R, 1].

    Args:
        part: all groups of integer codes on a processor; contiguous.
        candidates: [C, R, 1], for the group.
        block: H of the group, float32 [g, g], symmetric.
        linear: l, float32 [R, g].
        errors: float32 [R, G g], contiguous; receives those of the group under the new scale.
    """
    from quantkit.numerics.joint_cheapest_compiled import LANES, choose_jointly

    rows, _, size = part.grouped.shape
    steps = relative_steps(candidates.scales, part.unit).flatten(1)
    zero_points = candidates.zero_points
    offsets = torch.zeros_like(steps) if zero_points is None else zero_points.float().flatten(1)
    channel = errors[:0] if part.channel is None else part.channel.flatten(1)
    found = torch.empty(rows, 1, dtype=torch.int64)
    costs = torch.empty(2, rows)
    choose = partial(
        choose_jointly,
        part.grouped.flatten(1).numpy(),
        channel.numpy(),
        group * size,
        steps.numpy(),
        offsets.numpy(),
        *code_range(part.scheme.weight_bits),
        _pack_factors(block).numpy(),
        linear.numpy(),
        errors.numpy(),
        found.numpy(),
        costs.numpy(),
    )
    products = steps.numel() * size * size
    share_out(choose, -(-rows // LANES), products // _PRODUCTS_A_THREAD)
    first, best = costs.unsqueeze(2)
    return Choice(found, first, best)


def _pack_factors(block: Tensor) -> Tensor:
    """Return what e is multiplied by, [g / r, g, r]: for r columns of H at a time their rows.

    What is above the r columns' own rows counts twice, and the mirror image of that is not used.
    """
    from quantkit.numerics.joint_cheapest_compiled import ROWS

    size = len(block)
    own = torch.arange(size) // ROWS
    counted = torch.where(own < torch.arange(size // ROWS).unsqueeze(1), 2.0, 1.0)
    return block.unflatten(1, (-1, ROWS)).transpose(0, 1).contiguous() * counted.unsqueeze(2)
