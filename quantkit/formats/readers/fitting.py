"""Whether a quantized checkpoint fits the model that its config describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from quantkit.checkpoint.headers import ITEM_BYTES
from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton, build_unchecked, unknown_tensors
from quantkit.errors import ArtifactError
from quantkit.formats.readers.layers import StoredLayer
from quantkit.formats.readers.stored import StoredModel
from quantkit.records import TensorInfo

_LEFT_BEHIND = ("quantization_config", "compression_config", "auto_map")
"""Keys of a config that speak of codes, or of program code."""


@dataclass(frozen=True)
class Fit:
    """A checkpoint beside transformers' model."""

    plain: Checkpoint
    """The checkpoint as its config and headers would be with plain weights."""
    linears: tuple[str, ...]
    """Names of all linear layers of the model, quantized or not."""
    copied: tuple[str, ...]
    """Names of the tensors that outlive the quantization as they are."""
    notes: tuple[str, ...]
    """What does not."""


def fit_model(
    model: StoredModel, dtype: str, *, strict: bool = False, keeps_cache: bool = False
) -> Fit:
    """Compare the quantized layers with transformers' modules.

    Where names differ from transformers' (as those of experts, which it joins), nothing can be
    compared and the layers are taken as they are, unless `strict`.

    Args:
        model: without problems.
        dtype: safetensors' name of the dtype of plain weights.
        strict: refuse layers that are no module of transformers' model.
        keeps_cache: the scales of the key/value cache go over as well.

    Raises:
        ArtifactError: a layer has another shape or kind than the config describes.
        CheckpointError: transformers cannot build the model, or a tensor that it needs is missing.
    """
    plain = _without_quantization(model, dtype)
    skeleton = build_unchecked(plain)
    modules = dict(skeleton.named_modules())
    strangers = [name for name in model.layers if name not in modules]
    for name, layer in model.layers.items():
        if name in modules:
            _compare(layer, modules[name])
    if strangers and strict:
        raise ArtifactError(
            f"layer {strangers[0]}{and_more(strangers)} is no module of transformers' model, which "
            f"compressed-tensors' readers go by: convert --to safetensors"
        )
    if not strangers:
        # All names are transformers' own: nothing that the model needs may be missing.
        build_skeleton(plain)
    empty = _empty_biases(model, set(unknown_tensors(plain, skeleton)))
    return Fit(
        plain=plain,
        linears=tuple(name for name, module in modules.items() if isinstance(module, nn.Linear)),
        copied=tuple(name for name in model.others if name not in empty),
        notes=tuple(_note_left_out(model, empty, keeps_cache=keeps_cache)),
    )


def and_more(names: Sequence[str]) -> str:
    """How many names there are besides the first, for a message that gives the first one."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _without_quantization(model: StoredModel, dtype: str) -> Checkpoint:
    checkpoint = model.checkpoint
    tensors = {name: checkpoint.tensors[name] for name in model.others}
    for name, layer in model.layers.items():
        place = checkpoint.tensors[next(iter(layer.parts.values()))]
        size = math.prod(layer.shape) * ITEM_BYTES[dtype]
        weight = f"{name}.weight"
        tensors[weight] = TensorInfo(weight, dtype, layer.shape, place.file, 0, size)
    config = {key: value for key, value in checkpoint.config.items() if key not in _LEFT_BEHIND}
    return replace(
        checkpoint,
        config=MappingProxyType(config),
        tensors=MappingProxyType(dict(sorted(tensors.items()))),
    )


def _compare(layer: StoredLayer, module: nn.Module) -> None:
    # Codes are stored for [O, I] whatever the module; only eight bits keep a weight's own shape.
    kinds = (nn.Linear, nn.Embedding) if "weight" in layer.parts else (nn.Linear,)
    if not isinstance(module, kinds):
        raise ArtifactError(
            f"layer {layer.name} is a {type(module).__name__} in transformers, which is not read"
        )
    if tuple(module.weight.shape) != layer.shape:
        raise ArtifactError(
            f"layer {layer.name} has the weight {list(layer.shape)}, but config.json describes "
            f"{list(module.weight.shape)}"
        )


def _empty_biases(model: StoredModel, unknown: set[str]) -> set[str]:
    """Biases of zeros that the model has no place for: AutoGPTQ wrote one for every layer."""
    names = [f"{name}.bias" for name in model.layers if f"{name}.bias" in unknown]
    return {name for name in names if not bool(read_tensor(model.checkpoint, name).any())}


def _note_left_out(model: StoredModel, empty: set[str], *, keeps_cache: bool) -> list[str]:
    notes = []
    if empty:
        notes.append(f"{len(empty)} biases of zeros, which the model does not have, are left out")
    if model.cache_scales and not keeps_cache:
        notes.append(
            f"{len(model.cache_scales)} scales of a quantized key/value cache are left out"
        )
    return notes
