"""A checkpoint's config and headers, and its tensors one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.headers import read_header, read_index, read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.pickles import read_pickle_header, read_pickled_tensor
from quantkit.checkpoint.source import INDEXES, MODEL_CARD, list_side_files
from quantkit.errors import CheckpointError, unreadable
from quantkit.records import Source, TensorInfo

ADAPTER = "adapter_config.json"
"""File beside the weights that makes transformers change them, where peft is installed."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""safetensors' name of a dtype -> torch's."""


@dataclass(frozen=True)
class Checkpoint:
    """What a model folder holds, known from its config and headers."""

    source: Source
    config: Mapping[str, Any]
    """config.json as it is."""
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[Path, ...]
    """Tokenizer, generation config, terms: whichever are there."""


def open_checkpoint(source: Source) -> Checkpoint:
    """Read the config and every header of a checkpoint, and check them against each other.

    No weight is read. A quantized checkpoint opens too; the skeleton refuses it.

    Raises:
        CheckpointError: a file is missing, damaged, refused, or at odds with another; or there is
            an adapter, so that the weights are not all of the model.
    """
    folder = source.folder
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}), which some programs apply to the weights and "
            f"others do not: merge it (peft's merge_and_unload, then save_pretrained), or take "
            f"{ADAPTER} out of the folder if the model is meant without it"
        )
    path = join_inside(folder, "config.json")
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a Hugging Face model folder; "
            f"{_say_what_instead(folder)}"
        )
    config = read_json(path)
    side_files = tuple(join_inside(folder, name) for name in list_side_files(folder))
    # Its terms are taken over into an artifact's card, hours later.
    join_inside(folder, MODEL_CARD)
    tensors = dict(sorted(_find_tensors(folder).items()))
    return Checkpoint(source, MappingProxyType(config), MappingProxyType(tensors), side_files)


def _say_what_instead(folder: Path) -> str:
    """What a folder without config.json is, as far as its files tell, and which one is meant."""
    if (folder / "quantkit.json").is_file():
        return "it is the output of a job: name the original model, or a folder in the output"
    if any(folder.glob("*.gguf")):
        return "its weights are GGUF: name the original model that they were made from"
    return "name the folder that holds config.json, tokenizer and weights"


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read one tensor, in its own dtype and shape, into memory of its own.

    Plain reads rather than a memory map: mapped pages count as the process's memory, and a file
    that shrinks under a map kills the process.

    Raises:
        CheckpointError: the file changed since it was opened, or a value is NaN or infinite.
    """
    info = checkpoint.tensors[name]
    tensor = read_pickled_tensor(info) if info.file.suffix == ".bin" else _read(info)
    check_finite(info, tensor)
    return tensor


def read_below(checkpoint: Checkpoint, prefix: str) -> Mapping[str, Tensor]:
    """Read all tensors of a module, as `read_tensor` does, by their full names.

    Args:
        prefix: full name of the module.

    Raises:
        CheckpointError: as `read_tensor`.
    """
    names = [name for name in checkpoint.tensors if name.startswith(f"{prefix}.")]
    return {name: read_tensor(checkpoint, name) for name in names}


def check_finite(info: TensorInfo, tensor: Tensor) -> None:
    """Refuse a tensor with a NaN or an infinity.

    Raises:
        CheckpointError: there is one; the tensor is named and they are counted.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.half() if tensor.element_size() == 1 else tensor
    # Extremes carry every NaN and infinity, without a mask as large as the tensor.
    if bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        return
    count = sum(int((~torch.isfinite(part)).sum()) for part in values.flatten().split(1 << 20))
    raise CheckpointError(
        f"tensor {info.name} in {info.file} holds {count} NaN or infinite "
        f"value{'s' if count != 1 else ''} of {tensor.numel()}: the checkpoint is damaged"
    )


def hash_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the sha256 of the config, the side files, the index and the weights.

    Names are relative to the checkpoint's folder.

    Raises:
        CheckpointError: a file cannot be read.
    """
    folder = checkpoint.source.folder
    paths = {folder / "config.json", *checkpoint.side_files}
    paths |= {info.file for info in checkpoint.tensors.values()}
    paths |= {path for index in INDEXES if (path := join_inside(folder, index)).is_file()}
    return {path.relative_to(folder).as_posix(): _hash(path) for path in sorted(paths)}


def _find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return the headers of the preferred kind of weights that the folder has."""
    for index in INDEXES:
        index_path = join_inside(folder, index)
        single = join_inside(folder, index.removesuffix(".index.json"))
        # transformers prefers the single file as well where both are there.
        if single.is_file():
            return _read_headers(single)
        if index_path.is_file():
            return _read_shards(folder, index_path)
    raise CheckpointError(
        f"{folder} holds no weights: neither model.safetensors nor {INDEXES[0]}; download or copy "
        f"them there"
    )


def _read_shards(folder: Path, index_path: Path) -> dict[str, TensorInfo]:
    """Read the headers of all shards and compare them with the index."""
    places = read_index(index_path)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(places.values())):
        shard = join_inside(folder, file)
        if not shard.is_file():
            raise CheckpointError(
                f"shard {file} is missing: {index_path} names it; download or copy it again"
            )
        found = _read_headers(shard)
        twice = tensors.keys() & found.keys()
        if twice:
            name = min(twice)
            raise CheckpointError(
                f"tensor {name!r} is in two shards, {tensors[name].file.name} and {file}"
            )
        tensors |= found
    for name, file in sorted(places.items()):
        if name not in tensors or tensors[name].file != folder / file:
            raise CheckpointError(
                f"tensor {name!r} is missing in {file}, where {index_path} says that it is"
            )
    return tensors


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    return read_pickle_header(path) if path.suffix == ".bin" else read_header(path)


def _read(info: TensorInfo) -> Tensor:
    buffer = torch.empty(info.size, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with info.file.open("rb", buffering=0) as handle:
            handle.seek(info.start)
            filled = 0
            while filled < info.size:
                count = handle.readinto(view[filled:])
                if not count:
                    raise CheckpointError(f"{info.file} was cut short while it was in use")
                filled += count
    except OSError as error:
        raise unreadable(info.file, error) from error
    return buffer.view(DTYPES[info.dtype]).reshape(info.shape)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def read_pieces(path: Path) -> Iterator[memoryview]:
    """Yield a file's bytes; a piece is valid until the next one is asked for.

    Raises:
        CheckpointError: it cannot be read.
    """
    buffer = memoryview(bytearray(1 << 20))
    try:
        with path.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        raise unreadable(path, error) from error
