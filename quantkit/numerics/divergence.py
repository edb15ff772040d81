"""How far one model's next-token distributions are from another's (docs/gate.md, "Metrics").

Letters of shapes: T positions, V entries of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this log-ratio a term of the divergence is taken from its series: there the closed form
# loses its digits to cancellation, while two terms of the series are exact to 1e-11.
_SERIES_BELOW = 1e-5
# The same in float32, with one term more.
_QUICK_SERIES_BELOW = 0.05


@dataclass(frozen=True)
class TokenMetrics:
    """What is measured at each position; float64 [T] in nats, and bool [T] for `agree`."""

    baseline_nll: Tensor
    candidate_nll: Tensor
    kl: Tensor
    """KL(baseline || candidate) over the full vocabulary; never negative."""
    agree: Tensor
    """Whether both models hold the same token for the most probable; ties go to the lowest id."""


def compare_logits(baseline: Tensor, candidate: Tensor, targets: Tensor) -> TokenMetrics:
    """Compare two models' logits at the same positions.

    With p and q the two distributions, KL = sum p log(p/q) is summed as
    sum (q - p - p log(q/p)): equal because p and q sum to one, and no term can be negative, so
    rounding cannot make a divergence negative and nothing needs to be cut off at zero. Equal
    logits give exactly zero. A NaN or an infinity among the logits of a position shows in its
    numbers.

    Args:
        baseline: floating point [T, V].
        candidate: floating point [T, V].
        targets: int64 [T], the token that really came next.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if baseline.dim() != 2 or baseline.shape != candidate.shape:
        raise ValueError(
            f"logits of shapes {tuple(baseline.shape)} and {tuple(candidate.shape)}"
            " cannot be compared"
        )
    if targets.shape != baseline.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets for logits {tuple(baseline.shape)}")
    log_p = torch.log_softmax(baseline.double(), dim=-1)
    log_q = torch.log_softmax(candidate.double(), dim=-1)
    index = targets.unsqueeze(-1)
    return TokenMetrics(
        baseline_nll=-log_p.gather(-1, index).squeeze(-1),
        candidate_nll=-log_q.gather(-1, index).squeeze(-1),
        kl=_divergence(log_p, log_q),
        agree=baseline.argmax(dim=-1) == candidate.argmax(dim=-1),
    )


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    ratio = log_q - log_p
    p = log_p.exp()
    series = p * ratio * ratio * (ratio / 6 + 0.5)
    closed = log_q.exp() - p * (ratio + 1)
    return torch.where(ratio.abs() < _SERIES_BELOW, series, closed).sum(dim=-1)


def quick_divergence(log_p: Tensor, candidate: Tensor) -> Tensor:
    """KL(baseline || candidate) at each position in float32, to about one part in a thousand.

    It is the same sum as in `compare_logits`, in a quarter of the time: for comparing many
    candidates, not for a verdict.

    Args:
        log_p: float32 [T, V], the baseline's log-probabilities.
        candidate: floating point [T, V], logits.

    Returns:
        float32 [T], never negative.
    """
    ratio = torch.log_softmax(candidate.float(), dim=-1).sub_(log_p)
    series = ratio.square().mul_(ratio.mul(1 / 24).add_(1 / 6).mul_(ratio).add_(0.5))
    closed = torch.expm1(ratio).sub_(ratio)
    small = ratio.abs_() < _QUICK_SERIES_BELOW
    return torch.where(small, series, closed).mul_(log_p.exp()).sum(dim=-1)
