"""What the rounding of a layer's input means for its weights: scales, noise, and output errors.

Shapes: O output features, I input features, S sampled tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from quantkit.numerics.activations import round_inputs, scale_from_absmax
from quantkit.numerics.fp8 import LARGEST
from quantkit.records import LayerStats
from quantkit.schemes import Scheme

SHRINKING = tuple(2.0 ** (-step / 4) for step in range(1, 17))
"""Scales to try relative to the one that clips nothing."""

LEAST_GAIN = 0.02
"""Share of the held-out error that clipping has to remove."""

_SAMPLED_ROWS = 128


def choose_input_scale(
    weight: Tensor, stats: LayerStats, scheme: Scheme, scale_dtype: torch.dtype
) -> Tensor:
    """Choose the scale of a static input, one for all layers that share it.

    It is the one that just clips nothing, or a smaller one where half of the sampled tokens
    choose it and the other half confirms that it lowers the output error by at least 2 %. The
    largest value of each channel, which the sample may have missed, counts as a token of its own
    wherever it would be clipped.

    Args:
        weight: float32 [O, I], of all layers that share the input.
        stats: of the input, with its sample and its absmax.
        scheme: with static activations.
        scale_dtype: in which the scale is stored.

    Returns:
        [1] in `scale_dtype`.

    Raises:
        ValueError: the scheme is not static, or the statistics hold no absmax.
    """
    if scheme.activations is None or scheme.activations.dynamic or stats.absmax is None:
        raise ValueError(f"scheme {scheme.name}: a static input and its absmax are needed")
    whole = scale_from_absmax(stats.absmax.amax(), scheme.activations, scale_dtype)
    if stats.sample is None or len(stats.sample) < 2:
        return whole
    rows = weight[:: max(1, len(weight) // _SAMPLED_ROWS)]
    half = len(stats.sample) // 2
    scales = [whole, *((whole.float() * factor).to(scale_dtype) for factor in SHRINKING)]
    scales = [scale for scale in scales if float(scale) > 0]
    losses = [_clipping_loss(rows, stats, scheme, scale, stats.sample[:half]) for scale in scales]
    best = scales[int(torch.tensor(losses).nan_to_num(nan=torch.inf).argmin())]
    before, after = (
        _clipping_loss(rows, stats, scheme, scale, stats.sample[half:]) for scale in (whole, best)
    )
    # False, too, for a loss that is not a number.
    return best if after < (1 - LEAST_GAIN) * before else whole


def _clipping_loss(
    rows: Tensor, stats: LayerStats, scheme: Scheme, scale: Tensor, inputs: Tensor
) -> float:
    """Return the squared output error of a token: mean of `inputs` [S, I], and the extremes'."""
    error = (inputs - round_inputs(inputs, scheme, scale)) @ rows.T
    loss = float(error.double().square().sum()) / len(inputs)
    if stats.absmax is not None:
        largest = 127.0 if scheme.activations and scheme.activations.kind == "int" else LARGEST
        clipped = (stats.absmax - largest * scale.float()).clamp(min=0.0).double()
        columns = rows.double().square().sum(dim=0)
        loss += float(clipped.square() @ columns) / max(stats.tokens, 1)
    return loss


def add_input_noise(stats: LayerStats, scheme: Scheme, scale: Tensor | None) -> LayerStats:
    """Return statistics whose second moment is that of the rounded input.

    Rounding errors of different channels are not correlated, and are small beside the input: the
    diagonal grows by their mean squares, and nothing else changes.

    Args:
        stats: of the input, with its sample; returned as they are without one.
        scale: [1], of a static input; None for a dynamic one.
    """
    if scheme.activations is None or stats.sample is None or not len(stats.sample):
        return stats
    noise = (round_inputs(stats.sample, scheme, scale) - stats.sample).square_().mean(dim=0)
    moment = stats.second_moment.clone()
    moment.diagonal().add_(noise)
    return dataclasses.replace(stats, second_moment=moment)


def shift_of_mean(stats: LayerStats, scheme: Scheme, scale: Tensor | None) -> Tensor:
    """Return float32 [I], by how much rounding moves the mean of the input."""
    if scheme.activations is None or stats.sample is None or not len(stats.sample):
        return torch.zeros_like(stats.second_moment.diagonal())
    return (round_inputs(stats.sample, scheme, scale) - stats.sample).mean(dim=0)


def output_error(
    sample: Tensor, weight: Tensor, decoded: Tensor, scheme: Scheme, scale: Tensor | None
) -> float | None:
    """Return || X W^T - Q(X) V^T ||^2 / || X W^T ||^2 with rounded inputs and weights.

    Args:
        sample: X, float32 [S, I].
        weight: W, float32 [O, I]; decoded: V, what came out of its rounding.
        scale: [1], of a static input; None for a dynamic one.

    Returns:
        None without tokens; nothing to nothing is 0.
    """
    if not len(sample):
        return None
    output = sample @ weight.T
    energy = float(output.double().square().sum())
    output.addmm_(round_inputs(sample, scheme, scale), decoded.T, alpha=-1)
    error = float(output.double().square().sum())
    return error / energy if energy > 0 else float(error > 0)
