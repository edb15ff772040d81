"""The model without its weights: transformers' own modules with parameters on the meta device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError, nearest

# A config must not choose code: kernels come from the Hub by name, classes by auto_map.
_REFUSED_KEYS = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
    }
)

# Of what has such a name transformers makes as many modules as the number says.
_COUNTS = re.compile(r"(^|_)(n_layer|layers|depth|blocks|stages)$")
# Of what has such a name it makes one for each entry of the list, or each letter.
_KINDS = re.compile(r"layer|block|pattern")
_BELIEVED = 256
"""Layers that any part of a config may announce beside few tensors: an excerpt keeps the lists and
the towers of its model. So many are built within seconds."""
_BELIEVED_ALONE = 1000
"""The same without a checkpoint: more than any model has."""

_MOST_BUFFER_BYTES = 64 << 20
"""Of a buffer that a constructor computes; of known models the largest have some MiB."""

# What transformers' constructors were seen to raise on a config that makes no sense.
_CONFIG_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """Build the model of a checkpoint with parameters on the meta device and real buffers.

    No code of the checkpoint runs. Attention is what transformers chooses by default: scaled dot
    product attention where the model has it.

    Returns:
        The model in evaluation mode; tied parameters are one object.

    Raises:
        CheckpointError: transformers does not know the model, the checkpoint is quantized
            already, or a parameter has no tensor of its shape in the checkpoint.
    """
    skeleton = build_unchecked(checkpoint)
    _check_parameters(checkpoint, skeleton)
    return skeleton


def build_unchecked(checkpoint: Checkpoint, *, experts: str | None = None) -> nn.Module:
    """Build the model that the config describes, whatever tensors there are.

    Args:
        checkpoint: only its config and the number of its tensors are looked at.
        experts: transformers' implementation of mixtures of experts; None: its default.

    Raises:
        CheckpointError: transformers cannot build it, or the checkpoint is quantized already.
    """
    config = read_config(checkpoint)
    return build_on_meta(
        checkpoint,
        lambda: AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, experts_implementation=experts
        ),
    )


def build_on_meta(checkpoint: Checkpoint, make: Callable[[], Any]) -> nn.Module:
    """Make a model of transformers with parameters on the meta device and real buffers.

    Args:
        checkpoint: named in errors.
        make: calls the model's constructor with the config of the checkpoint.

    Raises:
        CheckpointError: the constructor fails, or it would make buffers larger than any model's.
    """
    try:
        with torch.device("meta"):
            _check_buffers(checkpoint, make())
        with init_empty_weights(include_buffers=False):
            model = make()
    except _CONFIG_FAULTS as error:
        raise CheckpointError(
            f"{_config_path(checkpoint)}: transformers cannot build the model that it describes: "
            f"{_first_line(error)}"
        ) from error
    # Moving parameters to meta made tied ones two objects again.
    model.tie_weights()
    skeleton: nn.Module = model.eval()
    return skeleton


def _check_buffers(checkpoint: Checkpoint, outline: nn.Module) -> None:
    """Look at what a constructor computes (rotary frequencies, positions), before it does.

    Args:
        outline: the model with nothing but shapes.

    Raises:
        CheckpointError: it would be larger than any model's.
    """
    for name, buffer in outline.named_buffers():
        if buffer.nbytes > _MOST_BUFFER_BYTES:
            raise CheckpointError(
                f"{_config_path(checkpoint)} describes a model whose buffer {name} takes "
                f"{buffer.nbytes:,} bytes, and none has one of more than {_MOST_BUFFER_BYTES:,}"
            )


def tied_names(skeleton: nn.Module) -> Mapping[str, str]:
    """Return tied parameter -> the parameter that it shares, as transformers ties them."""
    ties: Mapping[str, str] = getattr(skeleton, "all_tied_weights_keys", None) or {}
    return MappingProxyType(dict(ties))


def unknown_tensors(checkpoint: Checkpoint, skeleton: nn.Module) -> tuple[str, ...]:
    """Name the checkpoint's tensors that the model has no place for."""
    return tuple(sorted(checkpoint.tensors.keys() - skeleton.state_dict(keep_vars=True).keys()))


def summarize_names(names: Iterable[str]) -> tuple[str, ...]:
    """Join names that differ only in their numbers: `model.layers.*.mlp.up_proj`, in order."""
    return tuple(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def read_config(checkpoint: Checkpoint) -> Any:
    """Make transformers' config of a causal language model; see `parse_config`.

    Raises:
        CheckpointError: as `parse_config`; or it is another kind of model.
    """
    parsed = parse_config(checkpoint)
    if type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{_config_path(checkpoint)}: model_type {parsed.model_type!r} is not a causal "
            f"language model in transformers"
        )
    return parsed


def parse_config(checkpoint: Checkpoint, *, alone: bool = False) -> Any:
    """Make transformers' config from the checkpoint's, without anything that names code.

    Args:
        alone: there are no tensors, and what the config announces is believed.

    Raises:
        CheckpointError: transformers does not know or refuses it, it announces more layers than
            there can be, or the checkpoint is quantized.
    """
    config, path = checkpoint.config, _config_path(checkpoint)
    if _is_quantized(config):
        raise CheckpointError(
            f"{checkpoint.source.name} is quantized already (quantization_config in {path}); "
            f"starting from a quantized model is not yet built: name its 16-bit original"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} has no model_type")
    if model_type not in CONFIG_MAPPING:
        why = (
            "it brings its own code (auto_map), which quantkit does not run"
            if "auto_map" in config
            else "this version of transformers does not know it"
        )
        raise CheckpointError(
            f"{path}: model_type {model_type!r}: {why}{nearest(model_type, CONFIG_MAPPING.keys())}"
        )
    _check_counts(checkpoint, alone=alone)
    try:
        return CONFIG_MAPPING[model_type].from_dict(_without_code(config))
    except _CONFIG_FAULTS as error:
        raise CheckpointError(f"{path} does not validate: {_first_line(error)}") from error


def _check_counts(checkpoint: Checkpoint, *, alone: bool) -> None:
    """Look at what a config announces, before transformers makes lists and modules of it.

    Raises:
        CheckpointError: there are more layers than tensors, in any of its parts.
    """
    config, path, tensors = checkpoint.config, _config_path(checkpoint), len(checkpoint.tensors)
    layers = config.get("num_hidden_layers")
    whole = layers if isinstance(layers, int) and not alone else 0
    most = _BELIEVED_ALONE if alone else max(tensors, _BELIEVED)
    beyond = ((key, count) for key, count in _find_counts(config) if count > most)
    key, count = ("num_hidden_layers", whole) if whole > tensors else next(beyond, ("", 0))
    if count:
        why = "no model has so many" if alone else f"but the checkpoint has only {tensors} tensors"
        raise CheckpointError(f"{path} announces {count} layers ({key!r:.80}), {why}")


def _find_counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield each number of layers in a config and its parts, with its name."""
    pending: list[Any] = [config]
    while pending:
        part = pending.pop()
        pairs = part.items() if isinstance(part, Mapping) else (("", each) for each in part)
        for name, value in pairs:
            # A model in memory has numbers for names, in what labels mean for instance.
            key = str(name)
            if isinstance(value, int) and _COUNTS.search(key):
                yield key, value
            elif isinstance(value, list | str) and _KINDS.search(key):
                yield key, len(value)
            if isinstance(value, Mapping | list):
                pending.append(value)


def _is_quantized(config: Mapping[str, Any]) -> bool:
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    keys = ("quantization_config", "compression_config")
    return any(part.get(key) is not None for part in parts for key in keys)


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _REFUSED_KEYS
    }


def _check_parameters(checkpoint: Checkpoint, skeleton: nn.Module) -> None:
    """Compare every parameter with the checkpoint's header."""
    ties = tied_names(skeleton)
    missing = []
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        info = checkpoint.tensors.get(name)
        if info is None:
            if ties.get(name) not in checkpoint.tensors:
                missing.append(name)
        elif info.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"tensor {name} in {info.file} has the shape {list(info.shape)}, but "
                f"{_config_path(checkpoint)} describes {list(parameter.shape)}"
            )
    if missing:
        raise CheckpointError(_explain_missing(checkpoint, skeleton, missing))


def _explain_missing(checkpoint: Checkpoint, skeleton: nn.Module, missing: list[str]) -> str:
    others = unknown_tensors(checkpoint, skeleton)
    hint = f" (it has {others[0]} and {len(others) - 1} more of other names)" if others else ""
    shown = ", ".join(summarize_names(missing)[:3])
    return (
        f"{checkpoint.source.name} lacks {len(missing)} tensor{'s' if len(missing) != 1 else ''} "
        f"of the model that its config describes: {shown}{hint}; names must be those of "
        f"transformers' modules"
    )


def _config_path(checkpoint: Checkpoint) -> str:
    return str(checkpoint.source.folder / "config.json")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
