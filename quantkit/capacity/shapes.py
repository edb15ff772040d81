"""What attention caches for each token, layer by layer, from a model's config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import CheckpointError

DEFAULT_CONTEXT = 8192
"""Tokens of a sequence that are planned for, where the model has so many."""

MOST_LAYERS = 1000
"""More than any model has; a config with more is damaged or hostile."""

_STATEFUL = frozenset({"linear_attention", "mamba", "conv", "recurrent"})
"""Names in `layer_types` of layers whose state does not grow with the context."""
_WINDOWED = frozenset({"sliding_attention", "chunked_attention", "local_attention"})


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches."""

    values_per_token: int
    """Numbers cached for each token: 2 * key/value heads * head_dim; in multi-head latent attention
    the latent vector and the rotated part of the key; 0 where the state has a fixed size."""
    window: int | None
    """Tokens that are kept at the most; None: all of the context."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide how a model is served."""

    model_type: str
    layers: tuple[LayerShape, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int | None
    """The longest context that the config names."""
    notes: tuple[str, ...] = ()
    """What the figures leave out."""

    @property
    def usual_context(self) -> int:
        """The context to plan for where nobody asks for another."""
        return min(DEFAULT_CONTEXT, self.max_positions or DEFAULT_CONTEXT)

    @property
    def values_per_token(self) -> int:
        """Numbers cached for each token by all layers together, windows not regarded."""
        return sum(layer.values_per_token for layer in self.layers)

    def cached_share(self, gpus: int) -> float:
        """Return of the whole cache what one GPU holds, where all share each layer.

        A key/value head is never divided: beyond their number it is held in copies. The latent
        vectors of multi-head latent attention are those of all heads: each GPU holds all of them.
        """
        values = max((layer.values_per_token for layer in self.layers), default=0)
        divided = values == 2 * self.kv_heads * self.head_dim
        return 1 / min(gpus, self.kv_heads) if divided else 1.0


def read_shape(config: Mapping[str, Any], place: str = "config.json") -> ModelShape:
    """Read the sizes out of a config.json; that of a text model within a larger one counts.

    Where the config leaves `layer_types` to transformers, as older ones of Gemma do, pass the
    config with transformers' defaults filled in (`PreTrainedConfig.to_dict`).

    Args:
        config: the JSON of the file.
        place: what messages call it.

    Raises:
        CheckpointError: a size is missing or makes no sense.
    """
    text = _find_text(config)
    count = _whole(text, place, "num_hidden_layers", "n_layer", "num_layers")
    if count > MOST_LAYERS:
        raise CheckpointError(f"{place} announces {count} layers: no model has so many")
    hidden = _whole(text, place, "hidden_size", "n_embd", "d_model")
    heads = _whole(text, place, "num_attention_heads", "n_head", "num_heads")
    kv_heads = _optional(text, "num_key_value_heads", "num_kv_heads") or heads
    head_dim = _optional(text, "head_dim") or hidden // heads
    kinds, notes = _layer_kinds(text, count)
    latent = _optional(text, "kv_lora_rank")
    cached = 2 * kv_heads * head_dim
    if latent is not None:
        cached = latent + (_optional(text, "qk_rope_head_dim") or 0)
    window = _optional(text, "sliding_window", "attention_chunk_size")
    return ModelShape(
        model_type=str(text.get("model_type") or config.get("model_type")),
        layers=tuple(
            LayerShape(
                0 if kind in _STATEFUL else cached,
                window if kind in _WINDOWED else None,
            )
            for kind in kinds
        ),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=_whole(text, place, "vocab_size"),
        max_positions=_optional(text, "max_position_embeddings", "n_positions"),
        notes=notes,
    )


def _find_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model, where the whole is a larger one."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and "num_hidden_layers" not in config:
        return text
    return config


def _layer_kinds(text: Mapping[str, Any], count: int) -> tuple[list[str], tuple[str, ...]]:
    """What each layer's attention is called, and what is not counted."""
    given = text.get("layer_types")
    if isinstance(given, list | tuple) and len(given) == count:
        kinds = [str(kind) for kind in given]
    else:
        kinds = ["sliding_attention" if _slides(text) else "full_attention"] * count
    fixed = sum(kind in _STATEFUL for kind in kinds)
    if not fixed:
        return kinds, ()
    return kinds, (
        f"{fixed} of {count} layers keep a state of fixed size for each sequence, which is not "
        f"counted",
    )


def _slides(text: Mapping[str, Any]) -> bool:
    """Whether all layers have the window of the config, as those of the first Mistral do.

    Qwen's configs name a window and switch it off; chunks of Llama 4 come with `layer_types`.
    """
    return text.get("model_type") in ("mistral", "mixtral", "phi3", "starcoder2") and bool(
        text.get("sliding_window")
    )


def _whole(text: Mapping[str, Any], place: str, *names: str) -> int:
    found = _optional(text, *names)
    if found is None:
        raise CheckpointError(f"{place} has no {names[0]} that is a positive whole number")
    return found


def _optional(text: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = text.get(name)
        if type(value) is int and value > 0:
            return value
    return None
