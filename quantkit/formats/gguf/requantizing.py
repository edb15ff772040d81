"""A GGUF file -> the same model in another mix of types, without the original.

Metadata, order and names stay, and so does every tensor that has its type already: its codes are
copied. What changes is decoded and encoded as llama-quantize does it (src/llama-quant.cpp of
llama.cpp, build 11549), a few rows at a time. Blocks of an architecture that is not built could
hold tensors that the mixes do not know, so such files are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.errors import ArtifactError, writing
from quantkit.formats.gguf.architecture import QUANTIZATION_VERSION, Architecture
from quantkit.formats.gguf.container import GgufFile, read_tensor_rows
from quantkit.formats.gguf.header import (
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    GgufSpec,
    MetadataValue,
    Value,
    name_part,
)
from quantkit.formats.gguf.mixes import choose_types
from quantkit.formats.gguf.tensors import ROLES, GgufTensor, name_block_tensors
from quantkit.formats.gguf.writing import plan_parts, write_gguf
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, GGUF, GgmlType
from quantkit.numerics.ggml.codec import decode, encode_rows
from quantkit.records import Artifact

FindImportance = Callable[[str, int], Tensor | None]
"""Name of a tensor and its columns -> how much an error in each counts, float32 [I]."""

_OUTSIDE = frozenset(
    {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    }
)
"""Tensors outside of the blocks."""
_NEEDED = frozenset({"token_embd.weight", "output_norm.weight"})
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)", re.ASCII)
_LAYOUT = frozenset({"general.alignment", SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS})
"""Metadata of one writing of a file; the writer has its own."""
_IMPORTANCE = "quantize.imatrix."
"""Metadata of how the codes were chosen, which are chosen anew."""
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Requantizing:
    """A GGUF file and the types that its tensors get."""

    file: GgufFile
    file_type: str
    types: Mapping[str, GgmlType]
    """Name of each tensor, in the order of the file -> its type."""
    notes: tuple[str, ...]

    @property
    def specs(self) -> tuple[GgufSpec, ...]:
        """What is written, in the order of the file."""
        tensors = self.file.tensors.items()
        return tuple(GgufSpec(name, self.types[name], each.shape) for name, each in tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size for spec in self.specs)


def is_quantized(file: GgufFile) -> bool:
    """Whether any weights of a file were rounded to codes."""
    return any(tensor.kind.quantized for tensor in file.tensors.values())


def plan_requantizing(
    file: GgufFile, file_type: str, *, has_importance: bool = False
) -> Requantizing:
    """Give every tensor of a file its type in another mix; headers only.

    Args:
        file: opened, with all its parts.
        file_type: a name of `FILE_TYPES`.
        has_importance: whether errors will be weighed by an importance matrix.

    Raises:
        ArtifactError: the file is of an architecture that is not built, lacks a tensor or a number
            of it, has one without a place there, or one that would have to be decoded and cannot.
        InputError: the mix needs an importance matrix.
    """
    architecture = _read_architecture(file)
    tensors = _describe_tensors(file, architecture)
    mix = choose_types(FILE_TYPES[file_type], tensors, architecture, has_importance)
    types = {
        each.name: mix.types[each.name] if each.quantizable else file.tensors[each.name].kind
        for each in tensors
    }
    undecoded = {
        file.tensors[name].kind.name
        for name, kind in types.items()
        if file.tensors[name].kind != kind
    } - GGML_TYPES.keys()
    if undecoded:
        raise ArtifactError(
            f"{file.path} has tensors of {', '.join(sorted(undecoded))}, which are not decoded "
            f"here (known: {', '.join(GGML_TYPES)}): start from the original"
        )
    return Requantizing(file, file_type, MappingProxyType(types), mix.notes)


def write_requantized(
    plan: Requantizing,
    folder: Path,
    stem: str,
    max_shard_bytes: int,
    *,
    find_importance: FindImportance,
    origin: Mapping[str, MetadataValue] = MappingProxyType({}),
) -> Artifact:
    """Write `<stem>-<type>.gguf`, or its parts, into `folder`, which is made when it is absent.

    Args:
        plan: from `plan_requantizing`.
        stem: what people call the model.
        max_shard_bytes: bytes of tensors that one file may hold.
        find_importance: for the tensors that get codes.
        origin: further metadata.

    Raises:
        ArtifactError: a tensor has values that are not finite, or that its type cannot hold.
        CheckpointError: the file changed meanwhile.
        ResourceError, OutputError: a file cannot be written; none is left under its final name.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    contents = ((name, _content(plan, name, find_importance)) for name in plan.file.tensors)
    name = f"{stem}-{plan.file_type}"
    specs, metadata = plan.specs, {**_describe(plan), **origin}
    files = write_gguf(folder, name, metadata, specs, contents, max_shard_bytes)
    parameters = sum(each.rows * each.shape[-1] for each in specs)
    return Artifact(
        name=name_part(name, 0, len(plan_parts(specs, max_shard_bytes))),
        format=GGUF,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=plan.tensor_bytes,
        bits_per_weight=8 * plan.tensor_bytes / parameters,
        file_type=plan.file_type,
    )


def _read_architecture(file: GgufFile) -> Architecture:
    """Return what the mixes must know of a model, from the metadata of its file."""
    name = file.find_text("general.architecture") or ""
    if name_block_tensors(name) is None:
        raise ArtifactError(
            f"{file.path} is of the architecture {name!r}, which is not built: start from the "
            f"original"
        )
    counts = {
        key: file.find(f"{name}.{key}")
        for key in ("block_count", "embedding_length", "attention.head_count")
    }
    heads = counts["attention.head_count"]
    counts["attention.head_count_kv"] = file.find(f"{name}.attention.head_count_kv") or heads
    numbers = [number for number in counts.values() if type(number) is int and number > 0]
    if len(numbers) < len(counts):
        raise ArtifactError(
            f"{file.path} does not say one positive number for each of "
            f"{', '.join(f'{name}.{key}' for key in counts)}: convert the original again"
        )
    blocks, hidden, heads, key_value_heads = numbers
    return Architecture(
        name=name,
        config=MappingProxyType({}),
        blocks=blocks,
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=hidden // heads,
        hidden=hidden,
        rope=MappingProxyType({}),
        sliding_rope=None,
    )


def _describe_tensors(file: GgufFile, architecture: Architecture) -> tuple[GgufTensor, ...]:
    """Return the tensors of a file as the mixes look at them, in its order."""
    known = name_block_tensors(architecture.name)
    assert known is not None
    needed, biases = known
    tensors, odd = [], []
    for name, stored in file.tensors.items():
        match = _BLOCK.fullmatch(name)
        inner, block = (name, None) if match is None else (match[2], int(match[1]))
        allowed = _OUTSIDE if match is None else needed | biases
        known_block = block is None or block < architecture.blocks
        if inner not in allowed or not known_block or not 0 < len(stored.shape) < 3:
            odd.append(name)
        stem, _, kind = inner.rpartition(".")
        role = stem if stem in ROLES and kind == "weight" else "other"
        tensors.append(GgufTensor(name, None, stored.shape, role=role, block=block))
    if odd:
        raise ArtifactError(
            f"{file.path} has tensors without a place in {architecture.name}, for instance "
            f"{odd[0]}: such models are not built"
        )
    # Each is there at most once, so their number tells whether one is missing.
    present = sum(
        each.name.split(".", 2)[-1] in needed for each in tensors if each.block is not None
    )
    if present < architecture.blocks * len(needed) or not file.tensors.keys() >= _NEEDED:
        raise ArtifactError(
            f"{file.path} lacks tensors of {architecture.name}: `quantkit verify` tells which"
        )
    return tuple(tensors)


def _describe(plan: Requantizing) -> dict[str, MetadataValue]:
    """Return the metadata of the file with what changes in it."""
    metadata = {
        key: value
        for key, value in plan.file.metadata.items()
        if key not in _LAYOUT and not key.startswith(_IMPORTANCE)
    }
    metadata["general.file_type"] = Value("uint32", FILE_TYPES[plan.file_type].number)
    metadata["general.quantization_version"] = Value("uint32", QUANTIZATION_VERSION)
    return metadata


def _content(
    plan: Requantizing, name: str, find_importance: FindImportance
) -> Iterator[memoryview]:
    """Yield the packed rows of a tensor; codes of the type that it has already are copied."""
    stored, kind = plan.file.tensors[name], plan.types[name]
    columns = stored.shape[-1]
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    importance = None
    if kind.quantized and kind != stored.kind:
        importance = find_importance(name, columns)
    for first in range(0, stored.rows, step):
        rows = read_tensor_rows(plan.file, name, first, min(step, stored.rows - first))
        if kind != stored.kind:
            values = decode(stored.kind, rows)
            if not bool(torch.isfinite(values).all()):
                raise ArtifactError(
                    f"{plan.file.path}: tensor {name} has values that are not finite: "
                    f"`quantkit verify` tells which"
                )
            try:
                rows = encode_rows(kind, values, importance)
            except ValueError as error:
                raise ArtifactError(f"{plan.file.path}: tensor {name}: {error}") from error
        yield rows.contiguous().numpy().data.cast("B")
