"""FP8 checkpoints as DeepSeek, Qwen and transformers publish them.

A layer's `weight` [O, I] is float8_e4m3fn, and beside it stands one of

    weight_scale_inv  [ceil(O / 128), ceil(I / 128)]   one for each block of `weight_block_size`
    weight_scale_inv  one number                        one for the tensor
    weight_scale      one number, or [O] or [O, 1]      one for the tensor or for each row

The weight is code times scale, whatever the name says. Written and read by transformers
(integrations/finegrained_fp8.py, `FP8Linear` and `Fp8Dequantize`), DeepSeek-V3
(inference/fp8_cast_bf16.py) and vLLM (quantization/fp8.py). Blocks at the end of a matrix may be
cut: they are counted from its beginning.
"""

from __future__ import annotations

import math

from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.formats.readers.description import StoredQuantization
from quantkit.formats.readers.layers import StoredLayer, find_parts, read_part, show_parts

WEIGHT = "weight"
_SCALES = ("weight_scale_inv", "weight_scale")
_PARTS = (WEIGHT, *_SCALES, "input_scale", "activation_scale", "input_scale_inv")
_FLOATS = ("F32", "BF16", "F16")


def find_fp8_layer(
    checkpoint: Checkpoint, quantization: StoredQuantization, name: str
) -> StoredLayer:
    """Find out how a layer is scaled from the headers.

    Raises:
        ArtifactError: there is no scale, or it does not fit the weight and the config.
    """
    parts = find_parts(checkpoint.tensors, name, _PARTS)
    shape = parts[WEIGHT].shape
    if len(shape) != 2 or not parts[WEIGHT].size:
        raise ArtifactError(f"tensor {name}.weight is FP8 {list(shape)}, expected a matrix")
    found = [part for part in _SCALES if part in parts]
    if len(found) != 1:
        words = "no scale" if not found else " and ".join(found)
        raise ArtifactError(f"layer {name} is FP8 and has {words}, expected one of {_SCALES}")
    scale = parts[found[0]]
    block = quantization.block_size
    per_tensor = math.prod(scale.shape) == 1
    per_row = found[0] == "weight_scale" and scale.shape in ((shape[0],), (shape[0], 1))
    grid = block and (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    in_blocks = found[0] == "weight_scale_inv" and scale.shape == grid
    if scale.dtype not in _FLOATS or not (per_tensor or per_row or in_blocks):
        blocks = "" if block is None else f" in blocks of {block[0]} x {block[1]}"
        raise ArtifactError(
            f"layer {name} is stored as {show_parts(parts)}: the scales do not fit the weight"
            f"{blocks}, which {quantization.where} describes"
        )
    return StoredLayer(
        name=name,
        shape=(shape[0], shape[1]),
        bits=8,
        group_size=None,
        sharing="block" if in_blocks else "tensor" if per_tensor else "channel",
        symmetric=True,
        scheme=_name_scheme(quantization, in_blocks),
        parts={part: info.name for part, info in parts.items()},
    )


def _name_scheme(quantization: StoredQuantization, in_blocks: bool) -> str:
    if in_blocks:
        return "fp8_block"
    return "fp8_static" if quantization.static_activations else "fp8_dynamic"


def read_fp8_weight(
    checkpoint: Checkpoint, quantization: StoredQuantization, layer: StoredLayer
) -> Tensor:
    """Return the float32 weight [O, I].

    Raises:
        ArtifactError: a tensor is damaged.
    """
    weight = read_part(checkpoint, layer, WEIGHT).float()
    part = next(part for part in _SCALES if part in layer.parts)
    scale = read_part(checkpoint, layer, part).float()
    if scale.numel() == 1:
        weight *= scale.reshape(())
    elif part == "weight_scale":
        weight *= scale.reshape(-1, 1)
    elif quantization.block_size is not None:
        # Larger than the matrix, a block is as good as of its size.
        rows, columns = map(min, quantization.block_size, layer.shape)
        wide = scale.repeat_interleave(columns, dim=1)[:, : layer.shape[1]]
        for index, start in enumerate(range(0, layer.shape[0], rows)):
            weight[start : start + rows] *= wide[index]
    return weight
