"""Bytes that a job reads, writes and holds, from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import tied_names
from quantkit.recipe import Recipe
from quantkit.records import BlockPlan, LinearPlan, TensorInfo
from quantkit.schemes import BLOCK_SIZE

_SCALE_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
_NAMES: Mapping[str, str] = MappingProxyType(
    {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
)
_FLOAT32 = 4
# The second moment, the same scaled by a fold, its factor in float64, and room for a product.
_MOMENT_COPIES = 5
_REPORT_BYTES = 32_000_000

FISHER_TOKENS = 1 << 15
"""Tokens of which the gradients of the whole model are taken."""

FISHER_ENTRIES = 1 << 24
"""Entries of a Fisher matrix that are kept, in diagonal blocks: all where O is at most 4,096."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of a Plan; see there."""

    parameters: int
    baseline_bytes: int
    artifact_bytes: int
    block_bytes: int
    activation_bytes: int
    statistics_bytes: int
    disk_bytes: int


def choose_scale_dtype(checkpoint: Checkpoint, linears: Iterable[LinearPlan]) -> str:
    """Return the torch name of the dtype of scales: that in which readers run the model.

    It is the config's, and where the config names none the most frequent one of the weights.
    """
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    name = str(named).removeprefix("torch.")
    if name in _SCALE_BYTES:
        return name
    found = Counter(checkpoint.tensors[f"{linear.name}.weight"].dtype for linear in linears)
    return _NAMES.get(found.most_common(1)[0][0], "float32") if found else "float32"


def layer_bytes(linear: LinearPlan, scale_dtype: str) -> int:
    """Return the bytes of a quantized layer's tensors, bias apart, in compressed-tensors.

    Integer codes of four bits, and of eight where the input stays in 16 bits, are packed:
    `weight_packed` int32 [O, ceil(I * bits / 32)], `weight_shape` int64 [2] and, for schemes with
    zero points, `weight_zero_point` int32 [ceil(O * bits / 32), G]. Other codes take a byte each.
    All have `weight_scale`, and schemes with static activations `input_scale` [1].
    """
    scheme, rows, columns = linear.scheme, linear.out_features, linear.in_features
    bits = scheme.weight_bits
    groups = 1 if linear.group_size is None else columns // linear.group_size
    scales = rows * groups
    if scheme.granularity == "block":
        scales = -(-rows // BLOCK_SIZE) * -(-columns // BLOCK_SIZE)
    size = (scales + scheme.static) * _SCALE_BYTES[scale_dtype]
    if scheme.weight_kind == "float" or (bits == 8 and scheme.activations is not None):
        return size + rows * columns
    size += rows * -(-columns * bits // 32) * 4 + 16
    if not scheme.symmetric:
        size += -(-rows * bits // 32) * groups * 4
    return size


def measure_sizes(
    recipe: Recipe,
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    blocks: Sequence[BlockPlan],
    scale_dtype: str,
) -> Sizes:
    """Predict the artifact's bytes, and what the job holds in memory and on the disk."""
    tensors = _without_tied_copies(checkpoint, skeleton)
    quantized = [linear for block in blocks for linear in block.linears if linear.quantized]
    packed = {f"{linear.name}.weight" for linear in quantized}
    baseline = sum(info.size for info in tensors.values())
    artifact = sum(info.size for name, info in tensors.items() if name not in packed)
    artifact += sum(layer_bytes(linear, scale_dtype) for linear in quantized)
    solved = [linear for block in blocks for linear in block.linears if linear.solved]
    calibrated = [linear.in_features for linear in solved if linear.needs_statistics]
    tokens, widest = 0, max(calibrated, default=0)
    walked = bool(calibrated) or recipe.quantize.kv_cache != "none"
    if walked and recipe.calibration is not None:
        tokens = recipe.calibration.samples * recipe.calibration.sequence_length
    whole = [linear for linear in solved if linear.looks_at_whole_model]
    hidden = cast(Any, skeleton).get_input_embeddings().weight.shape[-1]
    side_bytes = sum(path.stat().st_size for path in checkpoint.side_files)
    return Sizes(
        parameters=sum(math.prod(info.shape) for info in tensors.values()),
        baseline_bytes=baseline,
        artifact_bytes=artifact,
        block_bytes=max(_block_bytes(tensors, block) for block in blocks),
        activation_bytes=_activation_bytes(tokens, hidden, widest, len(blocks), bool(whole)),
        # With the drift of the input comes a matrix of the same size, and its scaled copy.
        statistics_bytes=widest * widest * _FLOAT32 * (_MOMENT_COPIES + 2 * bool(whole)),
        # The workspace holds a byte a code until the artifact is written.
        disk_bytes=2 * artifact
        + sum(_unpacked_bytes(linear) for linear in quantized)
        + sum(_fisher_bytes(linear) for linear in whole)
        + side_bytes
        + _REPORT_BYTES,
    )


def _activation_bytes(tokens: int, hidden: int, widest: int, blocks: int, whole: bool) -> int:
    """What the suspended forwards hold, or the pass back through the model before them.

    The forwards hold the residual stream and the inputs and outputs of the widest group; the
    original's run beside them where the whole model is looked at. The pass back holds the hidden
    states in front of all blocks, of so many tokens at the most.
    """
    walk = tokens * (2 * hidden + 2 * widest) * _FLOAT32
    if not whole:
        return walk
    return max(2 * walk, min(tokens, FISHER_TOKENS) * (blocks + 2) * hidden * _FLOAT32)


def _fisher_bytes(linear: LinearPlan) -> int:
    """What a layer's Fisher matrix takes in the workspace."""
    return min(linear.out_features**2, FISHER_ENTRIES) * _FLOAT32


def _unpacked_bytes(linear: LinearPlan) -> int:
    """What codes of less than a byte take more while they are not packed."""
    return linear.out_features * linear.in_features * (8 - linear.scheme.weight_bits) // 8


def _without_tied_copies(checkpoint: Checkpoint, skeleton: nn.Module) -> dict[str, TensorInfo]:
    """Leave out tensors that are stored beside the one that they are tied to."""
    tensors = dict(checkpoint.tensors)
    for target, source in tied_names(skeleton).items():
        first, second = tensors.get(target), tensors.get(source)
        if first and second and (first.dtype, first.shape) == (second.dtype, second.shape):
            del tensors[target]
    return tensors


def _block_bytes(tensors: Mapping[str, TensorInfo], block: BlockPlan) -> int:
    inside = f"{block.prefix}."
    elements = (math.prod(info.shape) for name, info in tensors.items() if name.startswith(inside))
    return sum(elements) * _FLOAT32
