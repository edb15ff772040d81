"""What the checks are called, in sentences and in tables alike."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CHECK_WORDS: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "max_perplexity_increase": ("perplexity increase", True),
        "max_kl": ("KL divergence", False),
        "min_top1_agreement": ("top-1 agreement", True),
    }
)
"""Name of a check, which is its key in the recipe -> (words, whether it is a percentage)."""


def name_check(name: str) -> tuple[str, bool]:
    """Return the words for a check and whether it is a percentage; an unknown name is its words."""
    bare = name.removeprefix("max_").removeprefix("min_")
    return CHECK_WORDS.get(name, (bare.replace("_", " "), False))
