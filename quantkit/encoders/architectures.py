"""Which architectures are encoders, and where their layers and tables are.

The literal tables in this file are the only place that knows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quantkit.records.encoders import Task


@dataclass(frozen=True)
class EncoderFamily:
    """Names inside of a model; those of `layers` and `tables` are relative to its base model."""

    model_type: str
    base: str
    """Attribute of a classifier that holds the base model; prefix of tensors in checkpoints."""
    layers: str
    """The list of equal layers, whose linear layers are quantized."""
    tables: tuple[str, ...]
    """Embeddings with a row for each token or position."""
    has_types: bool = False
    """Whether texts have token_type_ids; others have types in their config at the most."""
    padded_positions: bool = False
    """Whether positions begin behind the id of the padding token, which makes texts shorter."""


_WORDS_AND_POSITIONS = ("embeddings.word_embeddings", "embeddings.position_embeddings")


def _like_bert(
    model_type: str, base: str, *, has_types: bool = False, padded_positions: bool = False
) -> EncoderFamily:
    return EncoderFamily(
        model_type,
        base,
        layers="encoder.layer",
        tables=_WORDS_AND_POSITIONS,
        has_types=has_types,
        padded_positions=padded_positions,
    )


FAMILIES: Mapping[str, EncoderFamily] = MappingProxyType(
    {
        "Bert": _like_bert("bert", "bert", has_types=True),
        "Electra": _like_bert("electra", "electra", has_types=True),
        "Roberta": _like_bert("roberta", "roberta", padded_positions=True),
        "XLMRoberta": _like_bert("xlm-roberta", "roberta", padded_positions=True),
        "Camembert": _like_bert("camembert", "roberta", padded_positions=True),
        "MPNet": _like_bert("mpnet", "mpnet", padded_positions=True),
        "DistilBert": EncoderFamily(
            "distilbert",
            "distilbert",
            layers="transformer.layer",
            tables=_WORDS_AND_POSITIONS,
        ),
        "ModernBert": EncoderFamily(
            "modernbert",
            "model",
            layers="layers",
            tables=("embeddings.tok_embeddings",),
        ),
    }
)
"""First part of the names of transformers' classes -> the family."""

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "Model": "embedding",
        "ForSequenceClassification": "sequence-classification",
        "ForTokenClassification": "token-classification",
    }
)
"""Last part of the names of transformers' classes -> what the model is for."""

ARCHITECTURES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {f"{family}{task}": (family, task) for family in FAMILIES for task in TASKS}
)
"""Class of transformers -> its family and its task in the tables above."""

_DECODERS = ("LMHeadModel", "ForCausalLM")
"""How the same families end where they write text."""


def find_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the class that a config names, or None where it names none or not one alone."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        return names[0]
    return None


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this config is an encoder, by the class that it names.

    True for classes of these families whose task is not built, too: they are no decoders.
    """
    name = find_architecture(config)
    if name is None:
        return False
    if name in ARCHITECTURES:
        return True
    known = any(name.startswith(f"{family}For") for family in FAMILIES)
    return known and not name.endswith(_DECODERS)
