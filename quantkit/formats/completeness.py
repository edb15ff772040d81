"""Whether an artifact has every tensor of the model that its config describes.

transformers fills what is missing with random numbers, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_unchecked, summarize_names, tied_names
from quantkit.checkpoint.source import INDEXES
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.decode import find_shape
from quantkit.formats.kv_scales import KV_SCALES
from quantkit.formats.layouts import PACKED, PARTS, WEIGHT

_DESCRIPTIONS = ("quantization_config", "compression_config")
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Completeness:
    """What an artifact lacks, and what it has that nobody asks for."""

    linears: tuple[str, ...]
    """Names of the model's linear layers; those of matrices where the model cannot be built."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_completeness(artifact: Checkpoint) -> Completeness:
    """Compare the artifact's tensors with the parameters of the model."""
    index_problems, notes = _check_index(artifact)
    try:
        skeleton = build_unchecked(_without_description(artifact))
    except CheckpointError as error:
        names = sorted(_matrices(artifact))
        note = f"not checked whether all tensors are there: {error}"
        return Completeness(tuple(names), tuple(index_problems), (*notes, note))
    linears = tuple(
        name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)
    )
    problems = [*index_problems, *_check_parameters(artifact, skeleton)]
    known = set(skeleton.state_dict(keep_vars=True))
    known |= {f"{name}.{part}" for name in linears for part in PARTS}
    known |= {f"{name}.{part}" for name in _parents(linears) for part in KV_SCALES}
    unknown = sorted(artifact.tensors.keys() - known)
    if unknown:
        notes.append(
            f"{len(unknown)} tensors have no place in the model and are not read: "
            f"{', '.join(summarize_names(unknown)[:3])}"
        )
    return Completeness(linears, tuple(problems), tuple(notes))


def _without_description(artifact: Checkpoint) -> Checkpoint:
    """The same with the config of a model that is not quantized."""
    config = {key: value for key, value in artifact.config.items() if key not in _DESCRIPTIONS}
    return replace(artifact, config=MappingProxyType(config))


def _check_parameters(artifact: Checkpoint, skeleton: nn.Module) -> list[str]:
    """Find parameters without a tensor, or with one of another shape."""
    ties = tied_names(skeleton)
    missing, problems = [], []
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        shape = _find_stored_shape(artifact, name)
        if shape is None:
            if _find_stored_shape(artifact, ties.get(name, "")) is None:
                missing.append(name)
        elif shape != tuple(parameter.shape):
            problems.append(
                f"tensor {name} has the shape {list(shape)}, but config.json describes "
                f"{list(parameter.shape)}"
            )
    if missing:
        shown = ", ".join(summarize_names(missing)[:3])
        problems.insert(
            0,
            f"{len(missing)} tensors of the model are missing, which transformers would fill with "
            f"random numbers: {shown}",
        )
    return problems


def _find_stored_shape(artifact: Checkpoint, name: str) -> tuple[int, ...] | None:
    """The shape of a parameter as it is stored, maybe packed; None where it is not there."""
    module, _, leaf = name.rpartition(".")
    if leaf == WEIGHT and f"{module}.{PACKED}" in artifact.tensors:
        try:
            return find_shape(artifact, module)
        except ArtifactError:
            return None
    info = artifact.tensors.get(name)
    return None if info is None else info.shape


def _parents(names: tuple[str, ...]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _matrices(artifact: Checkpoint) -> set[str]:
    """Names of what is stored as a matrix or as packed codes."""
    return {
        module
        for module, _, leaf in (name.rpartition(".") for name in artifact.tensors)
        if leaf == PACKED
        or (leaf == WEIGHT and len(artifact.tensors[f"{module}.{WEIGHT}"].shape) == 2)
    }


def _check_index(artifact: Checkpoint) -> tuple[list[str], list[str]]:
    """Look at what opening has not: the total of an index, and files that no reader opens."""
    folder, problems, notes = artifact.source.folder, [], []
    used = {info.file.name for info in artifact.tensors.values()}
    index = folder / INDEXES[0]
    if index.is_file() and index.name.removesuffix(".index.json") not in used:
        metadata = _read_metadata(index)
        total = sum(info.size for info in artifact.tensors.values())
        stated = metadata.get("total_size", total)
        if stated != total:
            problems.append(f"{index.name} says {stated} bytes, the tensors have {total}")
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
    if stray:
        notes.append(f"not read, since no index names them: {', '.join(stray[:3])}")
    return problems, notes


def _read_metadata(index: object) -> Mapping[str, object]:
    metadata = read_json(index).get("metadata")  # type: ignore[arg-type]
    return metadata if isinstance(metadata, dict) else {}
