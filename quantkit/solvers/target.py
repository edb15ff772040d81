"""What a layer is rounded to, where its input is no longer the original's.

The layers before it are quantized, so a token brings x in the place of y. The layer should answer
x as the original W answers y: the target is the least-squares fit of W y by a map of x,
W + W D (H + damping)^-1 with the second moment H = mean x x^T and the drift D = mean (y - x) x^T.
Rounding then makes up for what was lost before (GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629;
Qronos, arXiv 2505.11695: their updates are this target followed by GPTQ).

The fit has I unknowns a row. On a trained Llama the whole of it lowered the divergence from about
ten tokens a channel on, and half of it from three on, so it is taken by T / (T + 8 I) for T tokens.
It is taken at all only if the same fit to the other tokens answers held-out ones better.
Shapes: O output features, I input features, S sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.numerics.linalg import factor_moment, sampling_ridge
from quantkit.records import LayerStats

_TOKENS_A_CHANNEL = 8
"""With so many, half of the drift is followed."""

_HELD_OUT = 4
"""One token in so many is held out at the most."""

_LEAST_GAIN = 0.005
"""Part of the squared error of held-out outputs that has to go."""


def follow_drift(weights: Sequence[Tensor], stats: LayerStats) -> list[Tensor] | None:
    """Return the targets float32 [O_i, I] of layers that share an input.

    They are None, so that the weights stay as they are, where the drift is not known, where it is
    nothing, where the second moment cannot be factorized, and where held-out tokens of the sample
    are not answered better by at least 0.5 % of the squared error.

    Args:
        weights: float32 [O_i, I].
        stats: of the input.
    """
    moment, drift = stats.second_moment, stats.drift
    if drift is None or not _helps_held_out(weights, stats, drift):
        return None
    response = _fit_response(moment, drift, stats.tokens)
    if response is None:
        return None
    targets = [torch.addmm(weight, weight, response) for weight in weights]
    return targets if all(bool(target.isfinite().all()) for target in targets) else None


def _fit_response(moment: Tensor, drift: Tensor, tokens: int) -> Tensor | None:
    """Return the share of D (H + damping)^-1 to follow, [I, I]; None where H is not definite."""
    size = len(moment)
    order = torch.arange(size, device=moment.device)
    factor = factor_moment(moment, order, sampling_ridge(tokens, size))
    if factor is None:
        return None
    mean = float(moment.diagonal().double().mean())
    share = tokens / (tokens + _TOKENS_A_CHANNEL * size)
    return torch.cholesky_solve(drift.double().T / mean, factor.lower).T.mul_(share).float()


def _helps_held_out(weights: Sequence[Tensor], stats: LayerStats, drift: Tensor) -> bool:
    """Whether tokens of the sample are answered better by the fit to all other tokens.

    The statistics are means over tokens that count alike, so that those of the others follow.
    """
    if stats.sample is None or stats.drift_sample is None or not len(stats.sample):
        return False
    step = max(1, math.ceil(_HELD_OUT * len(stats.sample) / stats.tokens))
    inputs, moved = stats.sample[::step], stats.drift_sample[::step]
    left = stats.tokens - len(inputs)
    if left <= 0:
        return False
    scale = stats.tokens / left
    moment = torch.addmm(stats.second_moment, inputs.T, inputs, beta=scale, alpha=-1 / left)
    others = torch.addmm(drift, moved.T, inputs, beta=scale, alpha=-1 / left)
    response = _fit_response(moment, others, left)
    if response is None:
        return False
    after = moved - inputs @ response.T
    lost, kept = (sum(_energy(weight, rows) for weight in weights) for rows in (moved, after))
    return kept < (1 - _LEAST_GAIN) * lost


def _energy(weight: Tensor, rows: Tensor) -> float:
    """Return the squared norm of rows @ weight^T."""
    return float((rows @ weight.T).double().square().sum())
