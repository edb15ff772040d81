"""What is known of a layer's input, accumulated batch by batch: its second moment first of all.

Sums are kept in float32 and divided by the token count once at the end. Beside the second moment
there are the mean, the largest magnitude of each channel, and a few of the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics import kernels
from quantkit.numerics.precision import quick_products
from quantkit.numerics.products import (
    PackedRows,
    add_product,
    pack_and_measure,
    pack_rows,
    sums_products,
)
from quantkit.records import LayerStats

SAMPLED_TOKENS = 1024
"""Tokens that a sample has at the most; with enough data it has at least a third of them."""

PANEL = 512
"""Width of the panels of the sum: what lies below the diagonal follows by symmetry."""

_GOLDEN = (5**0.5 - 1) / 2


@dataclass
class Sample:
    """Tokens chosen evenly from a stream whose length is not known beforehand.

    Token number i is in the sample if the fractional part of i times the golden ratio, its phase,
    is below `share`. Such tokens are spread evenly, and over the positions of windows of any
    length as well, which every k-th token is not. The share is halved whenever the sample is full,
    and 0 where none is wanted.

    rows: [S, I] in the dtype of the activations; None before the first token. moved: what the same
    tokens have in the original model, less what they have here; None where that is not followed.
    phases: float64 [S]. seen: tokens of the stream so far. room, moved_room: [R, I], of which
    `rows` and `moved` are the beginning, so that not all is copied for a few more.
    """

    rows: Tensor | None
    moved: Tensor | None
    phases: Tensor
    share: float
    seen: int
    room: Tensor | None = None
    moved_room: Tensor | None = None


@dataclass
class Moment:
    """Running sums over tokens.

    total: float32 [I, I], the sum of x x^T. first: float32 [I], the sum of x. absmax: float32 [I].
    drift: float32 [I, I], the sum of (y - x) x^T, y being the original model's; None before the
    first token, and where the original is not followed. bfloat16: whether no activation of another
    dtype was added. buffer: int32, for activations on their way into a product; fresh memory for
    each batch takes longer than to copy them. compiled: whether bfloat16 is summed by `products`.
    """

    total: Tensor
    first: Tensor
    absmax: Tensor
    sample: Sample
    weight: float
    tokens: int
    drift: Tensor | None = None
    bfloat16: bool = True
    buffer: Tensor | None = None
    compiled: bool = False


def empty_moment(features: int, device: torch.device, *, sampled: bool = True) -> Moment:
    """Return sums over no tokens.

    Args:
        sampled: whether some of the tokens themselves are kept.
    """
    return Moment(
        total=torch.zeros(features, features, dtype=torch.float32, device=device),
        first=torch.zeros(features, dtype=torch.float32, device=device),
        absmax=torch.zeros(features, dtype=torch.float32, device=device),
        sample=Sample(None, None, torch.empty(0, dtype=torch.float64), float(sampled), 0),
        weight=0.0,
        tokens=0,
        compiled=sums_products(device),
    )


def accumulate(
    moment: Moment, inputs: Tensor, weights: Tensor | None, original: Tensor | None = None
) -> None:
    """Add the tokens of `inputs` [..., I]; of the second moment the upper triangle alone.

    Args:
        moment: changed in place.
        inputs: activations in any floating dtype.
        weights: float32 weights of the tokens, shaped as `inputs` without its last axis; None
            where every token counts once. A token of weight 0 leaves no trace.
        original: what the same tokens bring in the original model, shaped as `inputs`.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    moved = None if original is None else original.reshape(rows.shape) - rows
    if weights is not None:
        weights = weights.reshape(-1)
        counted = weights > 0
        if not bool(counted.all()):
            rows, weights = rows[counted], weights[counted]
            moved = None if moved is None else moved[counted]
        if bool((weights == 1).all()):
            weights = None
    if not len(rows):
        return
    left = None if moved is None else _weighted(moved, weights)
    packed = _add_products(moment, _weighted(rows, weights), left)
    if packed is None or weights is not None:
        _add_features(moment, rows, weights)
    else:
        moment.first += packed.sums
        torch.maximum(moment.absmax, packed.largest, out=moment.absmax)
    _draw(moment.sample, rows, moved)
    moment.weight += len(rows) if weights is None else float(weights.sum())
    moment.tokens += len(rows)
    moment.bfloat16 &= rows.dtype == torch.bfloat16


def _add_products(moment: Moment, rows: Tensor, moved: Tensor | None) -> PackedRows | None:
    """Add the second moment of rows [T, I], and what they have in common with `moved` [T, I].

    Returns:
        The rows packed, where they were; good until the next batch.
    """
    short = rows.dtype == torch.bfloat16 and (moved is None or moved.dtype == torch.bfloat16)
    if short and moment.compiled:
        found = pack_and_measure(rows, moment.buffer)
        if moment.buffer is None or found.packed.numel() > moment.buffer.numel():
            moment.buffer = found.packed.view(-1)
        add_product(moment.total, found.packed, found.packed, upper=True)
        if moved is not None:
            add_product(_begin_drift(moment), pack_rows(moved), found.packed)
        return found
    factors = _widen(moment, rows)
    _add_square(moment.total, rows, factors)
    if moved is not None:
        _add_product(_begin_drift(moment), moved.to(factors.dtype).T, factors, rows.dtype)
    return None


def _begin_drift(moment: Moment) -> Tensor:
    """Return the sum of the drift, which the first batch makes."""
    if moment.drift is None:
        moment.drift = torch.zeros_like(moment.total)
    return moment.drift


def _add_features(moment: Moment, rows: Tensor, weights: Tensor | None) -> None:
    """Add what the features of rows [T, I] come to each, and look how large they are."""
    if weights is None:
        moment.first += rows.sum(0, dtype=torch.float32)
    else:
        moment.first += weights.to(torch.float32) @ rows.to(torch.float32)
    for extreme in (rows.amax(0), -rows.amin(0)):
        torch.maximum(moment.absmax, extreme.float(), out=moment.absmax)


def _widen(moment: Moment, rows: Tensor) -> Tensor:
    """Return rows [T, I] in a dtype whose products can be summed in float32.

    On a CPU they are good until the next batch.
    """
    if rows.is_cuda or rows.dtype == torch.float32:
        return rows
    if moment.buffer is None or moment.buffer.numel() < rows.numel():
        moment.buffer = torch.empty(rows.numel(), dtype=torch.int32)
    return moment.buffer[: rows.numel()].view(torch.float32).view(rows.shape).copy_(rows)


def _add_square(total: Tensor, rows: Tensor, factors: Tensor) -> None:
    """Add rows^T rows to the upper triangle of `total`; `factors` are the widened rows."""
    if rows.dtype in kernels.SQUARED and kernels.kernels_available(total.device):
        kernels.add_square(total, rows, PANEL)
        return
    for start in range(0, rows.shape[1], PANEL):
        left = factors[:, start : start + PANEL].T
        _add_product(total[start : start + PANEL, start:], left, factors[:, start:], rows.dtype)


def filled_panels(total: Tensor) -> Iterator[Tensor]:
    """Yield views of all that `accumulate` adds to of a sum and `finish` reads, in order."""
    for start in range(0, len(total), PANEL):
        yield total[start : start + PANEL, start:]


def _add_product(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Add left @ right to `total`, summed in float32.

    Args:
        dtype: of the activations. What bfloat16 holds is exact as a factor of a quick product.
    """
    if left.dtype == torch.float32:
        with quick_products(dtype == torch.bfloat16):
            total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return rows
    return rows * weights.reshape(-1, 1).sqrt().to(rows.dtype)


def _draw(sample: Sample, rows: Tensor, moved: Tensor | None) -> None:
    """Let the sample have its share of the next tokens [T, I] of the stream."""
    if not sample.share:
        return
    numbers = torch.arange(sample.seen, sample.seen + len(rows), dtype=torch.float64)
    sample.seen += len(rows)
    phases = numbers.mul_(_GOLDEN).frac_()
    chosen = _find_below(phases, sample.share)
    while len(sample.phases) + len(chosen) > SAMPLED_TOKENS:
        _halve(sample)
        chosen = _find_below(phases, sample.share)
    sample.phases = torch.cat([sample.phases, phases[chosen]])
    chosen = chosen.to(rows.device)
    sample.rows, sample.room = _append(sample.rows, sample.room, rows, chosen)
    if moved is not None:
        sample.moved, sample.moved_room = _append(sample.moved, sample.moved_room, moved, chosen)


def _find_below(phases: Tensor, share: float) -> Tensor:
    """Return the indices of phases below a share: a few of them are sooner used than a mask."""
    return (phases < share).nonzero().squeeze(1)


def _halve(sample: Sample) -> None:
    """Halve the share of the stream, and let go of the tokens that are not in it any more."""
    sample.share /= 2
    kept = _find_below(sample.phases, sample.share)
    sample.phases = sample.phases[kept]
    if sample.rows is not None:
        sample.rows = _keep(sample.rows, kept.to(sample.rows.device))
    if sample.moved is not None:
        sample.moved = _keep(sample.moved, kept.to(sample.moved.device))


def _keep(sampled: Tensor, kept: Tensor) -> Tensor:
    """Move the kept ones of sampled rows to their beginning, which is returned."""
    beginning = sampled[: len(kept)]
    return beginning.copy_(sampled[kept])


def _append(
    sampled: Tensor | None, room: Tensor | None, rows: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `sampled` with some of the rows behind it, and the room where both lie.

    Args:
        sampled: the beginning of `room`, if there is one; it is replaced where it is too small.
        chosen: indices. Rows are copied, so that they do not keep the batch alive.
    """
    known = 0 if sampled is None else len(sampled)
    needed, dtype = known + len(chosen), rows.dtype
    if sampled is not None:
        dtype = torch.promote_types(sampled.dtype, dtype)
    if room is None or room.dtype != dtype or len(room) < needed:
        room = rows.new_empty(min(2 * needed, SAMPLED_TOKENS), rows.shape[1], dtype=dtype)
        if sampled is not None:
            room[:known] = sampled
    torch.index_select(rows.to(dtype), 0, chosen, out=room[known:needed])
    return room[:needed], room


def finish(moment: Moment) -> LayerStats:
    """Return the statistics of all tokens; `moment` is used up.

    A sum that is not finite stays so: the caller names the layer in its error.
    """
    weight = max(moment.weight, 1.0)
    moment.total /= weight
    for start in range(0, len(moment.total), PANEL):
        stop = start + PANEL
        moment.total[stop:, start:stop] = moment.total[start:stop, stop:].T
        square = moment.total[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
    none = torch.empty(0, len(moment.total))
    rows, moved = moment.sample.rows, moment.sample.moved
    return LayerStats(
        second_moment=moment.total,
        tokens=moment.tokens,
        mean=moment.first / weight,
        absmax=moment.absmax,
        sample=none if rows is None else rows.float(),
        drift=None if moment.drift is None else moment.drift.div_(weight),
        drift_sample=None if moved is None else moved.float(),
        bfloat16=moment.bfloat16 and moment.tokens > 0,
    )
