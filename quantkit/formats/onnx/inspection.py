"""What is in an ONNX file, from its graph alone."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.headers import read_json
from quantkit.errors import CheckpointError
from quantkit.formats.inspected import InspectedLayer, Inspection
from quantkit.formats.onnx.blocks import OnnxLayer
from quantkit.formats.onnx.container import OnnxFile, find_graph, list_graphs, open_graph
from quantkit.formats.onnx.genai import read_genai_config
from quantkit.formats.onnx.names import GENAI_CONFIG as CONFIG
from quantkit.formats.onnx.operators import LOOKUPS, find_layers
from quantkit.formats.onnx.tensors import OnnxTensor
from quantkit.formats.onnx.wiring import show, strip_name
from quantkit.schemes import ONNX

_CACHES = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
"""Operator -> inputs that hold cosines and sines, which are no weights of the model."""
_ANGLES = re.compile(r"(cos|sin)_cache")
_MOST = 12
"""Operators, data files and opsets that are named."""
_DIMENSIONS = 8


def find_onnx(path: Path) -> Path | None:
    """Return the ONNX file that is meant by a file or a folder.

    Returns:
        None where the folder has none, or has the files of another artifact beside.

    Raises:
        ArtifactError: a folder has several.
    """
    if not path.is_dir():
        return path if path.suffix == ".onnx" and path.exists() else None
    own = (path / "quantkit.json").is_file()
    if own and ((path / "compressed-tensors").is_dir() or (path / "gguf").is_dir()):
        return None
    if any(path.glob("*.safetensors")) or any(path.glob("*.gguf")):
        return None
    return find_graph(path) if list_graphs(path) else None


def inspect_onnx(path: Path) -> Inspection:
    """Look into an ONNX file; the verdict is left to whoever knows where evidence lies.

    Raises:
        ArtifactError: it cannot be read, or the genai_config.json beside names code to be loaded.
        MissingPackageError: the package onnx is not there.
    """
    file = open_graph(path)
    # Whoever opens the folder in a runtime goes through here first.
    read_genai_config(file.path.parent)
    found = find_layers(file)
    problems = list(found.problems)
    config = find_config(file.path, problems)
    tensor_bytes = sum(tensor.size for tensor in file.tensors.values())
    plain = _find_plain(file, found.layers)
    parameters = _count_parameters(plain, found.layers, config)
    counts = Counter(tensor.kind.name for tensor in file.tensors.values())
    return Inspection(
        folder=file.path.parent,
        format=ONNX,
        scheme=name_scheme(found.layers),
        architecture=_name_architecture(config),
        layers=(*map(describe_layer, found.layers), *_list_matrices(plain)),
        tensors=dict(sorted(counts.items())),
        parameters=parameters,
        tensor_bytes=tensor_bytes,
        bits_per_weight=8 * tensor_bytes / parameters if parameters else 0.0,
        quantization_config=None,
        kv_cache="none",
        verdict=None,
        problems=tuple(problems),
        file=file.path,
        details=dict(_find_details(file, found.layers)),
    )


def name_scheme(layers: tuple[OnnxLayer, ...]) -> str:
    """Return the kinds of quantized layers in a few words, most used first; or `none`."""
    counts = Counter(_describe(layer) for layer in layers)
    return ", ".join(sorted(counts, key=lambda words: (-counts[words], words))) or "none"


def describe_layer(layer: OnnxLayer) -> InspectedLayer:
    """Put a quantized layer as `inspect` tells it."""
    return InspectedLayer(
        name=layer.name,
        scheme=f"{layer.operator} int{layer.bits}",
        group_size=layer.group_size,
        bits=layer.bits,
        shape=layer.shape,
        size=sum(part.size for part in layer.parts),
        sharing=layer.sharing,
    )


def _describe(layer: OnnxLayer) -> str:
    shared = f"g{layer.group_size}" if layer.group_size else layer.sharing
    inputs = "" if layer.inputs == "float" else f", {layer.inputs} int8 inputs"
    return f"{layer.operator} int{layer.bits} {shared}{inputs}"


def find_config(path: Path, problems: list[str]) -> Mapping[str, Any]:
    """Return config.json beside the graph, or above it as optimum lays folders out."""
    for folder in list_folders(path):
        file = folder / "config.json"
        if file.is_file():
            try:
                return read_json(file)
            except CheckpointError as error:
                problems.append(str(error))
    return {}


def list_folders(path: Path) -> tuple[Path, ...]:
    """Return where the files of a model lie beside its graph: optimum puts graphs into `onnx`."""
    folder = path.parent
    return (folder, folder.parent) if folder.absolute().name == ONNX else (folder,)


def _name_architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return show(str(named[0]))
    kind = config.get("model_type")
    return show(kind) if isinstance(kind, str) else ""


def _find_plain(file: OnnxFile, layers: tuple[OnnxLayer, ...]) -> list[OnnxTensor]:
    """Return the weights that are stored one number an element.

    Not scales, zero points, tables of cosines, or single numbers; integers count only where they
    are the rounded biases of a quantized layer.
    """
    parts = {id(part) for layer in layers for part in layer.parts}
    parts |= {id(tensor) for tensor in _find_scales(file)}
    biases = {id(tensor) for tensor in _find_biases(file)}
    return [
        tensor
        for tensor in file.tensors.values()
        if id(tensor) not in parts
        and tensor.count > 1
        and not _ANGLES.match(tensor.name)
        and (tensor.kind.floating or id(tensor) in biases)
    ]


def _find_scales(file: OnnxFile) -> Iterator[OnnxTensor]:
    """Yield scales and zero points of inputs, and tables of cosines and sines."""
    for graph in file.graphs:
        for node in graph.nodes:
            places: tuple[int, ...] = _CACHES.get(node.op_type, ())
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                places = (1, 2)
            for place in places:
                tensor = graph.tensors.get(node.input[place]) if place < len(node.input) else None
                if tensor is not None:
                    yield tensor


def _find_biases(file: OnnxFile) -> Iterator[OnnxTensor]:
    for graph in file.graphs:
        for node in graph.nodes:
            if node.op_type == "DequantizeLinear" and node.input:
                tensor = graph.tensors.get(node.input[0])
                if tensor is not None and tensor.kind.name == "INT32":
                    yield tensor


def _count_parameters(
    plain: list[OnnxTensor], layers: tuple[OnnxLayer, ...], config: Mapping[str, Any]
) -> int:
    """Count the weights; a head that is tied to the embedding counts once, though stored twice."""
    count = sum(tensor.count for tensor in plain) + sum(layer.count for layer in layers)
    # Rows that are looked up may have other codes than the product with the same matrix.
    tables = {(layer.name, layer.shape) for layer in layers if layer.operator in LOOKUPS}
    products = {(layer.name, layer.shape) for layer in layers if layer.operator not in LOOKUPS}
    count -= sum(math.prod(shape) for _, shape in tables & products)
    if config.get("tie_word_embeddings") is True:
        sizes = [(layer.name, layer.count) for layer in layers]
        sizes += [(tensor.name, tensor.count) for tensor in plain]
        embedded = {size for name, size in sizes if "embed" in name}
        count -= sum(size for name, size in sizes if "lm_head" in name and size in embedded)
    return count


def _list_matrices(plain: list[OnnxTensor]) -> Iterator[InspectedLayer]:
    for tensor in plain:
        if len(tensor.shape) == 2:
            name = show(strip_name(tensor.name))
            bits = tensor.kind.bits
            yield InspectedLayer(name, "none", None, bits, tensor.shape, tensor.size)


def _find_details(file: OnnxFile, layers: tuple[OnnxLayer, ...]) -> Iterator[tuple[str, str]]:
    """Yield what people ask, and the answer."""
    model = file.model
    yield "file", file.path.name
    if file.data_files:
        names = [data.name for data in file.data_files]
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        yield "data files", f"{', '.join(map(show, names[:_MOST]))}{more}"
    yield "kind of graph", find_kind(file)
    yield "ir version", str(model.ir_version)
    opsets = (
        f"{show(each.domain) or 'ai.onnx'} {each.version}" for each in model.opset_import[:_MOST]
    )
    yield "opsets", ", ".join(opsets) or "none"
    yield "producer", show(f"{model.producer_name} {model.producer_version}".strip()) or "not named"
    yield "inputs", ", ".join(_describe_value(value) for value in _shown(model.graph.input))
    yield "outputs", ", ".join(_describe_value(value) for value in _shown(model.graph.output))
    yield "operators", describe_operators(file)
    levels = sorted({layer.accuracy_level for layer in layers} - {None}, key=str)
    if levels:
        yield "accuracy level", ", ".join(map(str, levels))
    if layers:
        blocks = [layer for layer in layers if layer.operator == "MatMulNBits"]
        bare = sum(layer.zero_point is None for layer in blocks)
        if blocks:
            yield "zero points", f"{len(blocks) - bare} of {len(blocks)} MatMulNBits have them"
    metadata = {show(each.key): show(each.value) for each in model.metadata_props[:20]}
    if metadata:
        yield "metadata", json.dumps(metadata, ensure_ascii=False)


def find_kind(file: OnnxFile) -> str:
    """Say what a graph is: a decoder for onnxruntime-genai, a decoder, an encoder, or other."""
    inputs = [value.name for value in file.model.graph.input]
    if any(name.startswith("past_key_values") for name in inputs):
        genai = (file.path.parent / CONFIG).is_file()
        return f"decoder with a cache{', for onnxruntime-genai' if genai else ''}"
    return "encoder" if "input_ids" in inputs else "other"


def describe_operators(file: OnnxFile) -> str:
    """Count the operators of all graphs, the most used first."""
    counts = Counter(show(node.op_type) for graph in file.graphs for node in graph.nodes)
    shown = [f"{count} {name}" for name, count in counts.most_common(_MOST)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(_MOST))
    return ", ".join([*shown, *([f"{rest} others"] if rest else [])]) or "none"


def _shown(values: Any) -> list[Any]:
    """The first values: a decoder's caches are many of one kind."""
    return [value for value in values if not value.name.startswith(("past_key", "present"))][
        :_DIMENSIONS
    ]


def _describe_value(value: Any) -> str:
    """`input_ids [batch_size, sequence_length]`."""
    dimensions = (
        show(each.dim_param) or "?" if not each.HasField("dim_value") else str(each.dim_value)
        for each in value.type.tensor_type.shape.dim[:_DIMENSIONS]
    )
    return f"{show(value.name)} [{', '.join(dimensions)}]"
