"""Artifacts and what the gate found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantkit.records.measuring import (
    Details,
    Footprint,
    Generation,
    Parting,
    Probe,
    TaskResult,
)
from quantkit.records.metrics import Metric, Verdict

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
class WindowDetails:
    """What else the windows of an `EvalResult` have, in their order; unrounded."""

    windows: tuple[int, ...]
    """Their numbers in the data."""
    reverse_kl: tuple[float, ...]
    top5_agreement: tuple[float, ...]
    lost: tuple[float, ...]
    """Share of positions at which only the baseline puts the token that came first."""
    won: tuple[float, ...]
    ranges: tuple[tuple[int, int], ...]
    """Ranges of positions, the last one open; `range_kl` and `range_agreement` have a number for
    each, NaN where a window counts no position of it."""
    range_kl: tuple[tuple[float, ...], ...]
    range_agreement: tuple[tuple[float, ...], ...]
    domains: tuple[DomainScores, ...] = ()
    partings: tuple[Parting, ...] = ()
    generations: tuple[Generation, ...] = ()


@dataclass(frozen=True)
class DomainScores:
    """Means over the counted positions of one kind of text, one number a window that has some."""

    name: str
    tokens: int
    baseline_nll: tuple[float, ...]
    candidate_nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class CheckOutcome:
    """What a check of the user's own returns (docs/python.md, "Your own checks").

    name: of the check, in every report. passed: whether the artifact is as it should be. value and
    limit: what was measured and what it was held against, where that is a number. detail: what was
    seen, in one sentence.
    """

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class CustomCheck:
    """A check of the user's own: what it found, and which code it is."""

    name: str
    value: float | None
    limit: float | None
    verdict: Verdict
    """PASS or FAIL."""
    detail: str
    function: str
    """Its qualified name."""
    sha256: str | None
    """Of its source, or its bytecode where that cannot be read; None where neither can."""


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
    looks: tuple[int, ...] = ()
    """Numbers of windows at which to judge, settled beforehand; empty: only at these windows."""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    tokenizer_findings: tuple[str, ...] = ()
    """Where the runtime's own tokenizer gives other ids than the model's."""
    suspicions: tuple[str, ...] = ()
    """What the runtime showed besides numbers and fails on its own; one sentence each."""
    notes: tuple[str, ...] = ()
    """What was not looked at, and why; one sentence each."""
    details: WindowDetails | None = None
    probes: tuple[Probe, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    custom_checks: tuple[CustomCheck, ...] = ()
    load_seconds: float | None = None
    """How long the candidate's runtime took to load it."""
    memory_bytes: int | None = None
    """The largest resident set of the candidate's worker."""


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
class Measure:
    """A measured quantity by name, for what not every kind of model has."""

    name: str
    """`cosine`, `cosine_p1`, `retrieval_overlap`, `label_agreement`, `accuracy`, `f1`,
    `spearman`."""
    metric: Metric
    """Where it has a baseline, the interval is the artifact's, given the baseline's value on the
    same texts: the paired interval of the difference, added to it."""


@dataclass(frozen=True)
class Speed:
    """Baseline and artifact in the same runtime, alternately in the same run.

    baseline, artifact: `unit` per second, the medians of the repetitions. The baseline is the same
    model in the same runtime with its weights in float.
    """

    unit: Literal["tokens", "sentences"]
    what: str
    """What was timed, for instance `prefill of 4 x 512 tokens`."""
    baseline: float
    artifact: float
    runtime: str
    threads: int
    repetitions: int = 1


@dataclass(frozen=True)
class EncoderResult:
    """An encoder and its baseline on the same texts. One number a text, unrounded.

    cosine: of the embeddings of baseline and artifact. overlap: share of the nearest `top_k`
    texts that both have in common, one number a text that none before equals. agreement: 1 where
    the labels agree (a share of the tokens for token classification). baseline_score,
    candidate_score: correctness against the given labels, 1 or 0 a text; or the similarity of a
    pair, and then there are no baseline_labels. What a task does not have is empty.
    """

    runtime: str
    task: str
    texts: int
    cosine: tuple[float, ...] = ()
    overlap: tuple[float, ...] = ()
    agreement: tuple[float, ...] = ()
    baseline_score: tuple[float, ...] = ()
    candidate_score: tuple[float, ...] = ()
    baseline_labels: tuple[int, ...] = ()
    candidate_labels: tuple[int, ...] = ()
    labels: tuple[float, ...] = ()
    """As the data gives them: the index of a class, or the similarity of a pair."""
    finite: bool = True
    identical: bool = False
    """Whether all outputs are equal in every bit."""
    difference: float | None = None
    """Root mean square of the difference of all outputs, relative to that of the baseline's."""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    suspicions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What was not measured, and why; one sentence each."""


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
    """Of the intervals; above the recipe's where several `looks` share the error."""
    windows: int
    measured_with: Mapping[str, str] = field(default_factory=dict)
    """Packages, dtype and device of the runtime, as `EvalResult.versions` has them."""
    measures: tuple[Measure, ...] = ()
    """What encoders are judged by, in the order of the report."""
    speed: tuple[Speed, ...] = ()
    """What was timed, in the order of the report; decides nothing."""
    looks: tuple[int, ...] = ()
    """Numbers of windows at which a decoder might be judged; `windows` is the one that decided."""
    notes: tuple[str, ...] = ()
    """What the gate did not do, and why; one sentence each."""
    details: Details | None = None
    """Of a decoder that was measured."""
    probes: tuple[Probe, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    footprint: Footprint | None = None
    custom_checks: tuple[CustomCheck, ...] = ()
    """Of the user's own; one that fails fails the artifact, and none proves it."""
