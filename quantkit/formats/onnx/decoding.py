"""What the codes of an ONNX graph stand for: `scale * (code - zero point)`."""

from __future__ import annotations

import numpy as np

from quantkit.errors import ArtifactError
from quantkit.formats.onnx.blocks import OnnxLayer
from quantkit.formats.onnx.tensors import read_floats, read_values, unpack_bits


def decode_layer(layer: OnnxLayer) -> np.ndarray:
    """Return the weight that a layer multiplies with; float32 [O, I].

    Raises:
        ArtifactError: it has no scales, or they do not fit the weight, or are beyond all numbers.
    """
    if layer.scale is None:
        raise ArtifactError(f"layer {layer.name}: its scales are not stored where they are read")
    if len(layer.shape) != 2:
        raise ArtifactError(f"layer {layer.name} is {list(layer.shape)}: no matrix is decoded")
    # Damaged scales may be as large as numbers get.
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = layer.layout == "blocks"
        decoded = (_decode_blocks if blocks else _decode_plain)(layer, read_floats(layer.scale))
    if not np.isfinite(decoded).all():
        raise ArtifactError(f"layer {layer.name} decodes to numbers that are not finite")
    return decoded


def read_codes(layer: OnnxLayer) -> np.ndarray:
    """Return the codes of a layer, as they are stored.

    Returns:
        [O, I] for packed blocks, without what fills the last one up; the stored shape for others.

    Raises:
        ArtifactError: the data file changed.
    """
    values = read_values(layer.weight)
    if layer.layout != "blocks":
        return values
    rows, columns = layer.shape
    if layer.weight.kind.bits == 8:
        shape: tuple[int, ...] = (rows, -1)
        if layer.operator == "MatMulNBits":
            block = layer.group_size or columns
            shape = (rows, -1, -(-block * layer.bits // 8))
        values = unpack_bits(values.reshape(shape).view(np.uint8), layer.bits)
    return values.reshape(rows, -1)[:, :columns]


def read_zero_points(layer: OnnxLayer) -> np.ndarray | None:
    """Return the stored zero points, unpacked: [O, blocks] for packed blocks; None: there are none.

    Raises:
        ArtifactError: the data file changed.
    """
    if layer.zero_point is None:
        return None
    values = read_values(layer.zero_point)
    if layer.layout != "blocks":
        return values
    rows, columns = layer.shape
    blocks = -(-columns // (layer.group_size or columns))
    if values.dtype == np.uint8 and layer.zero_point.kind.bits == 8:
        values = unpack_bits(values.reshape(rows, -1), layer.bits)
    return values.reshape(rows, -1)[:, :blocks]


def _decode_plain(layer: OnnxLayer, scale: np.ndarray) -> np.ndarray:
    codes = read_floats(layer.weight)
    spread = _spread(scale, codes.shape, layer)
    if layer.zero_point is not None:
        codes = codes - _spread(read_floats(layer.zero_point), codes.shape, layer)
    decoded = codes * spread
    return decoded.T if layer.layout == "columns" else decoded


def _decode_blocks(layer: OnnxLayer, scale: np.ndarray) -> np.ndarray:
    rows, columns = layer.shape
    # A block that reaches beyond the row is as good as of its length.
    block = min(layer.group_size or columns, columns)
    codes = read_codes(layer).astype(np.float32)
    zero_point = read_zero_points(layer)
    scale = scale.reshape(rows, -1)
    if zero_point is None:
        # Without zero points, unsigned codes have theirs in the middle.
        codes -= float(1 << (layer.bits - 1)) if layer.weight.kind.bits == 8 else 0.0
    else:
        codes -= np.repeat(zero_point.astype(np.float32), block, axis=1)[:, :columns]
    codes *= np.repeat(scale, block, axis=1)[:, :columns]
    return codes


def _spread(values: np.ndarray, shape: tuple[int, ...], layer: OnnxLayer) -> np.ndarray:
    """Bring scales or zero points to a shape that multiplies with the codes.

    Raises:
        ArtifactError: there is neither one, nor one for each row of the weight or each block.
    """
    outputs = len(shape) - 1 if layer.layout == "columns" else 0
    if values.size == 1:
        return values.reshape(1)
    if values.size == shape[outputs]:
        broad = [1] * len(shape)
        broad[outputs] = -1
        return values.reshape(broad)
    if layer.group_size is not None and values.ndim == len(shape):
        for axis, size in enumerate(shape):
            blocks = -(-size // layer.group_size)
            if values.shape == (*shape[:axis], blocks, *shape[axis + 1 :]):
                return values.take(np.arange(size) // layer.group_size, axis=axis)
    raise ArtifactError(
        f"layer {layer.name}: {values.size} scales or zero points do not fit codes of {list(shape)}"
    )
