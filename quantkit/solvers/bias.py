"""Bias correction (arXiv 1906.04721): a bias takes up the mean of its layer's output error."""

from __future__ import annotations

from torch import Tensor


def correct_bias(
    bias: Tensor, weight: Tensor, decoded: Tensor, mean: Tensor, rounded_mean: Tensor
) -> Tensor:
    """Return the bias plus W E[x] - V E[Q(x)], rounded to its dtype.

    The mean error that is left is never larger than without: the bias was representable, so the
    rounded sum is at least as near as it was.

    Args:
        bias: [O], in the checkpoint's dtype.
        weight: W, float32 [O, I]; decoded: V, what came out of its rounding.
        mean: E[x], float32 [I]; rounded_mean: E[Q(x)], the same where inputs stay in 16 bits.
    """
    shift = weight @ mean - decoded @ rounded_mean
    return (bias.float() + shift).to(bias.dtype)
