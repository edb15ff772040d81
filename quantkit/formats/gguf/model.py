"""A checkpoint and its encoded layers -> one GGUF file, split where it is large.

Names, types and metadata follow from headers alone, so a file is planned before any work. Layers
that were solved come as packed rows; everything else is read from the checkpoint, a few rows at a
time, and encoded as llama.cpp does it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.durable import write_text
from quantkit.errors import CheckpointError, RecipeError, writing
from quantkit.formats.gguf.architecture import (
    Architecture,
    describe_architecture,
    note_differences,
    read_architecture,
)
from quantkit.formats.gguf.header import GgufSpec, MetadataValue, Value, name_part
from quantkit.formats.gguf.imatrix import Imatrix
from quantkit.formats.gguf.mixes import choose_types, fit_candidates, nearest_file_type
from quantkit.formats.gguf.modelfile import compose_modelfile
from quantkit.formats.gguf.tensors import GgufTensor, lay_out_tensors, make_values, permute_rows
from quantkit.formats.gguf.tokenizer import TokenizerMetadata, read_tokenizer
from quantkit.formats.gguf.writing import plan_parts, write_gguf
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, GGUF
from quantkit.numerics.ggml.codec import divide_rows, encode_rows
from quantkit.records import Artifact, GgufPlan


@dataclass(frozen=True)
class SolvedTensor:
    """What a job found for one tensor of the checkpoint, rows in the order of the checkpoint.

    rows: packed, uint8 [O, row bytes]; None where it was not solved. divisor: float32 [O], what
    its rows or elements are to be divided by; None for nothing.
    """

    rows: Tensor | None = None
    divisor: Tensor | None = None


@dataclass(frozen=True)
class GgufModel:
    """A checkpoint as GGUF files have it."""

    checkpoint: Checkpoint
    architecture: Architecture
    tensors: tuple[GgufTensor, ...]
    tokenizer: TokenizerMetadata
    pre_tokenizer: str | None
    """llama.cpp's name of it, where it was said."""


def open_model(checkpoint: Checkpoint, pre_tokenizer: str | None = None) -> GgufModel:
    """Return what all GGUF files of a checkpoint have in common.

    Reads the tokenizer, which takes seconds where the vocabulary is large.

    Args:
        checkpoint: of an architecture that is built.
        pre_tokenizer: llama.cpp's name of it, where it is not recognised.

    Raises:
        CheckpointError: the architecture, a tensor or the tokenizer cannot be expressed.
        RecipeError: there is no such pre-tokenizer.
    """
    architecture = read_architecture(checkpoint)
    tensors = lay_out_tensors(checkpoint, architecture)
    vocabulary = int(architecture.config["vocab_size"])
    tokenizer = read_tokenizer(checkpoint.source.folder, vocabulary, pre_tokenizer)
    return GgufModel(checkpoint, architecture, tensors, tokenizer, pre_tokenizer)


FindSolved = Callable[[int, str], SolvedTensor]
"""Index of a block and full name of a tensor in the checkpoint -> what was solved of it."""

FindImportance = Callable[[str, int], Tensor | None]
"""Name of a tensor in the file and its columns -> how much an error in each counts, float32 [I]."""

_ROWS_AT_ONCE = 1 << 22
"""Weights that are brought to float32 at a time."""

_OUTSIDE = "Q4_K_M"
"""The mix that gives what lies outside of the blocks its types where those inside are chosen."""


def plan_file(
    model: GgufModel,
    file_type: str,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    has_importance: bool = True,
    candidates: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
) -> GgufPlan:
    """Say what a GGUF file of a model will hold.

    Args:
        file_type: a name of `FILE_TYPES`; any other with `candidates`.
        overrides: shell patterns of full tensor names in the checkpoint, and their types; the first
            match wins.
        has_importance: whether errors will be weighed by statistics, which some mixes look at.
        candidates: types among which each weight of a block has its own choice, as far as no
            override takes it; other tensors have what the mix Q4_K_M gives them.
        chosen: name of a tensor in the checkpoint -> its type, where that choice was made.

    Raises:
        RecipeError: an override matches nothing, or its type does not fit a tensor.
        InputError: the file type needs such statistics.
    """
    overridden = _override(model.tensors, overrides)
    free = _find_free(model.tensors, candidates)
    mix = choose_types(
        FILE_TYPES[_OUTSIDE if candidates else file_type],
        [each for each in model.tensors if each.name not in free],
        model.architecture,
        has_importance,
    )
    types = {name: kind.name for name, kind in mix.types.items()}
    for each in model.tensors:
        if each.name in free:
            smallest = min(free[each.name], key=lambda name: GGML_TYPES[name].bits_per_weight)
            types[each.name] = (chosen or {}).get(str(each.source), smallest)
    types |= overridden
    specs = _specify(model.tensors, types)
    return GgufPlan(
        type=file_type,
        types=MappingProxyType(types),
        weights=MappingProxyType(
            {each.source: types[each.name] for each in model.tensors if each.source is not None}
        ),
        tensor_bytes=sum(spec.size for spec in specs),
        notes=(
            *note_differences(model.architecture),
            *mix.notes,
            *_note_choice(model.tensors, candidates, free, overridden),
            *model.tokenizer.notes,
        ),
        pre_tokenizer=model.pre_tokenizer,
        candidates=MappingProxyType(
            {
                str(each.source): free[each.name]
                for each in model.tensors
                if chosen is None and each.name in free and each.name not in overridden
            }
        ),
    )


def _find_free(
    tensors: Sequence[GgufTensor], candidates: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return each tensor that is to have a type of its own choice, and the types that fit it."""
    if not candidates:
        return {}
    return {
        each.name: fit_candidates(candidates, each.shape[-1])
        for each in tensors
        if each.block is not None and each.quantizable
    }


def _note_choice(
    tensors: Sequence[GgufTensor],
    candidates: Sequence[str],
    free: Mapping[str, Sequence[str]],
    overridden: Mapping[str, str],
) -> Iterator[str]:
    """Say where a choice of types is narrower than the recipe's candidates."""
    taken = len(free.keys() & overridden)
    if taken:
        yield f"overrides, not the choice, give {taken} of {len(free)} layers their type"
    for columns in sorted({each.shape[-1] for each in tensors if each.name in free}):
        fitting = fit_candidates(candidates, columns)
        if set(fitting) != set(candidates):
            yield (
                f"{columns} columns are not whole blocks of all candidates: rows of so many have "
                f"{', '.join(fitting)} to choose from"
            )


def write_model(
    model: GgufModel,
    plan: GgufPlan,
    folder: Path,
    stem: str,
    max_shard_bytes: int,
    *,
    find_solved: FindSolved,
    find_importance: FindImportance,
    origin: Mapping[str, MetadataValue] = MappingProxyType({}),
) -> Artifact:
    """Write `<stem>-<type>.gguf`, or its parts, and Ollama's Modelfile into `folder`.

    Args:
        model: that `plan` was made for.
        plan: of the file.
        folder: made when it is absent.
        stem: what people call the model.
        max_shard_bytes: bytes of tensors that one file may hold.
        find_solved: the solved layers; called in the order of the blocks.
        find_importance: for what was not solved.
        origin: further metadata.

    Returns:
        The artifact with the hashes of its files. Equal input gives equal bytes.

    Raises:
        CheckpointError: a file of the checkpoint is damaged.
        ResourceError, OutputError: a file cannot be written; no weights are left in `folder`.
    """
    specs = _specify(model.tensors, plan.types)
    parameters = sum(each.parameters for each in model.tensors if each.source is not None)
    file_type = FILE_TYPES.get(plan.type) or nearest_file_type(model.tensors, plan.types)
    metadata: dict[str, MetadataValue] = {
        **describe_architecture(model.architecture, parameters, stem, file_type),
        **model.tokenizer.values,
        **origin,
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint, types = model.checkpoint, plan.types
    contents = (
        (each.name, _content(checkpoint, each, types[each.name], find_solved, find_importance))
        for each in model.tensors
    )
    name = f"{stem}-{plan.type}"
    files = write_gguf(folder, name, metadata, specs, contents, max_shard_bytes)
    first = name_part(name, 0, len(plan_parts(specs, max_shard_bytes)))
    context = int(model.architecture.config["max_position_embeddings"])
    text = compose_modelfile(first, checkpoint.source.folder, metadata, context)
    write_text(folder / "Modelfile", text)
    files["Modelfile"] = hashlib.sha256(text.encode()).hexdigest()
    return Artifact(
        name=first,
        format=GGUF,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=plan.tensor_bytes,
        bits_per_weight=8 * plan.tensor_bytes / parameters,
        file_type=plan.type,
    )


def describe_imatrix(matrix: Imatrix, name: str) -> dict[str, MetadataValue]:
    """Say which importance matrix a file was made with, under llama-quantize's keys."""
    found: dict[str, MetadataValue] = {"quantize.imatrix.file": Value("string", name)}
    if matrix.datasets:
        found["quantize.imatrix.dataset"] = Value("string", matrix.datasets[0])
    found["quantize.imatrix.entries_count"] = Value("int32", len(matrix.entries))
    if matrix.chunks:
        found["quantize.imatrix.chunks_count"] = Value("int32", matrix.chunks)
    return found


def _specify(tensors: Sequence[GgufTensor], types: Mapping[str, str]) -> list[GgufSpec]:
    return [GgufSpec(each.name, GGML_TYPES[types[each.name]], each.shape) for each in tensors]


def _override(
    tensors: Sequence[GgufTensor], overrides: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Return the types that overrides give to tensors, by their name in the file.

    Raises:
        RecipeError: see `plan_file`.
    """
    found: dict[str, str] = {}
    for pattern, name in overrides:
        kind = GGML_TYPES[name]
        matching = [each for each in tensors if fnmatchcase(each.source or "", pattern)]
        if not matching:
            raise RecipeError(f"override {pattern!r} matches no tensor of the checkpoint")
        for each in matching:
            if not each.quantizable:
                raise RecipeError(
                    f"override {pattern!r} matches {each.source}, which llama.cpp wants in F32"
                )
            if each.shape[-1] % kind.block:
                raise RecipeError(
                    f"override {pattern!r}: {each.source} has {each.shape[-1]} columns, which are "
                    f"not whole blocks of {kind.block} of {name}"
                )
            found.setdefault(each.name, name)
    return found


def _content(
    checkpoint: Checkpoint,
    tensor: GgufTensor,
    kind: str,
    find_solved: FindSolved,
    find_importance: FindImportance,
) -> Tensor | Iterator[memoryview]:
    """Return the packed rows of a tensor in the order of the file."""
    if tensor.source is None:
        return encode_rows(GGML_TYPES[kind], make_values(tensor, None).reshape(1, -1), None)
    found = SolvedTensor()
    if tensor.block is not None:
        found = find_solved(tensor.block, tensor.source)
    if found.rows is None or not GGML_TYPES[kind].quantized:
        return _encode(checkpoint, tensor, kind, find_importance, found.divisor)
    rows: Tensor | None = found.rows
    if found.divisor is not None:
        rows = divide_rows(GGML_TYPES[kind], found.rows, found.divisor)
    if rows is None:
        raise ValueError(f"{tensor.source}: its scales cannot be divided, which was checked")
    return permute_rows(tensor, rows)


def _encode(
    checkpoint: Checkpoint,
    tensor: GgufTensor,
    kind: str,
    find_importance: FindImportance,
    divisor: Tensor | None,
) -> Iterator[memoryview]:
    """Encode a tensor of the checkpoint, a few rows at a time."""
    weight = read_tensor(checkpoint, str(tensor.source))
    columns = weight.shape[-1]
    if divisor is not None:
        weight = (weight.float() + tensor.added) / divisor.reshape(-1, *[1] * (weight.dim() - 1))
    added = tensor.added if divisor is None else 0.0
    weight = permute_rows(tensor, weight)
    importance = find_importance(tensor.name, columns) if GGML_TYPES[kind].quantized else None
    for part in weight.reshape(-1, columns).split(max(1, _ROWS_AT_ONCE // columns)):
        values = part.float() + added if added else part.float()
        try:
            rows = encode_rows(GGML_TYPES[kind], values, importance)
        except ValueError as error:
            raise CheckpointError(
                f"{tensor.source}: {error}; give this tensor the type F32 with an override of the "
                f"export"
            ) from error
        yield rows.contiguous().numpy().data.cast("B")
