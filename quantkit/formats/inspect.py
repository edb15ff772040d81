"""What is in an artifact or a checkpoint, from its config and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from quantkit.checkpoint.headers import ITEM_BYTES, read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.decode import find_config_groups, find_layout, open_artifact
from quantkit.formats.packed_layers import PACKED, SCALE, PackedLayout, find_scheme
from quantkit.records import TensorInfo, Verdict

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

_OTHER_FILES = {".gguf": "GGUF", ".onnx": "ONNX"}
_OTHER_CONFIGS = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
_OTHER_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "modelopt": "ModelOpt"}
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)


@dataclass(frozen=True)
class InspectedLayer:
    """One matrix of the model as it is stored."""

    name: str
    scheme: str
    """quantkit's name of the scheme where it has one; `none` for floating point."""
    group_size: int | None
    """Columns that share a scale; None: one scale per row, or no scales."""
    bits: int
    """Bits of one stored weight, scales not counted."""
    shape: tuple[int, ...]
    """Of the weight, [O, I]."""
    size: int
    """Bytes of all tensors of the layer, scales included, bias not."""


@dataclass(frozen=True)
class Inspection:
    """What an artifact holds."""

    folder: Path
    """Where config.json and the weights are."""
    format: str
    scheme: str
    """The schemes of the quantized layers in a few words, most used first; or `none`."""
    architecture: str
    layers: tuple[InspectedLayer, ...]
    tensors: Mapping[str, int]
    """dtype -> number of tensors."""
    parameters: int
    """Weights of the model; scales, zero points and shapes do not count."""
    tensor_bytes: int
    bits_per_weight: float
    """8 * tensor_bytes / parameters."""
    quantization_config: Mapping[str, Any] | None
    verdict: Verdict | None
    """The gate's, where quantkit.json lies beside and has one."""
    problems: tuple[str, ...]
    """What is wrong with the artifact, one line each."""


def inspect_artifact(path: Path) -> Inspection:
    """Look into an artifact.

    Args:
        path: an output folder of quantkit, a compressed-tensors folder, or a checkpoint.

    Raises:
        ArtifactError: nothing is there, it is of a format that is not read yet, or its files are
            damaged.
    """
    folder = _find_folder(path)
    artifact = open_artifact(folder)
    description = artifact.config.get("quantization_config")
    _check_readable(folder, description)
    problems: list[str] = []
    layers = tuple(_inspect_layers(artifact, problems))
    problems += _find_problems(artifact, layers)
    parameters = _count_parameters(artifact, layers)
    tensor_bytes = sum(info.size for info in artifact.tensors.values())
    verdict = _find_verdict(folder, problems)
    architectures = artifact.config.get("architectures")
    return Inspection(
        folder=folder,
        format=PLAIN if description is None else COMPRESSED_TENSORS,
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
        verdict=verdict,
        problems=tuple(problems),
    )


def _find_folder(path: Path) -> Path:
    """The folder that holds the weights of the artifact at `path`.

    Raises:
        ArtifactError: there is none, or it is of a format that is not read yet.
    """
    if not path.exists():
        raise ArtifactError(f"there is no artifact at {path}")
    if path.suffix in _OTHER_FILES:
        raise ArtifactError(_not_yet(path, _OTHER_FILES[path.suffix]))
    if not path.is_dir():
        raise ArtifactError(f"{path} is a file: name the folder that holds config.json")
    if (path / "quantkit.json").is_file() and (path / COMPRESSED_TENSORS).is_dir():
        return path / COMPRESSED_TENSORS
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        for suffix, name in _OTHER_FILES.items():
            if any(path.glob(f"*{suffix}")):
                raise ArtifactError(_not_yet(path, name))
    return path


def _not_yet(path: Path, name: str) -> str:
    return (
        f"{path} holds {name}, which cannot be read yet "
        f"(known: compressed-tensors, checkpoints that are not quantized)"
    )


def _check_readable(folder: Path, description: object) -> None:
    """Refuse quantized formats other than compressed-tensors' integer and float ones.

    Raises:
        ArtifactError: the format is named.
    """
    if description is None:
        for file, name in _OTHER_CONFIGS.items():
            if (folder / file).is_file():
                raise ArtifactError(_not_yet(folder, name))
        return
    if not isinstance(description, dict):
        raise ArtifactError(f"{folder / 'config.json'}: quantization_config is not an object")
    method = description.get("quant_method")
    if method != COMPRESSED_TENSORS:
        raise ArtifactError(_not_yet(folder, _OTHER_METHODS.get(str(method), repr(method))))
    layout = description.get("format")
    if layout not in _FORMATS:
        raise ArtifactError(_not_yet(folder, f"compressed-tensors of the format {layout!r}"))


def _inspect_layers(artifact: Checkpoint, problems: list[str]) -> Iterator[InspectedLayer]:
    """Yield the matrices by name; what cannot be made out becomes a problem."""
    for name, info in artifact.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == PACKED:
            try:
                layout, shape = find_layout(artifact, module)
            except ArtifactError as error:
                problems.append(str(error))
                continue
            scheme, size = _name_scheme(layout), _size_of(artifact, module)
            yield InspectedLayer(module, scheme, layout.group_size, layout.bits, shape, size)
        elif leaf == "weight" and len(info.shape) == 2:
            yield _inspect_matrix(artifact, module, info)


def _inspect_matrix(artifact: Checkpoint, module: str, info: TensorInfo) -> InspectedLayer:
    """A weight that is stored one number an element."""
    scale = artifact.tensors.get(f"{module}.{SCALE}")
    group_size = None
    if scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1:
        group_size = info.shape[1] // scale.shape[1]
    kinds = {"I8": "int8", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
    scheme = "none" if scale is None else kinds.get(info.dtype, info.dtype.lower())
    bits = 8 * ITEM_BYTES[info.dtype]
    size = _size_of(artifact, module)
    return InspectedLayer(module, scheme, group_size, bits, info.shape, size)


def _name_scheme(layout: PackedLayout) -> str:
    scheme = find_scheme(layout)
    if scheme is not None:
        return scheme.name
    return f"w{layout.bits}a16" + ("" if layout.symmetric else "_asym")


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
    if not quantized:
        problems.append("config.json describes a quantized model, but no layer is quantized")
    ignored = description.get("ignore")
    names = set(map(str, ignored)) if isinstance(ignored, list) else set()
    for name in sorted(quantized & names):
        problems.append(f"layer {name} is quantized, but config.json ignores it")
    plain = {layer.name for layer in layers} - quantized
    targets = {target for group in find_config_groups(artifact.config) for target in group.targets}
    for name in sorted(plain & targets):
        problems.append(f"layer {name} is not quantized, but config.json says that it is")
    for layer in layers:
        if {f"{layer.name}.weight", f"{layer.name}.{PACKED}"} <= artifact.tensors.keys():
            problems.append(f"layer {layer.name} is stored twice, quantized and not")
    scales = any(name.endswith((".k_scale", ".v_scale")) for name in artifact.tensors)
    if description.get("kv_cache_scheme") and not scales:
        problems.append(
            "config.json describes a quantized KV cache, but no scale is stored: "
            "servers take 1.0 for it without a word"
        )
    return problems


def _summarize(layers: Sequence[InspectedLayer]) -> str:
    counts = Counter(
        f"{layer.scheme} {f'g{layer.group_size}' if layer.group_size else 'channel'}"
        for layer in layers
        if layer.scheme != "none"
    )
    return ", ".join(sorted(counts, key=lambda words: (-counts[words], words))) or "none"


def find_evidence(folder: Path) -> Path | None:
    """Return the quantkit.json of the output that `folder` is, or that it lies in as its artifact.

    Args:
        folder: where the config and the weights are, as in `Inspection.folder`.
    """
    places = [folder]
    if folder.absolute().name == COMPRESSED_TENSORS:
        places.append(folder.absolute().parent)
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
