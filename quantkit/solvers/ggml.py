"""Choose codes and scales of ggml's block types under the second moment of a layer's input.

A file in one of these types decodes in any llama.cpp, whatever chose its codes. Here they are
chosen as for the other formats:

1. scales and minimums are searched (`solvers/ggml_scales.py`),
2. under these the columns are rounded one by one, later ones making up for earlier ones
   (`solvers/gptq.py`): a minimum is a shift of the weights, and a scale may be negative,
3. codes and scales are polished (`solvers/ggml_refit.py`),
4. where the layer's Fisher matrix is known, rows make up for each other
   (`solvers/ggml_coupled.py`).

No row ends with a higher e H e^T than llama.cpp's own encoding of it with the importance matrix of
the same tokens, which is the diagonal of H; under the Fisher matrix no panel of rows does by that
objective. Without any second moment the scales are searched for the least squared error.

Memory beyond weight and H, with W and H for the bytes of either in float32: the factor 1 H, the
codes of two encodings 1/2 W, and 3 W at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.affine import row_units
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.codec import encode
from quantkit.numerics.linalg import Factor, row_losses, sampling_ridge
from quantkit.records import LayerStats
from quantkit.schemes import Effort
from quantkit.solvers.ggml_coupled import PLAIN, STARTED, couple_blocks
from quantkit.solvers.ggml_refit import polish_blocks
from quantkit.solvers.ggml_rows import choose_rows, values_to_codes
from quantkit.solvers.ggml_scales import search_blocks
from quantkit.solvers.gptq import compensate, curvature, factor_by_pivot

_OWN = "llama.cpp's encoding"


@dataclass(frozen=True)
class GgmlSolution:
    """One layer in a block type.

    loss: tr(E H E^T), and plain_loss that of llama.cpp's own encoding with the importance matrix
    diag(H); None where there was no second moment. damping: fraction of mean(diag H) that was added
    before the factorization, or None. fallback: why rows got llama.cpp's encoding where more was
    asked for, or None. plain_rows: bool [O], which rows did because the method was not better
    there; None where that was not compared.
    """

    blocks: GgmlBlocks
    loss: float | None = None
    plain_loss: float | None = None
    damping: float | None = None
    fallback: str | None = None
    plain_rows: Tensor | None = None


def solve_ggml(
    weight: Tensor,
    kind: GgmlType,
    stats: LayerStats | None,
    effort: Effort,
    fisher: Tensor | None = None,
) -> GgmlSolution:
    """Choose the blocks of one layer, see `solve_ggml_group`."""
    return solve_ggml_group([weight], [kind], stats, effort, [fisher])[0]


def solve_ggml_group(
    weights: Sequence[Tensor],
    kinds: Sequence[GgmlType],
    stats: LayerStats | None,
    effort: Effort,
    fishers: Sequence[Tensor | None],
) -> tuple[GgmlSolution, ...]:
    """Choose the blocks of layers that share an input, whose second moment is factorized once.

    Args:
        weights: float32 [O_i, I], finite; kinds: one for each.
        stats: of the input, or None, which leaves the weights alone to go by.
        effort: `fast` is llama.cpp's own algorithm.
        fishers: float32 [O_i, B_i], see `solvers/coupled.py`, or None.

    Raises:
        ValueError: a type has no codes, the columns are not whole blocks of it, a number is not
            finite, or float16 cannot hold a scale.
    """
    layers = list(zip(weights, kinds, fishers, strict=True))
    if stats is None:
        return tuple(_solve_alone(weight, kind, effort) for weight, kind, _ in layers)
    if effort.polish_sweeps == 0:
        return tuple(_as_plain(weight, kind, stats, None) for weight, kind, _ in layers)
    factor = factor_by_pivot(stats) if stats.tokens else None
    if factor is None:
        reason = "the second moment could not be factorized under any damping"
        if not stats.tokens:
            reason = "no calibration token reached the layer"
        return tuple(_as_plain(weight, kind, stats, reason) for weight, kind, _ in layers)
    return tuple(
        _solve(weight, kind, stats, effort, factor, fisher) for weight, kind, fisher in layers
    )


def _solve_alone(weight: Tensor, kind: GgmlType, effort: Effort) -> GgmlSolution:
    """Go by the squared errors of the weights, where no input is known."""
    plain = encode(kind, weight, None)
    if effort.polish_sweeps == 0:
        return GgmlSolution(plain)
    searched = search_blocks(weight, kind, torch.ones_like(weight[0]))
    unit = row_units(weight)
    mine, theirs = (
        torch.sum(blocks.dequantize().sub_(weight).div_(unit).square_(), 1, dtype=torch.float64)
        for blocks in (searched, plain)
    )
    return GgmlSolution(choose_rows(mine < theirs, searched, plain))


def _as_plain(
    weight: Tensor, kind: GgmlType, stats: LayerStats, reason: str | None
) -> GgmlSolution:
    """Return llama.cpp's own encoding with the importance matrix."""
    blocks = _encode(weight, kind, stats)
    loss = float(_measure(weight, blocks, stats.second_moment).sum())
    return GgmlSolution(blocks, loss, loss, fallback=reason and f"{_OWN}: {reason}")


def _solve(
    weight: Tensor,
    kind: GgmlType,
    stats: LayerStats,
    effort: Effort,
    factor: Factor,
    fisher: Tensor | None,
) -> GgmlSolution:
    moment, ridge = stats.second_moment, sampling_ridge(stats.tokens, weight.shape[1])
    plain = _encode(weight, kind, stats)
    plain_losses = _measure(weight, plain, moment)
    # Under the Fisher matrix only the scales are of use later.
    width = effort.beam_width if fisher is None else 1
    blocks = round_codes(weight, search_blocks(weight, kind, curvature(factor)), factor, width)
    blocks = polish_blocks(weight, blocks, moment, ridge, effort.polish_sweeps)
    # Written so that a loss that is not a number counts as worse.
    worse = ~(_measure(weight, blocks, moment) <= plain_losses)
    blocks = choose_rows(worse, plain, blocks)
    if fisher is not None:
        blocks, chosen = couple_blocks(
            weight, (blocks, plain), factor, moment, ridge, fisher, effort.polish_sweeps
        )
        worse = (worse & (chosen == STARTED)) | (chosen == PLAIN)
    return GgmlSolution(
        blocks,
        loss=float(_measure(weight, blocks, moment).sum()),
        plain_loss=float(plain_losses.sum()),
        damping=factor.damping,
        fallback=explain_plain_rows(worse),
        plain_rows=worse,
    )


def _encode(weight: Tensor, kind: GgmlType, stats: LayerStats) -> GgmlBlocks:
    """Return llama.cpp's own encoding with the importance matrix, if it tells anything."""
    importance = stats.second_moment.diagonal().contiguous()
    return encode(kind, weight, importance if bool(importance.amax() > 0) else None)


def explain_plain_rows(worse: Tensor) -> str | None:
    """Say of how many rows, bool [O], the method was not better."""
    count = int(worse.sum())
    if not count:
        return None
    return f"{_OWN}: {count} of {len(worse)} rows, where the method was not better"


def round_codes(weight: Tensor, blocks: GgmlBlocks, factor: Factor, width: int) -> GgmlBlocks:
    """Round the columns one by one under the scales of `blocks`."""
    kind, minimums = blocks.type, blocks.minimums()
    shifted = weight
    if minimums is not None:
        shifted = weight - minimums.repeat_interleave(kind.sub_block, 1)
    values = compensate(shifted, blocks.scales(), None, kind, factor, width=width)
    return replace(blocks, codes=values_to_codes(values, kind))


def _measure(weight: Tensor, blocks: GgmlBlocks, second_moment: Tensor) -> Tensor:
    """Return e H e^T of each row, float64 [O]."""
    unit = row_units(weight)
    error = blocks.dequantize().sub_(weight).div_(unit)
    return row_losses(error, second_moment) * unit.squeeze(1).double().square()
