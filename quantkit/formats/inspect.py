"""What is in an artifact or a checkpoint, from its config and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from quantkit.checkpoint.headers import ITEM_BYTES, read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.config_groups import (
    check_expressions,
    find_config_groups,
    find_ignored,
    is_ignored,
)
from quantkit.formats.decode import CODE_DTYPES, find_layout, open_artifact
from quantkit.formats.gguf.inspection import find_gguf, inspect_gguf
from quantkit.formats.inspected import InspectedLayer, Inspection
from quantkit.formats.kv_scales import find_cache_problems, name_cache
from quantkit.formats.layouts import PACKED, SCALE, WEIGHT, name_scheme
from quantkit.formats.onnx.inspection import find_onnx, inspect_onnx
from quantkit.formats.readers.description import is_foreign
from quantkit.formats.readers.stored import StoredModel, open_stored
from quantkit.ggml_types import GGUF
from quantkit.records import TensorInfo, Verdict
from quantkit.schemes import MODELOPT, ONNX, SCHEMES

COMPRESSED_TENSORS = "compressed-tensors"
PLAIN = "safetensors"
"""Format of a checkpoint that is not quantized."""

_QUANTIZATION_PARAMETERS = (
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_global_scale",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "q_scale",
    "k_scale",
    "v_scale",
)
"""Last parts of the names of tensors that are not weights of the model."""

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)


def inspect_artifact(path: Path) -> Inspection:
    """Look into an artifact.

    Args:
        path: an output folder of quantkit, a compressed-tensors, GPTQ, AWQ, FP8 or ModelOpt folder,
            a checkpoint, a GGUF or ONNX file or a folder with one.

    Raises:
        ArtifactError: nothing is there, it is of a format that is not read yet, or its files are
            damaged.
    """
    file = find_gguf(path)
    if file is not None:
        return _add_verdict(inspect_gguf(file))
    graph = find_onnx(path)
    if graph is not None:
        return _add_verdict(inspect_onnx(graph))
    folder = _find_folder(path)
    artifact = open_artifact(folder)
    description = artifact.config.get("quantization_config")
    foreign = open_stored(artifact) if is_foreign(folder, artifact.config) else None
    problems: list[str] = []
    if foreign is not None:
        layers = tuple(_inspect_foreign(foreign))
        problems += foreign.problems
        parameters = foreign.parameters
    else:
        _check_readable(folder, description)
        check_expressions(artifact.config, {name.rpartition(".")[0] for name in artifact.tensors})
        layers = tuple(_inspect_layers(artifact, problems))
        problems += _find_problems(artifact, layers)
        parameters = _count_parameters(artifact, layers)
    tensor_bytes = sum(info.size for info in artifact.tensors.values())
    verdict = _find_verdict(folder, problems)
    architectures = artifact.config.get("architectures")
    return Inspection(
        folder=folder,
        format=_name_format(foreign, description),
        scheme=_summarize(layers),
        architecture=str(architectures[0])
        if isinstance(architectures, list) and architectures
        else "",
        layers=layers,
        tensors=dict(sorted(Counter(info.dtype for info in artifact.tensors.values()).items())),
        parameters=parameters,
        tensor_bytes=tensor_bytes,
        bits_per_weight=8 * tensor_bytes / parameters if parameters else 0.0,
        quantization_config=description,
        kv_cache=_name_cache(artifact, foreign),
        verdict=verdict,
        problems=tuple(problems),
    )


def _add_verdict(found: Inspection) -> Inspection:
    recorded: list[str] = []
    verdict = _find_verdict(found.folder, recorded)
    return replace(found, verdict=verdict, problems=(*found.problems, *recorded))


def _name_format(foreign: StoredModel | None, description: object) -> str:
    if foreign is not None:
        return foreign.quantization.method
    return PLAIN if description is None else COMPRESSED_TENSORS


def _name_cache(artifact: Checkpoint, foreign: StoredModel | None) -> str:
    if foreign is not None and foreign.quantization.method == MODELOPT:
        return foreign.quantization.kv_cache
    return name_cache(artifact.config)


def _find_folder(path: Path) -> Path:
    """The folder that holds the weights of the artifact at `path`.

    Raises:
        ArtifactError: there is none, or it is of a format that is not read yet.
    """
    if not path.exists():
        raise ArtifactError(f"there is no artifact at {path}")
    if not path.is_dir():
        raise ArtifactError(f"{path} is a file: name the folder that holds config.json")
    for name in (COMPRESSED_TENSORS, MODELOPT):
        if (path / "quantkit.json").is_file() and (path / name).is_dir():
            return path / name
    return path


def _not_yet(path: Path, name: str) -> str:
    return (
        f"{path} holds {name}, which cannot be read yet "
        f"(known: compressed-tensors, GPTQ, AWQ, FP8, ModelOpt, GGUF, ONNX, checkpoints that are "
        f"not quantized)"
    )


def _check_readable(folder: Path, description: object) -> None:
    """Refuse quantized formats other than compressed-tensors' integer and float ones.

    Raises:
        ArtifactError: the format is named.
    """
    if description is None:
        return
    if not isinstance(description, dict):
        raise ArtifactError(f"{folder / 'config.json'}: quantization_config is not an object")
    method = description.get("quant_method")
    if method != COMPRESSED_TENSORS:
        raise ArtifactError(_not_yet(folder, repr(method)))
    layout = description.get("format")
    if layout not in _FORMATS:
        raise ArtifactError(_not_yet(folder, f"compressed-tensors of the format {layout!r}"))


def _inspect_layers(artifact: Checkpoint, problems: list[str]) -> Iterator[InspectedLayer]:
    """Yield the matrices by name; what cannot be made out becomes a problem."""
    described = artifact.config.get("quantization_config") is not None
    groups = find_config_groups(artifact.config)
    for name, info in artifact.tensors.items():
        module, _, leaf = name.rpartition(".")
        plain = leaf == WEIGHT and len(info.shape) == 2
        if leaf == PACKED or (plain and described and info.dtype in CODE_DTYPES):
            try:
                layout, shape = find_layout(artifact, module, groups)
            except ArtifactError as error:
                problems.append(str(error))
                if plain:
                    yield _inspect_matrix(artifact, module, info)
                continue
            yield InspectedLayer(
                name=module,
                scheme=name_scheme(layout),
                group_size=layout.group_size,
                bits=layout.bits,
                shape=shape,
                size=_size_of(artifact, module),
                sharing=layout.strategy,
            )
        elif plain:
            yield _inspect_matrix(artifact, module, info)


def _inspect_foreign(model: StoredModel) -> Iterator[InspectedLayer]:
    """Yield the quantized layers of another tool's checkpoint, then its other matrices."""
    tensors = model.checkpoint.tensors
    for name, layer in model.layers.items():
        yield InspectedLayer(
            name=name,
            scheme=layer.scheme,
            group_size=layer.group_size,
            bits=layer.bits,
            shape=layer.shape,
            size=sum(tensors[part].size for part in layer.parts.values()),
            sharing=layer.sharing,
        )
    for tensor in model.others:
        module, _, leaf = tensor.rpartition(".")
        if leaf == WEIGHT and len(tensors[tensor].shape) == 2:
            yield _inspect_matrix(model.checkpoint, module, tensors[tensor])


def _inspect_matrix(artifact: Checkpoint, module: str, info: TensorInfo) -> InspectedLayer:
    """A weight that is stored one number an element, and that no config group explains."""
    scale = artifact.tensors.get(f"{module}.{SCALE}")
    group_size = None
    if scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1:
        group_size = info.shape[1] // scale.shape[1]
    kinds = {"I8": "int8", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
    scheme = "none" if scale is None else kinds.get(info.dtype, info.dtype.lower())
    bits = 8 * ITEM_BYTES[info.dtype]
    size = _size_of(artifact, module)
    sharing = "none" if scale is None else "channel" if group_size is None else "group"
    return InspectedLayer(module, scheme, group_size, bits, info.shape, size, sharing)


def _size_of(artifact: Checkpoint, module: str) -> int:
    """Bytes of a matrix with all that is needed to decode it."""
    names = (f"{module}.{leaf}" for leaf in ("weight", PACKED, *_QUANTIZATION_PARAMETERS))
    return sum(artifact.tensors[name].size for name in names if name in artifact.tensors)


def _count_parameters(artifact: Checkpoint, layers: Sequence[InspectedLayer]) -> int:
    matrices = {layer.name for layer in layers}
    count = sum(math.prod(layer.shape) for layer in layers)
    for name, info in artifact.tensors.items():
        module, _, leaf = name.rpartition(".")
        counted = leaf in ("weight", PACKED) and module in matrices
        if not counted and leaf not in _QUANTIZATION_PARAMETERS:
            count += math.prod(info.shape)
    return count


def _find_problems(artifact: Checkpoint, layers: Sequence[InspectedLayer]) -> list[str]:
    """Contradictions between the config and the tensors, on which readers fail or go wrong."""
    description = artifact.config.get("quantization_config")
    if description is None:
        return []
    quantized = {layer.name for layer in layers if layer.scheme != "none"}
    problems = []
    if not quantized and name_cache(artifact.config) == "none":
        problems.append("config.json describes a quantized model, but no layer is quantized")
    ignored = find_ignored(artifact.config)
    for name in sorted(quantized):
        if is_ignored(name, ignored):
            problems.append(f"layer {name} is quantized, but config.json ignores it")
    plain = {layer.name for layer in layers} - quantized
    targets = {name for group in find_config_groups(artifact.config) for name in group.names}
    for name in sorted(plain & targets):
        problems.append(f"layer {name} is not quantized, but config.json says that it is")
    for layer in layers:
        if {f"{layer.name}.weight", f"{layer.name}.{PACKED}"} <= artifact.tensors.keys():
            problems.append(f"layer {layer.name} is stored twice, quantized and not")
    problems += find_cache_problems(artifact)
    return problems


def _summarize(layers: Sequence[InspectedLayer]) -> str:
    counts = Counter(_describe(layer) for layer in layers if layer.scheme != "none")
    return ", ".join(sorted(counts, key=lambda words: (-counts[words], words))) or "none"


def _describe(layer: InspectedLayer) -> str:
    """Scheme and group size; schemes without groups share scales in one way only."""
    scheme = SCHEMES.get(layer.scheme)
    if scheme is not None and not scheme.grouped:
        return layer.scheme
    return f"{layer.scheme} {f'g{layer.group_size}' if layer.group_size else layer.sharing}"


def find_evidence(folder: Path) -> Path | None:
    """Return the quantkit.json of the output that `folder` is, or that it lies in as its artifact.

    Args:
        folder: where the weights are, as in `Inspection.folder`.
    """
    places, whole = [folder], folder.absolute()
    if whole.name in (COMPRESSED_TENSORS, MODELOPT, GGUF, ONNX):
        places.append(whole.parent)
    elif whole.parent.name in (GGUF, ONNX):
        # Several GGUF files or graphs of an output have a folder each.
        places.append(whole.parent.parent)
    files = (place / "quantkit.json" for place in places)
    return next((file for file in files if file.is_file()), None)


def _find_verdict(folder: Path, problems: list[str]) -> Verdict | None:
    """The verdict that the artifact's evidence has."""
    evidence = find_evidence(folder)
    if evidence is None:
        return None
    try:
        verdict = read_json(evidence).get("verdict")
    except CheckpointError as error:
        problems.append(str(error))
        return None
    return next((known for known in get_args(Verdict) if known == verdict), None)
