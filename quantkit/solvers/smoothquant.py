"""Smoothing of activations (SmoothQuant, arXiv 2211.10438), kept only where it helps.

A channel that is much larger than the others takes the range of every token that is rounded to
eight bits. Divided by a scale, with the weight multiplied by it, its difficulty moves to the
weight. Here candidates are judged by the real thing, || X W^T - Q(X / s) Q(W s)^T ||^2 on sampled
tokens X: half of them choose, the other half decides whether anything is scaled at all.

Shapes: O output features, I input features, S tokens, R sampled rows, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics.activations import round_inputs, scale_from_absmax
from quantkit.numerics.linalg import Factor
from quantkit.records import LayerStats, LinearPlan
from quantkit.solvers.candidates import (
    FoldChoice,
    centre,
    pool_heads,
    relative,
    rounding_errors,
    sample_rows,
    split_candidates,
)
from quantkit.solvers.gptq import factor_by_activity
from quantkit.solvers.rounding import alike

EXPONENTS = tuple(step / 10 for step in range(3, 10))
WEIGHT_EXPONENTS = (0.0, 0.2, 0.4, 0.6)
LEAST_GAIN = 0.02
"""Share of the held-out error that a scale has to remove to be kept."""

_SAMPLED_ROWS = 128
"""Rows of a group on which the output error is measured."""


def choose_smoothing(
    weights: Sequence[Tensor],
    stats: LayerStats,
    linears: Sequence[LinearPlan],
    scale_dtype: torch.dtype,
    repeat: int = 1,
    head_dim: int = 0,
) -> FoldChoice:
    """Choose the scale per input channel that lowers the error of rounded inputs and weights.

    The candidates are the paper's s = max|x|^a / max|w|^(1 - a) for exponents a from 0.3 to 0.9,
    and s = rms(x)^a / max|w|^b for the same a and b from 0 to 0.6, since a maximum over tokens is
    a wild thing to go by; all divided by sqrt(max s * min s). The error of each token is taken
    relative to its output (plus the mean output), as a few tokens have outputs many times larger
    than all others.

    Args:
        weights: float32 [O_i, I], one for each of `linears`; unquantized ones are not judged.
        stats: of the shared input, with its sample.
        scale_dtype: of the scales of the weights.
        repeat: query heads that share a key/value head, where the fold crosses grouped attention:
            the scale is then equal along them, I being [kv_head, repeat, head_dim] flattened.

    Returns:
        The scale, with the error on the held-out half of the sample as its loss. The identity
        where no candidate lowers that by at least 2 %.
    """
    judged = [index for index, linear in enumerate(linears) if linear.quantized]
    weights = [weights[index] for index in judged]
    linears = [linears[index] for index in judged]
    identity = torch.ones_like(stats.second_moment.diagonal())
    if not judged or stats.sample is None or stats.absmax is None or len(stats.sample) < 2:
        return FoldChoice(identity, None, 0.0, 0.0)
    half = len(stats.sample) // 2
    rms = stats.second_moment.diagonal().sqrt()
    exponents, candidates = _candidates(weights, stats.absmax, rms, repeat, head_dim)
    scales = torch.cat([identity.unsqueeze(0), candidates])
    compensated = any(linear.method.rounder == "gptq" for linear in linears)
    factor = factor_by_activity(stats) if compensated else None
    judge = _Judge(weights, linears, scale_dtype, stats.absmax, factor)
    losses = _losses(judge, stats.sample[:half], scales)
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    before, after = _losses(judge, stats.sample[half:], scales[[0, best]]).tolist()
    # False, too, for a loss that is not a number.
    if after < (1 - LEAST_GAIN) * before:
        return FoldChoice(scales[best], exponents[best - 1], after, before)
    return FoldChoice(identity, None, before, before)


def _candidates(
    weights: Sequence[Tensor], absmax: Tensor, rms: Tensor, repeat: int, head_dim: int
) -> tuple[list[float], Tensor]:
    """Return the exponents and the scales [K, I] of all candidates but the identity."""
    weight = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    if repeat > 1:
        weight, absmax, rms = (
            pool_heads(values, repeat, head_dim, torch.amax) for values in (weight, absmax, rms)
        )
    weight, absmax, rms = relative(weight), relative(absmax), relative(rms)
    exponents: list[float] = []
    scales: list[Tensor] = []
    for exponent in EXPONENTS:
        scales.append(absmax**exponent / weight ** (1 - exponent))
        scales += [rms**exponent / weight**other for other in WEIGHT_EXPONENTS]
        exponents += [exponent] * (len(scales) - len(exponents))
    return exponents, centre(torch.stack(scales))


@dataclass(frozen=True)
class _Judge:
    """What the candidates are judged with.

    absmax: float32 [I], of the unscaled input. factor: of its second moment, where layers are
    rounded with error compensation.
    """

    weights: Sequence[Tensor]
    linears: Sequence[LinearPlan]
    scale_dtype: torch.dtype
    absmax: Tensor
    factor: Factor | None


def _losses(judge: _Judge, inputs: Tensor, scales: Tensor) -> Tensor:
    """Return the error on `inputs` [S, I] for each of the scales [K, I], float64 [K]."""
    total = torch.zeros(len(scales), dtype=torch.float64, device=scales.device)
    for members in alike(judge.linears):
        linear = judge.linears[members[0]]
        rows = sample_rows(judge.weights, members, _SAMPLED_ROWS)
        output = inputs @ rows.T
        energy = output.double().square().sum(dim=1)
        share = 1.0 / (energy + energy.mean()).clamp(min=torch.finfo(torch.float64).tiny)
        losses = []
        for part in split_candidates(scales, rows, linear):
            errors = rounding_errors(rows, linear, judge.scale_dtype, judge.factor, part)
            for scale, error in zip(part, errors, strict=True):
                rounded = _round_scaled(judge, inputs, scale, linear)
                difference = output - rounded @ (rows + error).T
                losses.append(difference.double().square().sum(dim=1) @ share)
        total += torch.stack(losses)
    return total


def _round_scaled(judge: _Judge, inputs: Tensor, scale: Tensor, linear: LinearPlan) -> Tensor:
    """Return the inputs [S, I] rounded after the division by `scale`, multiplied by it again."""
    activations, static = linear.scheme.activations, None
    if activations is not None and not activations.dynamic:
        largest = (judge.absmax / scale).amax()
        static = scale_from_absmax(largest, activations, judge.scale_dtype)
    return round_inputs(inputs / scale, linear.scheme, static) * scale
