"""What a layer is rounded to, where its input is no longer the original's.

The layers before it are quantized, so a token brings x in the place of y. The layer should answer
x as the original W answers y: the target is the least-squares fit of W y by a map of x,
W + W D (H + damping)^-1 with the second moment H = mean x x^T and the drift D = mean (y - x) x^T.
Rounding then makes up for what was lost before (GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629;
Qronos, arXiv 2505.11695: their updates are this target followed by GPTQ).

The fit has I unknowns a row. On a trained Llama the whole of it lowered the divergence from about
ten tokens a channel on, and half of it from three on, so it is taken by T / (T + 8 I) for T tokens.
Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.numerics.linalg import factor_moment, sampling_ridge
from quantkit.records import LayerStats

_TOKENS_A_CHANNEL = 8
"""With so many, half of the drift is followed."""


def follow_drift(weights: Sequence[Tensor], stats: LayerStats) -> list[Tensor]:
    """Return the targets float32 [O_i, I] of layers that share an input.

    They are the weights themselves where the drift is not known or the second moment cannot be
    factorized.

    Args:
        weights: float32 [O_i, I].
        stats: of the input.
    """
    moment, drift = stats.second_moment, stats.drift
    if drift is None:
        return list(weights)
    size = len(moment)
    order = torch.arange(size, device=moment.device)
    factor = factor_moment(moment, order, sampling_ridge(stats.tokens, size))
    if factor is None:
        return list(weights)
    mean = float(moment.diagonal().double().mean())
    share = stats.tokens / (stats.tokens + _TOKENS_A_CHANNEL * size)
    response = torch.cholesky_solve(drift.double().T / mean, factor.lower).T.mul_(share).float()
    targets = [torch.addmm(weight, weight, response) for weight in weights]
    return [
        target if bool(target.isfinite().all()) else weight
        for weight, target in zip(weights, targets, strict=True)
    ]
