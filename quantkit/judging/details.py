"""What the windows show besides the metrics that have limits (docs/gate.md).

Letters of shapes: N windows, M metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quantkit.judging.scoring import WindowScore, find_ranges
from quantkit.judging.statistics import mean_intervals
from quantkit.records import EvalResult, Metric, TokenWindows
from quantkit.records.judging import DomainScores, WindowDetails
from quantkit.records.measuring import (
    Details,
    DomainResult,
    Generation,
    Parting,
    PositionRange,
)

LARGEST_EXPONENT = 700.0
"""exp() of more overflows; no limit is anywhere near, and JSON has no infinity."""


def collect_details(
    scores: Sequence[WindowScore],
    windows: TokenWindows,
    *,
    partings: tuple[Parting, ...],
    generations: tuple[Generation, ...],
) -> WindowDetails:
    """Put together what the first windows gave.

    Args:
        scores: of the first windows.
        windows: as `select_scored` returns them.
        partings: of the worst of them.
        generations: what both models went on with.
    """
    count = len(scores)
    numbers = range(count) if windows.numbers is None else windows.numbers[:count].tolist()
    return WindowDetails(
        windows=tuple(numbers),
        reverse_kl=tuple(score.reverse_kl for score in scores),
        top5_agreement=tuple(score.top5_agreement for score in scores),
        lost=tuple(score.lost for score in scores),
        won=tuple(score.won for score in scores),
        ranges=find_ranges(windows.ids.shape[1] - 1),
        range_kl=tuple(
            tuple(means.kl if means else math.nan for means in score.ranges) for score in scores
        ),
        range_agreement=tuple(
            tuple(means.agreement if means else math.nan for means in score.ranges)
            for score in scores
        ),
        domains=_collect_domains(scores, windows.domain_names),
        partings=partings,
        generations=generations,
    )


def _collect_domains(
    scores: Sequence[WindowScore], names: Sequence[str]
) -> tuple[DomainScores, ...]:
    """Return what each domain has of which a position counts, in the order of the names."""
    found = []
    for number, name in enumerate(names):
        parts = [score.domains[number] for score in scores if number in score.domains]
        if parts:
            found.append(
                DomainScores(
                    name=name,
                    tokens=sum(part.tokens for part in parts),
                    baseline_nll=tuple(part.baseline_nll for part in parts),
                    candidate_nll=tuple(part.candidate_nll for part in parts),
                    kl=tuple(part.kl for part in parts),
                    agreement=tuple(part.agreement for part in parts),
                )
            )
    return tuple(found)


def describe_details(result: EvalResult, confidence: float) -> Details | None:
    """Return means with their intervals; None where there are no details.

    Args:
        result: finite numbers of at least one window.
        confidence: of the intervals.
    """
    details = result.details
    if details is None:
        return None
    lost, won = np.array(details.lost), np.array(details.won)
    return Details(
        reverse_kl=measure_mean(np.array(details.reverse_kl), confidence),
        top5_agreement=measure_mean(np.array(details.top5_agreement), confidence, highest=1),
        flips=measure_mean(lost + won, confidence, highest=1),
        lost=float(lost.mean()),
        positions=_describe_ranges(details, confidence),
        domains=tuple(_describe_domain(domain, confidence) for domain in details.domains),
        partings=details.partings,
        generations=details.generations,
        windows=details.windows,
        baseline_nll=result.baseline_nll,
        artifact_nll=result.candidate_nll,
        kl=result.kl,
    )


def measure_mean(values: np.ndarray, confidence: float, *, highest: float = math.inf) -> Metric:
    """Return the mean of `values` [N] with its interval, cut to what can be: 0 to `highest`."""
    low, high = mean_intervals(values[:, None], confidence)[0].clip(0, highest)
    return Metric(float(values.mean()), float(low), float(high))


def _describe_ranges(details: WindowDetails, confidence: float) -> tuple[PositionRange, ...]:
    """Leave out the windows that count no position of a range, and ranges without a window."""
    found = []
    for (start, stop), kl, agreement in zip(
        details.ranges,
        np.array(details.range_kl).T,
        np.array(details.range_agreement).T,
        strict=True,
    ):
        counted = ~np.isnan(kl)
        if counted.any():
            found.append(
                PositionRange(
                    start=start,
                    stop=stop,
                    kl=measure_mean(kl[counted], confidence),
                    top1_agreement=measure_mean(agreement[counted], confidence, highest=1),
                )
            )
    return tuple(found)


def _describe_domain(domain: DomainScores, confidence: float) -> DomainResult:
    difference = np.mean(domain.candidate_nll) - np.mean(domain.baseline_nll)
    return DomainResult(
        name=domain.name,
        windows=len(domain.kl),
        tokens=domain.tokens,
        kl=measure_mean(np.array(domain.kl), confidence),
        perplexity_increase=math.expm1(min(float(difference), LARGEST_EXPONENT)),
        top1_agreement=float(np.mean(domain.agreement)),
    )
