"""Artifacts and what the gate found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNJUDGED"]

EXIT_CODES: Mapping[Verdict, int] = {"PASS": 0, "UNJUDGED": 0, "FAIL": 3, "INCONCLUSIVE": 4}


@dataclass(frozen=True)
class Artifact:
    """A written artifact: `folder` holds `files`, whose hashes were taken as they were written."""

    name: str
    format: str
    folder: Path
    files: Mapping[str, str]
    """Path relative to `folder` -> sha256."""
    tensor_bytes: int
    bits_per_weight: float
    file_type: str | None = None
    """Mix of types of a GGUF file; its name is then that of the file, or of the first part."""

    @property
    def path(self) -> Path:
        """What a runtime loads: the folder, or the file."""
        return self.folder if self.file_type is None else self.folder / self.name


@dataclass(frozen=True)
class EvalResult:
    """Baseline and candidate on the same windows. One number a window, unrounded.

    nll: mean negative log-likelihood of the next token, in nats. kl: mean of
    KL(baseline || candidate) over positions, in nats. agreement: share of positions with the same
    most probable token.
    """

    runtime: str
    tokens: int
    """Positions scored, over all windows."""
    baseline_nll: tuple[float, ...]
    candidate_nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    kl_p99: float
    """99th percentile of KL over positions."""
    kl_max: float
    finite: bool
    """False where either model gave a NaN or an infinity."""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    suspicions: tuple[str, ...] = ()
    """What the runtime showed besides numbers and fails on its own; one sentence each."""


@dataclass(frozen=True)
class Check:
    """One limit, the measured value with its interval, and what follows."""

    name: str
    limit: float
    value: float
    low: float
    high: float
    verdict: Verdict


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


@dataclass(frozen=True)
class Judgement:
    """The gate's answer on one artifact."""

    verdict: Verdict
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    perplexity: Metric | None
    kl: Metric | None
    top1_agreement: Metric | None
    confidence: float
    windows: int
    measured_with: Mapping[str, str] = field(default_factory=dict)
    """Packages, dtype and device of the runtime, as `EvalResult.versions` has them."""
