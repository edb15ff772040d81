"""The numbers in config.json that a model computes with, against those of its base.

A rotary embedding that is scaled for long texts only, or a window of attention, does not show in
the short windows that a model is judged on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import parse_config
from quantkit.errors import CheckpointError

_DESCRIPTIONS = ("quantization_config", "compression_config")
_IDLE = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "auto_map",
        "dtype",
        "initializer_range",
        "is_decoder",
        "name_or_path",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""What does not change a logit; tied weights are compared as weights, names of tokens as what a
generation ends at."""
_IDLE_ENDINGS = ("_token_id", "dropout", "_dropout_prob", "_pdrop", "_loss_coef")
_IDLE_BEGINNINGS = ("output_", "id2", "label2", "summary_")
_MOST = 3


def compare_configs(artifact: Checkpoint, base: Checkpoint) -> str | None:
    """Say which numbers are not the base's, once transformers has filled in what is not given.

    Returns:
        None where all are, or where one of both cannot be read: others say so.
    """
    try:
        found, expected = (_read(each) for each in (artifact, base))
    except CheckpointError:
        return None
    differing = [
        f"{key} is {found[key]} and not {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key] and not _is_idle(key)
    ]
    if not differing:
        return None
    more = f", and {len(differing) - _MOST} more" if len(differing) > _MOST else ""
    return f"config.json is not the base's: {'; '.join(differing[:_MOST])}{more}"


def _read(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the config by dotted keys, with transformers' defaults.

    Raises:
        CheckpointError: transformers does not know or refuses it.
    """
    kept = {key: value for key, value in checkpoint.config.items() if key not in _DESCRIPTIONS}
    config = parse_config(replace(checkpoint, config=MappingProxyType(kept)))
    return _flatten(config.to_dict())


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_idle(key: str) -> bool:
    parts = key.split(".")
    return any(part in _IDLE or part.startswith(_IDLE_BEGINNINGS) for part in parts) or parts[
        -1
    ].endswith(_IDLE_ENDINGS)
