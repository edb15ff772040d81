"""A measured value and a verdict: what every other record of the gate is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED"]


@dataclass(frozen=True)
class Metric:
    """A measured value with its confidence interval and, where it has one, the baseline's."""

    value: float
    low: float
    high: float
    baseline: float | None = None
    increase: float | None = None
    """Relative increase over the baseline; `low` and `high` then bound the increase."""
    p99: float | None = None
    maximum: float | None = None
