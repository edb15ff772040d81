"""What checks and measures are called, in sentences and in tables alike."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CHECK_WORDS: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "max_perplexity_increase": ("perplexity increase", True),
        "max_kl": ("KL divergence", False),
        "min_top1_agreement": ("top-1 agreement", True),
        "min_cosine": ("mean cosine", False),
        "min_cosine_p1": ("1st percentile of the cosine", False),
        "min_retrieval_overlap": ("retrieval overlap", True),
        "min_label_agreement": ("label agreement", True),
        "max_accuracy_drop": ("loss of accuracy", True),
        "max_f1_drop": ("loss of F1", False),
        "max_spearman_drop": ("loss of rank correlation", False),
    }
)
"""Name of a check -> (words, whether it is a percentage). The name is its key in the recipe, but
for the three that `max_metric_drop` limits."""

COSINE_P1 = "cosine_p1"

MEASURE_WORDS: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "cosine": ("Cosine", False),
        COSINE_P1: ("Cosine, 1st percentile", False),
        "retrieval_overlap": ("Retrieval overlap", True),
        "label_agreement": ("Label agreement", True),
        "accuracy": ("Accuracy", True),
        "f1": ("F1", False),
        "spearman": ("Spearman correlation", False),
    }
)
"""Name of a measure -> (title, whether it is a percentage)."""


def name_check(name: str) -> tuple[str, bool]:
    """Return the words for a check and whether it is a percentage; an unknown name is its words."""
    bare = name.removeprefix("max_").removeprefix("min_")
    return CHECK_WORDS.get(name, (bare.replace("_", " "), False))


def name_measure(name: str) -> tuple[str, bool]:
    """As `name_check`, for a measure."""
    return MEASURE_WORDS.get(name, (name.replace("_", " ").capitalize(), False))
