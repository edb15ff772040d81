"""How far one model's next-token distributions are from another's (docs/gate.md, "Metrics").

Letters of shapes: T positions, V entries of the vocabulary, K most probable tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TOP = 5
"""Most probable tokens that are looked at."""

# Below this log-ratio a term of the divergence is taken from its series: there the closed form
# loses its digits to cancellation, while two terms of the series are exact to 1e-11.
_SERIES_BELOW = 1e-5
# The same in float32, with one term more.
_QUICK_SERIES_BELOW = 0.05
_BLOCK = 64
"""Logits of which the largest is found at once."""


@dataclass(frozen=True)
class TokenMetrics:
    """What is measured at each position: float64 [T], divergences in nats, or bool [T].

    Most probable tokens have K = min(5, V) columns, the most probable first.
    """

    baseline_nll: Tensor
    candidate_nll: Tensor
    kl: Tensor
    """KL(baseline || candidate) over the full vocabulary; never negative."""
    reverse_kl: Tensor
    """KL(candidate || baseline) over the full vocabulary; never negative."""
    agree: Tensor
    """Whether both models hold the same token for the most probable; ties go to the lowest id."""
    top5_agreement: Tensor
    """Share of the baseline's K most probable tokens that are among the candidate's K."""
    lost: Tensor
    """Whether the token that came is the baseline's most probable one and not the candidate's."""
    won: Tensor
    """Whether it is the candidate's and not the baseline's."""
    baseline_top: Tensor
    """int64 [T, K], the baseline's most probable tokens."""
    candidate_top: Tensor
    baseline_top_log_p: Tensor
    """float64 [T, K], the baseline's log-probabilities of them."""
    candidate_top_log_p: Tensor


def compare_logits(baseline: Tensor, candidate: Tensor, targets: Tensor) -> TokenMetrics:
    """Compare two models' logits at the same positions.

    With p and q the two distributions, KL = sum p log(p/q) is summed as
    sum (q - p - p log(q/p)): equal because p and q sum to one, and no term can be negative, so
    rounding cannot make a divergence negative and nothing needs to be cut off at zero. The reverse
    is summed alike. Equal logits give exactly zero. A NaN or an infinity among the logits of a
    position shows in its numbers.

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
    first, second = find_most_probable(baseline, TOP), find_most_probable(candidate, TOP)
    index = targets.unsqueeze(-1)
    shared = (first.unsqueeze(-1) == second.unsqueeze(-2)).any(dim=-1)
    right, still_right = first[:, 0] == targets, second[:, 0] == targets
    nll = [-log.gather(-1, index).squeeze(-1) for log in (log_p, log_q)]
    chosen = [log.gather(-1, top) for log, top in ((log_p, first), (log_q, second))]
    forward, reverse = _divergences(log_p, log_q)
    return TokenMetrics(
        baseline_nll=nll[0],
        candidate_nll=nll[1],
        kl=forward,
        reverse_kl=reverse,
        agree=first[:, 0] == second[:, 0],
        top5_agreement=shared.double().mean(dim=-1),
        lost=right & ~still_right,
        won=still_right & ~right,
        baseline_top=first,
        candidate_top=second,
        baseline_top_log_p=chosen[0],
        candidate_top_log_p=chosen[1],
    )


def _divergences(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) and KL(q || p), float64 [T]; what is given is overwritten.

    In place, since fetching fresh memory would take longer than the arithmetic.
    """
    ratio = log_q - log_p
    p, q = log_p.exp_(), log_q.exp_()
    small = (ratio.abs() < _SERIES_BELOW).nonzero(as_tuple=True)
    few, few_p, few_q = ratio[small], p[small], q[small]
    gap = q - p
    forward = torch.addcmul(gap, p, ratio, value=-1)
    reverse = q.mul_(ratio).sub_(gap)
    forward[small] = few_p * few * few * (0.5 + few / 6)
    reverse[small] = few_q * few * few * (0.5 - few / 6)
    return forward.sum(dim=-1), reverse.sum(dim=-1)


def find_most_probable(logits: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` largest logits, falling; of equal ones the lowest ids.

    `torch.topk` takes equal ones in any order, and logits that were computed in 16 bits are often
    equal. Here each choice looks at the largest of every block and then into one block.

    Args:
        logits: floating point [T, V].
        count: at most V of them are returned.

    Returns:
        int64 [T, min(count, V)].
    """
    rows, vocabulary = logits.shape
    padded = functional.pad(logits, (0, -vocabulary % _BLOCK), value=-torch.inf)
    blocks = padded.unflatten(-1, (-1, _BLOCK))
    largest = blocks.amax(dim=-1)
    row = torch.arange(rows, device=logits.device)
    found = []
    for _ in range(min(count, vocabulary)):
        block = largest.argmax(dim=-1)
        inside = blocks[row, block]
        place = inside.argmax(dim=-1)
        found.append(block * _BLOCK + place)
        blocks[row, block, place] = -torch.inf
        largest[row, block] = inside.scatter_(-1, place.unsqueeze(-1), -torch.inf).amax(dim=-1)
    # Where too few logits are above minus infinity, what was chosen may be the padding.
    return torch.stack(found, dim=-1).clamp_(max=vocabulary - 1)


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
