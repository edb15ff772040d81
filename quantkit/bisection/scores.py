"""What is measured at each scored position, and what the gate would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.judging.verdict import judge
from quantkit.numerics.divergence import quick_divergence
from quantkit.recipe import GateSpec
from quantkit.records import EvalResult, Judgement


@dataclass(frozen=True)
class Scores:
    """One number a scored position, float32 [S] on the CPU; `window` int64 [S]."""

    window: Tensor
    baseline_nll: Tensor
    nll: Tensor
    kl: Tensor
    agree: Tensor

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Put the scores of several pieces together."""
        names = ("window", "baseline_nll", "nll", "kl", "agree")
        return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def by_window(self, values: Tensor) -> Tensor:
        """Return the mean of each window that has positions; float64."""
        _, place, counts = torch.unique(self.window, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), dtype=torch.float64)
        return sums.index_add_(0, place, values.double()) / counts

    @property
    def mean_kl(self) -> float:
        """Mean over positions, then over windows, nats."""
        return float(self.by_window(self.kl).mean())

    @property
    def increase(self) -> float:
        """Perplexity increase, a fraction."""
        difference = self.by_window(self.nll) - self.by_window(self.baseline_nll)
        return float(torch.expm1(difference.mean().clamp(max=700.0)))

    @property
    def agreement(self) -> float:
        """Share of positions with the same most probable token."""
        return float(self.by_window(self.agree).mean())


def score(log_p: Tensor, logits: Tensor, targets: Tensor, window: Tensor) -> Scores:
    """Compare two models at some positions (docs/gate.md, "Metrics").

    Args:
        log_p: float32 [S, V], the baseline's log-probabilities.
        logits: float32 [S, V].
        targets: int64 [S], the token that really came next.
        window: int64 [S], the position's window.
    """
    kl = quick_divergence(log_p, logits)
    index = targets.unsqueeze(-1)
    return Scores(
        window=window.cpu(),
        baseline_nll=-log_p.gather(-1, index).squeeze(-1).cpu(),
        nll=(logits.logsumexp(-1) - logits.gather(-1, index).squeeze(-1)).cpu(),
        kl=kl.cpu(),
        agree=(log_p.argmax(-1) == logits.argmax(-1)).float().cpu(),
    )


def is_within(scores: Scores, spec: GateSpec) -> bool:
    """Whether the means hold the limits, as far as a few windows can tell."""
    checks = (
        (spec.max_kl, scores.mean_kl, 1),
        (spec.max_perplexity_increase, scores.increase, 1),
        (spec.min_top1_agreement, scores.agreement, -1),
    )
    # Numbers that are no numbers are within nothing.
    return all(limit is None or value * sign <= limit * sign for limit, value, sign in checks)


def judge_scores(scores: Scores, spec: GateSpec, looks: Sequence[int]) -> Judgement:
    """Judge as the gate does at the first of its looks: by whole confidence intervals, as wide as
    all looks together need."""
    names = ("baseline_nll", "nll", "kl", "agree")
    columns = [tuple(scores.by_window(getattr(scores, name)).tolist()) for name in names]
    baseline, candidate, kl, agreement = columns
    result = EvalResult(
        runtime="transformers",
        tokens=len(scores.kl),
        baseline_nll=baseline,
        candidate_nll=candidate,
        kl=kl,
        agreement=agreement,
        kl_p99=float(np.percentile(scores.kl.numpy(), 99)),
        kl_max=float(scores.kl.max()),
        finite=bool(scores.kl.isfinite().all() and scores.nll.isfinite().all()),
        looks=tuple(looks),
    )
    return judge(result, spec)
