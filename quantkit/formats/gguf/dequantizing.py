"""A GGUF file -> a plain checkpoint with the weights that its blocks stand for.

The file says nothing of transformers' config and tokenizer that could be trusted to give the same
model back, so both are taken from the checkpoint that it was made from, with the names, the order
of rows and the shapes. Where the metadata of the file contradict it, it is another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.headers import WEIGHT_DTYPES
from quantkit.checkpoint.reader import DTYPES, Checkpoint
from quantkit.errors import ArtifactError, writing
from quantkit.formats.gguf.architecture import (
    Architecture,
    describe_architecture,
    read_architecture,
)
from quantkit.formats.gguf.container import GgufFile, read_tensor_rows
from quantkit.formats.gguf.tensors import GgufTensor, lay_out_tensors, order_rows
from quantkit.formats.shards import TensorSpec, write_document, write_shards
from quantkit.formats.sidecars import copy_side_files
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES
from quantkit.numerics.ggml.codec import decode
from quantkit.records import Artifact, Event, Progress

FORMAT = "safetensors"
_WEIGHTS_AT_ONCE = 1 << 22
_TOLERANCE = 1e-6
"""Of numbers that were float64 in config.json and are float32 in the file."""


@dataclass(frozen=True)
class Dequantizing:
    """A GGUF file, and the checkpoint whose form its weights get back."""

    file: GgufFile
    base: Checkpoint
    tensors: tuple[GgufTensor, ...]
    """Those that the checkpoint has, by its names."""
    dtype: str
    """Of the weights that are written, a key of `WEIGHT_DTYPES`."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What is written, in the order of the files."""
        code = WEIGHT_DTYPES[self.dtype]
        return tuple(TensorSpec(str(each.source), code, each.shape) for each in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size for spec in self.specs)


def plan_dequantizing(file: GgufFile, base: Checkpoint, dtype: str = "float32") -> Dequantizing:
    """Find the place of each tensor in a checkpoint; headers only.

    Args:
        file: opened, with all its parts.
        base: the plain checkpoint that the file was made from.
        dtype: of the weights; `float32` holds them exactly.

    Raises:
        ArtifactError: the file is of another model, lacks a tensor, or has a type that is not
            decoded.
        CheckpointError: `base` is of an architecture that is not built, or incomplete.
    """
    architecture = read_architecture(base)
    faults = list(_find_contradictions(file, architecture))
    layout = lay_out_tensors(base, architecture) if not faults else ()
    faults += _find_misfits(file, layout)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ArtifactError(
            f"{file.path} was not made from {base.source.name}: {faults[0]}{more}; name the "
            f"checkpoint that it was made from"
        )
    undecoded = {tensor.kind.name for tensor in file.tensors.values()} - GGML_TYPES.keys()
    if undecoded:
        raise ArtifactError(
            f"{file.path} has tensors of {', '.join(sorted(undecoded))}, which are not decoded "
            f"here (known: {', '.join(GGML_TYPES)})"
        )
    stored = (each for each in layout if each.source is not None)
    ordered = sorted(stored, key=lambda each: str(each.source))
    return Dequantizing(file, base, tuple(ordered), dtype)


def write_dequantized(
    plan: Dequantizing, folder: Path, max_shard_bytes: int, progress: Progress
) -> Artifact:
    """Write the checkpoint into `folder`, which is made when it is absent.

    Args:
        plan: from `plan_dequantizing`.
        folder: holds no weights and no config yet.
        max_shard_bytes: bytes of tensors that one file may hold.
        progress: called after each tensor.

    Raises:
        ArtifactError: a value is beyond the dtype, or is not finite.
        CheckpointError: a file changed meanwhile.
        ResourceError, OutputError: a file cannot be written; no weights are left in `folder`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(folder, plan.specs, _contents(plan, progress), max_shard_bytes)
    files |= copy_side_files(plan.base, folder)
    config = dict(plan.base.config)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    # Last: readers take a folder that has a config for a model.
    files["config.json"] = write_document(
        folder / "config.json", config | dict.fromkeys(keys, plan.dtype)
    )
    return Artifact(
        name=folder.name,
        format=FORMAT,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=plan.tensor_bytes,
        bits_per_weight=8.0 * plan.tensor_bytes / sum(each.parameters for each in plan.tensors),
    )


def _find_contradictions(file: GgufFile, architecture: Architecture) -> Iterator[str]:
    """Compare the numbers of the model; those that the file leaves to a default are not told."""
    name = file.find_text("general.architecture")
    if name != architecture.name:
        yield f"the file is of the architecture {name}, not {architecture.name}"
        return
    expected = describe_architecture(architecture, 1, "", FILE_TYPES["F32"])
    for key, value in expected.items():
        found = file.find(key)
        if not key.startswith(f"{name}.") or found is None:
            continue
        if not _agree(found, value.content):
            yield f"{key} is {str(found)[:80]!r} in the file, {value.content!r} by config.json"


def _agree(found: object, expected: object) -> bool:
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return math.isclose(found, expected, rel_tol=_TOLERANCE)
    return found == expected


def _find_misfits(file: GgufFile, layout: tuple[GgufTensor, ...]) -> Iterator[str]:
    """Compare names and shapes, and the values of what follows from the config."""
    if not layout:
        return
    names = {each.name for each in layout}
    for what, odd in (
        ("the file lacks", sorted(names - file.tensors.keys())),
        ("the checkpoint has no place for", sorted(file.tensors.keys() - names)),
    ):
        if odd:
            yield f"{what} {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}"
    for each in layout:
        stored = file.tensors.get(each.name)
        if stored is None:
            continue
        if stored.shape != each.shape:
            yield f"tensor {each.name} is {list(stored.shape)} in the file, not {list(each.shape)}"
        elif len(each.shape) == 1 and stored.kind.block > 1:
            yield f"tensor {each.name} is a vector of {stored.kind.name}, which has blocks"
        elif each.values is not None and stored.kind.name == "F32":
            values = read_tensor_rows(file, each.name).view(torch.float32).reshape(-1)
            if not torch.allclose(values, torch.tensor(each.values), rtol=_TOLERANCE):
                yield f"tensor {each.name} does not follow from config.json"


def _contents(plan: Dequantizing, progress: Progress) -> Iterator[tuple[str, Iterator[memoryview]]]:
    for done, each in enumerate(plan.tensors, start=1):
        yield str(each.source), _decode_pieces(plan, each)
        progress(Event("convert", done, len(plan.tensors), str(each.source)))


def _decode_pieces(plan: Dequantizing, tensor: GgufTensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor as the checkpoint holds them, a few rows at a time.

    Raises:
        ArtifactError: a value is beyond the dtype, or is not finite.
    """
    dtype = DTYPES[WEIGHT_DTYPES[plan.dtype]]
    for part in decode_tensor(plan.file, tensor):
        values = part.to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise ArtifactError(
                f"tensor {tensor.name} has values that are not finite, or that {plan.dtype} cannot "
                f"hold: `quantkit verify` tells which, --dtype float32 holds all finite ones"
            )
        yield values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def decode_tensor(file: GgufFile, tensor: GgufTensor) -> Iterator[Tensor]:
    """Yield float32 [R, I], the values of a tensor as the checkpoint holds them, row by row.

    Raises:
        CheckpointError: the file changed meanwhile.
    """
    kind = file.tensors[tensor.name].kind
    rows = read_tensor_rows(file, tensor.name)
    # A bias is one row of its channels, which are what moves.
    channels = rows.reshape(tensor.shape[0], -1) if kind.block == 1 else rows
    rows = restore_rows(tensor, channels).reshape(rows.shape)
    for part in rows.split(max(1, _WEIGHTS_AT_ONCE // tensor.shape[-1])):
        yield decode(kind, part) - tensor.added


def restore_rows(tensor: GgufTensor, rows: Tensor) -> Tensor:
    """Bring [R, ...] from the order of the file into that of the checkpoint, packed or not."""
    if tensor.heads is None:
        return rows
    restored = torch.empty_like(rows)
    restored[torch.from_numpy(order_rows(len(rows), tensor.heads))] = rows
    return restored
