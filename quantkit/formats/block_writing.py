"""Solved blocks and the checkpoint's other bytes -> a folder of safetensors files.

Every name, dtype and shape follows from the plan and the checkpoint's headers. So the headers are
written first, and one solved block at a time is asked for and streamed. What the tensors of a layer
are called and how they are shaped is for a `Dialect` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.headers import ITEM_BYTES
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_skeleton, tied_names
from quantkit.errors import writing
from quantkit.formats.layouts import SCALE
from quantkit.formats.passthrough import is_same, read_content
from quantkit.formats.shards import DTYPE_NAMES, Content, TensorSpec, write_shards
from quantkit.formats.sidecars import copy_side_files
from quantkit.records import (
    Artifact,
    BlockPlan,
    KvCachePlan,
    LinearPlan,
    Plan,
    QuantizedLayer,
    SolvedBlock,
)


@dataclass(frozen=True)
class Dialect:
    """How a format stores quantized layers and the scales of a key/value cache.

    specify_layer: a planned layer, and safetensors' name of the dtype of scales -> its tensors.
    encode_part: a solved layer and the last part of a name -> the tensor. parts: last parts of the
    names of a layer's tensors.
    specify_scales: the planned cache, a prefix of names and the dtype of scales -> the tensors of
    the cache of the layers behind the prefix. place_scales: a solved block's `added` -> the same
    under the names and shapes of the format.
    is_late: whether a tensor of a layer is a scale of one number or a few, which lies behind all
    blocks: between two blocks it would move the wide elements of the next one off their boundaries.
    write_documents: the checkpoint, the plan, the model's skeleton and the folder -> sha256 of each
    file that describes the layers; config.json is the last one that it writes, since readers take
    a folder that has a config for a model.
    """

    format: str
    parts: frozenset[str]
    specify_layer: Callable[[LinearPlan, str], tuple[TensorSpec, ...]]
    encode_part: Callable[[QuantizedLayer, str], Tensor]
    specify_scales: Callable[[KvCachePlan | None, str, str], tuple[TensorSpec, ...]]
    place_scales: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    is_late: Callable[[TensorSpec], bool]
    write_documents: Callable[[Checkpoint, Plan, torch.nn.Module, Path], dict[str, str]]


@dataclass(frozen=True)
class _Section:
    """Tensors that lie together: those of a block or, with `block` None, those outside of all."""

    block: BlockPlan | None
    specs: tuple[TensorSpec, ...]
    late: tuple[TensorSpec, ...] = ()
    """What comes with the block and lies behind all blocks."""
    cache_scales: frozenset[str] = frozenset()
    """Names of those of `late` that are scales of the key/value cache."""


def write_blocks(
    checkpoint: Checkpoint,
    plan: Plan,
    blocks: Callable[[int], SolvedBlock],
    folder: Path,
    max_shard_bytes: int,
    dialect: Dialect,
) -> Artifact:
    """Write the artifact into `folder`, which is made when it is absent.

    Args:
        checkpoint: every tensor that `blocks` does not replace is copied from it.
        plan: made for `checkpoint`.
        blocks: returns the solved block with an index; called once a block and in their order, so
            that one block is in memory at a time.
        folder: holds no artifact yet.
        max_shard_bytes: bytes of tensors that one file may hold.
        dialect: of the format.

    Returns:
        The artifact with the hashes of its files. Equal input gives equal bytes.

    Raises:
        CheckpointError: the checkpoint is quantized already, or one of its files is damaged.
        ResourceError, OutputError: a file cannot be written; no weights are left in `folder`.
        ValueError: a solved block does not fit the plan.
    """
    skeleton = build_skeleton(checkpoint)
    sections = _lay_out(checkpoint, plan, _find_tied_copies(checkpoint, skeleton), dialect)
    specs = [spec for section in sections for spec in section.specs]
    contents = _stream(checkpoint, sections, blocks, dialect)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(folder, specs, contents, max_shard_bytes)
    files |= copy_side_files(checkpoint, folder)
    files |= dialect.write_documents(checkpoint, plan, skeleton, folder)
    tensor_bytes = sum(spec.size for spec in specs)
    return Artifact(
        name=folder.name,
        format=dialect.format,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=tensor_bytes,
        bits_per_weight=8 * tensor_bytes / plan.parameters,
    )


def plain_config(checkpoint: Checkpoint) -> dict[str, object]:
    """Return the checkpoint's config without what names code, which stays behind."""
    return {key: value for key, value in checkpoint.config.items() if key != "auto_map"}


def _find_tied_copies(checkpoint: Checkpoint, skeleton: torch.nn.Module) -> frozenset[str]:
    """Name the stored tensors that the model ties to another stored one with the same bytes.

    transformers leaves tensors that differ untied, so those are kept.
    """
    stored = checkpoint.tensors
    return frozenset(
        target
        for target, source in tied_names(skeleton).items()
        if target in stored and source in stored and is_same(checkpoint, target, source)
    )


def _lay_out(
    checkpoint: Checkpoint, plan: Plan, dropped: frozenset[str], dialect: Dialect
) -> tuple[_Section, ...]:
    """Say which tensors the artifact has, and in which order.

    First those outside of blocks, then block by block, then what is late. Within a section wide
    elements come first, so that tensors start at multiples of their element size; then it goes by
    name.
    """
    names = sorted(checkpoint.tensors.keys() - dropped)
    members: dict[str, list[str]] = {block.prefix: [] for block in plan.blocks}
    outside: list[str] = []
    for name in names:
        prefix = next((prefix for prefix in members if name.startswith(f"{prefix}.")), None)
        (outside if prefix is None else members[prefix]).append(name)
    scale_dtype = DTYPE_NAMES[getattr(torch, plan.scale_dtype)]
    sections = [_Section(None, _arrange(_copied(checkpoint, outside)))]
    for block in plan.blocks:
        quantized = _quantized(block)
        taken = {f"{name}.weight" for name in quantized}
        rest = _copied(checkpoint, [name for name in members[block.prefix] if name not in taken])
        late: list[TensorSpec] = []
        for name in members[block.prefix]:
            if name not in taken:
                continue
            for spec in dialect.specify_layer(quantized[name.removesuffix(".weight")], scale_dtype):
                (late if dialect.is_late(spec) else rest).append(spec)
        scales = dialect.specify_scales(plan.kv_cache, f"{block.prefix}.", scale_dtype)
        late += scales
        names_of_scales = frozenset(spec.name for spec in scales)
        sections.append(_Section(block, _arrange(rest), _arrange(late), names_of_scales))
    late = [spec for section in sections for spec in section.late]
    return (*sections, _Section(None, _arrange(late)))


def _quantized(block: BlockPlan) -> dict[str, LinearPlan]:
    """The block's quantized layers by name."""
    return {linear.name: linear for linear in block.linears if linear.quantized}


def _copied(checkpoint: Checkpoint, names: Iterable[str]) -> list[TensorSpec]:
    """Announce tensors of the checkpoint that keep their names, dtypes and shapes."""
    infos = (checkpoint.tensors[name] for name in names)
    return [TensorSpec(info.name, info.dtype, info.shape) for info in infos]


def _arrange(specs: list[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name)))


def _stream(
    checkpoint: Checkpoint,
    sections: Iterable[_Section],
    blocks: Callable[[int], SolvedBlock],
    dialect: Dialect,
) -> Iterator[tuple[str, Content]]:
    """Yield every tensor in the order of the specs."""
    late: dict[str, Tensor] = {}
    for section in sections:
        yield from _contents(checkpoint, section, blocks, late, dialect)


def _contents(
    checkpoint: Checkpoint,
    section: _Section,
    blocks: Callable[[int], SolvedBlock],
    late: dict[str, Tensor],
    dialect: Dialect,
) -> Iterator[tuple[str, Content]]:
    """Yield the tensors of a section in the order of its specs; put what is late into `late`.

    The solved block lives in this frame: it is gone before the next one is asked for.

    Raises:
        ValueError: the solved block is not what was planned.
    """
    layers: dict[str, QuantizedLayer] = {}
    made: dict[str, Tensor] = late
    if section.block is not None:
        solved = blocks(section.block.index)
        added = dialect.place_scales(solved.added)
        _check_block(section, solved, added)
        layers = {layer.name: layer for layer in solved.layers}
        made = {**solved.dense, **added}
    for spec in (*section.late, *section.specs):
        module, _, leaf = spec.name.rpartition(".")
        content: Content
        if module in layers and leaf in dialect.parts:
            content = dialect.encode_part(layers[module], leaf)
        elif spec.name in made:
            content = made[spec.name]
        else:
            content = read_content(checkpoint, spec.name)
        if spec in section.late and isinstance(content, Tensor):
            late[spec.name] = content
        else:
            yield spec.name, content


def _check_block(section: _Section, solved: SolvedBlock, added: Mapping[str, Tensor]) -> None:
    """Refuse a solved block of which something would be lost or mistaken."""
    planned = {} if section.block is None else _quantized(section.block)
    found = {layer.name: (layer.scheme.name, layer.group_size) for layer in solved.layers}
    if found != {name: (plan.scheme.name, plan.group_size) for name, plan in planned.items()}:
        raise ValueError(f"block {solved.index} was not solved as planned")
    if added.keys() != section.cache_scales:
        different = sorted(added.keys() ^ section.cache_scales)
        raise ValueError(f"block {solved.index} has other added tensors than planned: {different}")
    announced = {spec.name for spec in (*section.specs, *section.late)}
    lost = {*solved.dense, *(f"{name}.{SCALE}" for name in found)} - announced
    if lost:
        raise ValueError(f"block {solved.index} has tensors without a place: {sorted(lost)}")
