"""The tensors of a decoder's graph, one after the other: codes, scales, floats, constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import ArtifactError
from quantkit.formats.onnx.decoder_layout import (
    ConstantContent,
    Entry,
    FloatContent,
    JoinedContent,
    LayerContent,
    TableContent,
)
from quantkit.formats.onnx.dtypes import TORCH_DTYPES
from quantkit.formats.onnx.nbits import pack_layer
from quantkit.formats.onnx.tables import round_table
from quantkit.records import QuantizedLayer, SolvedBlock


def stream_contents(
    checkpoint: Checkpoint,
    entries: Sequence[Entry],
    load: Callable[[int], SolvedBlock],
) -> Iterator[Tensor]:
    """Yield the tensor of each entry; one block and one table are held at a time.

    Args:
        load: returns the solved block with an index; asked once a block.

    Raises:
        ArtifactError: a value does not fit into float16.
        CheckpointError: a tensor cannot be read.
        ValueError: a solved block is not what was planned.
    """
    solved: SolvedBlock | None = None
    table: QuantizedLayer | None = None
    for entry in entries:
        content = entry.content
        if entry.block is not None and (solved is None or solved.index != entry.block):
            solved = None
            solved = _check_block(load(entry.block), entries)
        if isinstance(content, ConstantContent):
            yield content.values
        elif isinstance(content, TableContent):
            wanted = (content.tensor, content.bits)
            if table is None or (table.name, table.scheme.weight_bits) != wanted:
                table = None
                table = _round(checkpoint, content)
            yield _convert(pack_layer(table, content.part, slice(None)), entry)
        else:
            inside = solved if entry.block is not None else None
            yield _convert(_read(checkpoint, inside, content), entry)


def _check_block(solved: SolvedBlock, entries: Sequence[Entry]) -> SolvedBlock:
    """Refuse a solved block of which something would be lost.

    Raises:
        ValueError: the graph has no place for a tensor.
    """
    parts = [part for entry in entries for part in entry.parts]
    placed = {each.source.tensor for each in parts if isinstance(each, FloatContent)}
    layers = {each.layer for each in parts if isinstance(each, LayerContent)}
    found = {*(layer.name for layer in solved.layers), *solved.dense}
    lost = found - placed - layers
    if lost:
        raise ValueError(f"block {solved.index} has tensors without a place: {sorted(lost)}")
    return solved


def _round(checkpoint: Checkpoint, content: TableContent) -> QuantizedLayer:
    table = read_tensor(checkpoint, content.tensor)
    return round_table(content.tensor, table, content.bits, TORCH_DTYPES[content.scale_dtype])


def _read(
    checkpoint: Checkpoint,
    solved: SolvedBlock | None,
    content: FloatContent | LayerContent | JoinedContent,
) -> Tensor:
    if isinstance(content, JoinedContent):
        return torch.cat([_read(checkpoint, solved, part) for part in content.parts], content.axis)
    if isinstance(content, LayerContent):
        return _pack(solved, content)
    return _read_float(checkpoint, solved, content)


def _pack(solved: SolvedBlock | None, content: LayerContent) -> Tensor:
    for layer in () if solved is None else solved.layers:
        if layer.name == content.layer:
            return pack_layer(layer, content.part, content.rows or slice(None))
    raise ValueError(f"{content.layer} was not solved as planned")


def _read_float(
    checkpoint: Checkpoint, solved: SolvedBlock | None, content: FloatContent
) -> Tensor:
    source = content.source
    changed = None if solved is None else solved.dense.get(source.tensor)
    tensor = read_tensor(checkpoint, source.tensor) if changed is None else changed
    if source.rows is not None:
        tensor = tensor[source.rows]
    if source.offset:
        tensor = tensor.float() + source.offset
    return tensor.T if content.transposed else tensor


def _convert(tensor: Tensor, entry: Entry) -> Tensor:
    """Bring a tensor into the dtype and shape of its entry.

    Raises:
        ArtifactError: a value does not fit into float16.
    """
    dtype = TORCH_DTYPES[entry.dtype]
    found = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype:
        lost = ~torch.isfinite(found)
        if entry.name.endswith(".scales"):
            lost |= (found == 0) & (tensor != 0)
        if bool(lost.any()):
            raise ArtifactError(
                f"{entry.name} has {int(lost.sum())} values that float16 does not hold: export "
                f"with `activations: fp32`, and not with `precision: fp16`"
            )
    return found.reshape(entry.shape)
