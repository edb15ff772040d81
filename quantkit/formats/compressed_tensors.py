"""The compressed-tensors writer: solved blocks and the checkpoint's other bytes -> an artifact.

Every name, dtype and shape of the artifact follows from the plan and the checkpoint's headers. So
the headers are written first, and one solved block at a time is asked for and streamed.
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
from quantkit.formats.encoding import encode_part, specify_layer
from quantkit.formats.kv_scales import specify_scales
from quantkit.formats.layouts import INPUT_SCALE, PARTS, SCALE
from quantkit.formats.passthrough import is_same, read_content
from quantkit.formats.quantization_config import build_quantization_config
from quantkit.formats.shards import (
    DTYPE_NAMES,
    Content,
    TensorSpec,
    write_document,
    write_shards,
)
from quantkit.formats.sidecars import copy_side_files
from quantkit.records import (
    Artifact,
    BlockPlan,
    LinearPlan,
    Plan,
    QuantizedLayer,
    SolvedBlock,
)

FORMAT = "compressed-tensors"


@dataclass(frozen=True)
class _Section:
    """Tensors that lie together: those of a block or, with `block` None, those outside of all."""

    block: BlockPlan | None
    specs: tuple[TensorSpec, ...]
    late: tuple[TensorSpec, ...] = ()
    """Scales of one number or a few that come with the block and lie behind all blocks: between
    two blocks they would move the wide elements of the next one off their boundaries."""


def write_compressed_tensors(
    checkpoint: Checkpoint,
    plan: Plan,
    blocks: Callable[[int], SolvedBlock],
    folder: Path,
    max_shard_bytes: int,
) -> Artifact:
    """Write the artifact into `folder`, which is made when it is absent.

    Args:
        checkpoint: every tensor that `blocks` does not replace is copied from it.
        plan: made for `checkpoint`.
        blocks: returns the solved block with an index; called once a block and in their order, so
            that one block is in memory at a time.
        folder: holds no artifact yet.
        max_shard_bytes: bytes of tensors that one file may hold.

    Returns:
        The artifact with the hashes of its files. Equal input gives equal bytes.

    Raises:
        CheckpointError: the checkpoint is quantized already, or one of its files is damaged.
        ResourceError, OutputError: a file cannot be written; no weights are left in `folder`.
        ValueError: a solved block does not fit the plan.
    """
    skeleton = build_skeleton(checkpoint)
    sections = _lay_out(checkpoint, plan, _find_tied_copies(checkpoint, skeleton))
    specs = [spec for section in sections for spec in section.specs]
    contents = _stream(checkpoint, sections, blocks)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = write_shards(folder, specs, contents, max_shard_bytes)
    files |= copy_side_files(checkpoint, folder)
    # Last: readers take a folder that has a config for a model.
    files["config.json"] = write_document(
        folder / "config.json", _build_config(checkpoint, plan, skeleton)
    )
    tensor_bytes = sum(spec.size for spec in specs)
    return Artifact(
        name=folder.name,
        format=FORMAT,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=tensor_bytes,
        bits_per_weight=8 * tensor_bytes / plan.parameters,
    )


def _build_config(
    checkpoint: Checkpoint, plan: Plan, skeleton: torch.nn.Module
) -> dict[str, object]:
    """The checkpoint's config with the description of what is quantized."""
    modules = [
        name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    # Code stays behind, so what names it does as well.
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    description = build_quantization_config(plan.linears, modules, plan.kv_cache)
    if description is not None:
        config["quantization_config"] = description
    return config


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


def _lay_out(checkpoint: Checkpoint, plan: Plan, dropped: frozenset[str]) -> tuple[_Section, ...]:
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
    sections = [_Section(None, _arrange(_specify(checkpoint, outside, {}, scale_dtype)))]
    for block in plan.blocks:
        specs = _specify(checkpoint, members[block.prefix], _quantized(block), scale_dtype)
        late = [spec for spec in specs if spec.name.endswith(f".{INPUT_SCALE}")]
        rest = [spec for spec in specs if spec not in late]
        late += specify_scales(plan.kv_cache, f"{block.prefix}.", scale_dtype)
        sections.append(_Section(block, _arrange(rest), _arrange(late)))
    late = [spec for section in sections for spec in section.late]
    return (*sections, _Section(None, _arrange(late)))


def _quantized(block: BlockPlan) -> dict[str, LinearPlan]:
    """The block's quantized layers by name."""
    return {linear.name: linear for linear in block.linears if linear.quantized}


def _specify(
    checkpoint: Checkpoint,
    names: list[str],
    quantized: Mapping[str, LinearPlan],
    scale_dtype: str,
) -> list[TensorSpec]:
    """Announce what becomes of the checkpoint's tensors `names`."""
    specs: list[TensorSpec] = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        info = checkpoint.tensors[name]
        if leaf == "weight" and module in quantized:
            specs += specify_layer(quantized[module], scale_dtype)
        else:
            specs.append(TensorSpec(name, info.dtype, info.shape))
    return specs


def _arrange(specs: list[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name)))


def _stream(
    checkpoint: Checkpoint, sections: Iterable[_Section], blocks: Callable[[int], SolvedBlock]
) -> Iterator[tuple[str, Content]]:
    """Yield every tensor in the order of the specs."""
    late: dict[str, Tensor] = {}
    for section in sections:
        yield from _contents(checkpoint, section, blocks, late)


def _contents(
    checkpoint: Checkpoint,
    section: _Section,
    blocks: Callable[[int], SolvedBlock],
    late: dict[str, Tensor],
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
        _check_block(section, solved)
        layers = {layer.name: layer for layer in solved.layers}
        made = {**solved.dense, **solved.added}
    for spec in (*section.late, *section.specs):
        module, _, leaf = spec.name.rpartition(".")
        content: Content
        if module in layers and leaf in PARTS:
            content = encode_part(layers[module], leaf)
        elif spec.name in made:
            content = made[spec.name]
        else:
            content = read_content(checkpoint, spec.name)
        if spec in section.late and isinstance(content, Tensor):
            late[spec.name] = content
        else:
            yield spec.name, content


def _check_block(section: _Section, solved: SolvedBlock) -> None:
    """Refuse a solved block of which something would be lost or mistaken."""
    planned = {} if section.block is None else _quantized(section.block)
    found = {layer.name: (layer.scheme.name, layer.group_size) for layer in solved.layers}
    if found != {name: (plan.scheme.name, plan.group_size) for name, plan in planned.items()}:
        raise ValueError(f"block {solved.index} was not solved as planned")
    announced = {spec.name for spec in (*section.specs, *section.late)}
    inputs = f".{INPUT_SCALE}"
    scales = {spec.name for spec in section.late if not spec.name.endswith(inputs)}
    if solved.added.keys() != scales:
        different = sorted(solved.added.keys() ^ scales)
        raise ValueError(f"block {solved.index} has other added tensors than planned: {different}")
    lost = {*solved.dense, *(f"{name}.{SCALE}" for name in found)} - announced
    if lost:
        raise ValueError(f"block {solved.index} has tensors without a place: {sorted(lost)}")
