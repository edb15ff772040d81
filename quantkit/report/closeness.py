"""How far artifacts are from their baselines, in one unit for all that are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from quantkit.records import ArtifactReport, Metric
from quantkit.report.layers import is_positive

KL = "kl"

DISTANCE_WORDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        KL: ("KL", "KL, nats per token"),
        "cosine": ("1 − cosine", "1 − mean cosine"),
        "label_agreement": ("other labels", "share of labels that are others"),
    }
)
"""What a distance is taken from -> (short name, words beside an axis)."""


def find_distance(artifact: ArtifactReport, kind: str) -> Metric | None:
    """Return an artifact's distance from its baseline with its interval; None if not measured.

    Args:
        artifact: what was judged.
        kind: a key of `DISTANCE_WORDS`. The distance of a measure is what it lacks to 1.
    """
    if kind == KL:
        return artifact.judgement.kl
    for measure in artifact.judgement.measures:
        if measure.name == kind:
            metric = measure.metric
            return Metric(1 - metric.value, 1 - metric.high, 1 - metric.low)
    return None


def common_distance(artifacts: Sequence[ArtifactReport]) -> str | None:
    """Return the kind of distance that was measured on most artifacts; None without any."""
    counts = Counter(
        kind
        for artifact in artifacts
        for kind in DISTANCE_WORDS
        if (metric := find_distance(artifact, kind)) is not None and is_positive(metric.value)
    )
    return max(DISTANCE_WORDS, key=lambda kind: counts[kind]) if counts else None
