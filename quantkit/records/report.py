"""What a job leaves for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.records.encoders import EncoderPlan
from quantkit.records.judging import EXIT_CODES, Artifact, Judgement
from quantkit.records.measuring import Difference, Footprint
from quantkit.records.metrics import Verdict
from quantkit.records.plan import Allocation, Plan
from quantkit.records.publishing import Publication
from quantkit.records.solving import KvRecord, LayerRecord


@dataclass(frozen=True)
class ArtifactReport:
    """One row of a report."""

    name: str
    path: str
    format: str
    scheme: str
    size_bytes: int
    """Bytes of all tensors, as docs/gate.md defines size."""
    bits_per_weight: float
    runtime: str
    judgement: Judgement
    task: str | None = None
    """What an encoder is for, as `EncoderInfo.task`; None for decoders."""


@dataclass(frozen=True)
class Report:
    """What a job or a gate found; every renderer reads this and nothing else."""

    model: str
    baseline_bytes: int
    artifacts: tuple[ArtifactReport, ...]
    verdict: Verdict
    layers: tuple[LayerRecord, ...]
    notes: tuple[str, ...]
    evidence: Mapping[str, Any]
    """JSON-ready: recipe, versions, hashes, calibration and evaluation data, timings."""
    kv_cache: tuple[KvRecord, ...] = ()
    allocation: Allocation | None = None
    comparison: bool = False
    """Whether the artifacts compete; the verdict is then the best of theirs, else the worst."""
    differences: tuple[Difference, ...] = ()
    """Of each pair of artifacts that compete."""
    baseline_footprint: Footprint | None = None
    """Of the baseline in its runtime, where artifacts compete."""


@dataclass(frozen=True)
class Result:
    """What `quantkit.quantize` returns."""

    output: Path
    verdict: Verdict
    plan: Plan | EncoderPlan
    artifacts: tuple[Artifact, ...]
    report: Report
    publication: Publication | None = None
    """Where the recipe says to publish, and the artifact passed."""

    def __repr__(self) -> str:
        """What is asked for first: the plan alone has hundreds of lines."""
        names = [artifact.name for artifact in self.artifacts]
        return f"Result(verdict={self.verdict!r}, output={str(self.output)!r}, artifacts={names!r})"

    @property
    def exit_code(self) -> int:
        """The exit code that the command line gives for this verdict."""
        return EXIT_CODES[self.verdict]
