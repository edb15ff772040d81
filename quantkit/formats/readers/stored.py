"""A quantized checkpoint of any readable kind: its layers from the headers, then one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.formats.config_groups import ConfigGroup, find_config_groups
from quantkit.formats.decode import list_layers
from quantkit.formats.readers.awq import find_awq_layer, read_awq_codes
from quantkit.formats.readers.compressed import find_compressed_layer, read_compressed_weight
from quantkit.formats.readers.description import StoredQuantization, find_quantization
from quantkit.formats.readers.fp8 import find_fp8_layer, read_fp8_weight
from quantkit.formats.readers.gptq import find_gptq_layer, read_gptq_codes
from quantkit.formats.readers.layers import (
    LayerCodes,
    StoredLayer,
    as_quantized_layer,
    dequantize_codes,
)
from quantkit.formats.readers.modelopt import (
    find_modelopt_layer,
    read_modelopt_layer,
    read_modelopt_weight,
)
from quantkit.records import QuantizedLayer

_CODE_DTYPES = ("F8_E4M3", "I8", "U8")
"""Of ModelOpt's codes."""

_CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "prob_scale", "output_scale")
"""Last parts of the names of tensors that belong to a quantized key/value cache."""


@dataclass(frozen=True)
class StoredModel:
    """A quantized checkpoint, known from its config and headers."""

    checkpoint: Checkpoint
    quantization: StoredQuantization
    layers: Mapping[str, StoredLayer]
    """The quantized layers by name."""
    problems: tuple[str, ...]
    """What cannot be read or contradicts itself, one line each."""
    broken: frozenset[str] = frozenset()
    """Names of the layers that cannot be read."""

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the tensors that are no part of a quantized layer, cache scales left out."""
        parts = {tensor for layer in self.layers.values() for tensor in layer.parts.values()}
        return tuple(
            name
            for name in self.checkpoint.tensors
            if not (name in parts or _is_cache_scale(name) or _module_of(name) in self.broken)
        )

    @property
    def cache_scales(self) -> tuple[str, ...]:
        """Names of the scales of a quantized key/value cache."""
        return tuple(name for name in self.checkpoint.tensors if _is_cache_scale(name))

    @property
    def parameters(self) -> int:
        """Weights of the model; scales, zero points and orders do not count."""
        matrices = sum(math.prod(layer.shape) for layer in self.layers.values())
        tensors = self.checkpoint.tensors
        return matrices + sum(math.prod(tensors[name].shape) for name in self.others)


def open_stored(checkpoint: Checkpoint) -> StoredModel | None:
    """Find the quantized layers of a checkpoint; None where nothing says that it is quantized.

    Reads the config and the headers, and the shapes that compressed-tensors stores as tensors.

    Raises:
        ArtifactError: it is quantized in a way that is not read.
    """
    quantization = find_quantization(checkpoint.source.folder, checkpoint.config)
    if quantization is None:
        return None
    groups = find_config_groups(checkpoint.config)
    layers: dict[str, StoredLayer] = {}
    problems: dict[str, str] = {}
    for name in _name_layers(checkpoint, quantization):
        try:
            layers[name] = _find_layer(checkpoint, quantization, name, groups)
        except ArtifactError as error:
            problems[name] = str(error)
    lines = tuple(problems.values())
    frozen = MappingProxyType(layers)
    model = StoredModel(checkpoint, quantization, frozen, lines, frozenset(problems))
    return replace(model, problems=(*lines, *_find_contradictions(model)))


def read_codes(model: StoredModel, name: str) -> LayerCodes:
    """Read the codes of one layer of a GPTQ or AWQ checkpoint.

    Raises:
        ArtifactError: a tensor is damaged or contradicts the config.
        ValueError: the checkpoint is of another kind.
    """
    if model.quantization.method == "gptq":
        return read_gptq_codes(model.checkpoint, model.quantization, model.layers[name])
    if model.quantization.method == "awq":
        return read_awq_codes(model.checkpoint, model.quantization, model.layers[name])
    raise ValueError(f"{model.quantization.method} layers are not read as codes")


def read_quantized(model: StoredModel, name: str) -> QuantizedLayer:
    """Read one layer of a GPTQ, AWQ or ModelOpt checkpoint for the compressed-tensors writer.

    Raises:
        ArtifactError: a tensor is damaged, contradicts the config, or is of a form that the record
            has no place for.
        ValueError: the checkpoint is of another kind.
    """
    layer = model.layers[name]
    if model.quantization.method == "modelopt":
        return read_modelopt_layer(model.checkpoint, model.quantization, layer)
    return as_quantized_layer(layer, read_codes(model, name))


def read_weight(model: StoredModel, name: str) -> Tensor:
    """Read the float32 weight [O, I] that one layer's codes and scales stand for.

    Raises:
        ArtifactError: a tensor is damaged or contradicts the config.
    """
    layer = model.layers[name]
    if model.quantization.method == "fp8":
        return read_fp8_weight(model.checkpoint, model.quantization, layer)
    if model.quantization.method == "modelopt":
        return read_modelopt_weight(model.checkpoint, model.quantization, layer)
    if model.quantization.method == "compressed-tensors":
        return read_compressed_weight(model.checkpoint, layer)
    return dequantize_codes(read_codes(model, name))


def _name_layers(checkpoint: Checkpoint, quantization: StoredQuantization) -> Iterator[str]:
    """Yield the names of the layers that are stored as the quantization stores layers."""
    if quantization.method == "compressed-tensors":
        yield from list_layers(checkpoint)
        return
    seen = set()
    for tensor, info in checkpoint.tensors.items():
        module, _, leaf = tensor.rpartition(".")
        if quantization.method == "fp8":
            found = leaf == "weight" and info.dtype.startswith("F8_")
        elif quantization.method == "modelopt":
            found = leaf == "weight_scale" or (leaf == "weight" and info.dtype in _CODE_DTYPES)
        else:
            # Any of them: a layer of which one is missing must not pass unseen.
            found = leaf in ("qweight", "qzeros", "scales")
        if found and module not in seen:
            seen.add(module)
            yield module


def _find_layer(
    checkpoint: Checkpoint,
    quantization: StoredQuantization,
    name: str,
    groups: Sequence[ConfigGroup],
) -> StoredLayer:
    if quantization.method == "gptq":
        return find_gptq_layer(checkpoint, quantization, name)
    if quantization.method == "awq":
        return find_awq_layer(checkpoint, quantization, name)
    if quantization.method == "fp8":
        return find_fp8_layer(checkpoint, quantization, name)
    if quantization.method == "modelopt":
        return find_modelopt_layer(checkpoint, quantization, name)
    return find_compressed_layer(checkpoint, name, groups)


def _find_contradictions(model: StoredModel) -> Iterator[str]:
    """What a reader would stumble over or pass by in silence."""
    where, tensors = model.quantization.where, model.checkpoint.tensors
    if not model.layers and not model.problems:
        yield f"{where} describes a quantized model, but no layer is quantized"
    yield from model.quantization.contradictions
    for name in sorted(model.quantization.list_left_out(model.layers)):
        yield f"layer {name} is quantized, but {where} says that it is not"
    for name, layer in model.layers.items():
        if f"{name}.weight" in tensors and "weight" not in layer.parts:
            yield f"layer {name} is stored twice, quantized and not"
    for name in model.others:
        if name.endswith(("_scale_inv", "weight_scale", ".g_idx")):
            yield f"tensor {name} belongs to no quantized layer that can be read"
        elif tensors[name].dtype.startswith("F8_"):
            yield f"tensor {name} is {tensors[name].dtype}, and no scale of it is known"


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_cache_scale(name: str) -> bool:
    return name.rpartition(".")[2] in _CACHE_SCALES
