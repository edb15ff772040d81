"""An ONNX file against the checkpoint that it was made from: what is equal, and how far the rest.

Tensors are brought together by their names, without what exporters add to them; a weight without a
name of the checkpoint by what it holds. Where a scale was folded into a norm in front of a layer,
the layer is compared as one of another format is (`formats/comparison.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.errors import ArtifactError
from quantkit.formats.comparison import (
    ComparedLayer,
    Comparison,
    explain_layer,
    find_lonely_layers,
    without_fits,
)
from quantkit.formats.onnx.blocks import OnnxLayer
from quantkit.formats.onnx.container import OnnxFile
from quantkit.formats.onnx.decoding import decode_layer
from quantkit.formats.onnx.operators import find_layers
from quantkit.formats.onnx.tensors import OnnxTensor, read_floats
from quantkit.formats.onnx.wiring import strip_name
from quantkit.formats.table_rows import find_wrong_rows, measure_rows

_LIMITS = {8: 0.1, 2: 0.7}
_USUAL_LIMIT = 0.5
"""Relative error beyond which a layer cannot be a rounding of the base's, by bits of codes."""
_WEIGHT, _BIAS = ".weight", ".bias"
_ALIKE = 0.9
"""Cosine from which a weight without a name is taken for one of the checkpoint."""
_SAMPLE = 64
"""Rows and columns of a weight that are looked at to find it."""


_FUSED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", 0),
    "self_attn.k_proj": ("self_attn.qkv_proj", -2),
    "self_attn.v_proj": ("self_attn.qkv_proj", -1),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", -1),
}
"""Module that graphs have for themselves -> the checkpoint's, and which of its parts it is: the
first, or as many of its own size from the end."""
_JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Module that graphs have for several of the checkpoint's -> those, in the order of their rows."""


@dataclass(frozen=True)
class _Pairs:
    """The base's tensors of each layer, and its tensor of each plain one."""

    layers: tuple[tuple[OnnxLayer, tuple[str, ...]], ...]
    plain: tuple[tuple[OnnxTensor, str], ...]
    nameless: tuple[OnnxLayer, ...]
    """Layers that are found by what they hold, if at all."""
    free: tuple[str, ...]
    """Matrices of the base that these may be."""


def compare_onnx(file: OnnxFile, base: Checkpoint) -> Comparison:
    """Compare every quantized layer, decoded, and every tensor that the base has, too.

    Raises:
        ArtifactError: the file is of another model: none of its tensors is the base's.
        CheckpointError: the base is damaged.
    """
    pairs = _pair(file, base)
    problems: list[str] = []
    changed: list[str] = []
    ratios: dict[str, Tensor] = {}
    equal = 0
    for tensor, name in pairs.plain:
        plain, weight = _read_plain(tensor), read_tensor(base, name).float()
        if _is_equal(plain, weight):
            equal += 1
            continue
        changed.append(name)
        problems += _check_table(plain, name, base)
        if weight.dim() == 1 and plain.shape == weight.shape:
            ratios[name] = torch.nan_to_num(weight / plain, nan=1.0, posinf=1.0, neginf=1.0)
    layers, paired = [], bool(pairs.plain or pairs.layers)
    for layer, found, names in _decode_layers(pairs, base, problems):
        paired = True
        try:
            compared = list(_compare(layer, found, names, base, ratios))
        except ArtifactError as error:
            problems.append(str(error))
            continue
        layers += compared
        limit = _LIMITS.get(layer.bits, _USUAL_LIMIT)
        found_problems = (each.find_problem(layer.bits, limit) for each in compared)
        problems += [problem for problem in found_problems if problem is not None]
        if len(names) == 1 and not _block_of(names[0]):
            problems += _check_table(found, names[0], base)
    if not paired:
        raise ArtifactError(
            f"{file.path} has no tensor of {base.source.name}: it was made of another model"
        )
    problems += find_lonely_layers(layers, changed)
    return Comparison(
        base.source.name, without_fits(layers), tuple(changed), equal, tuple(problems)
    )


def _check_table(found: Tensor, name: str, base: Checkpoint) -> Iterator[str]:
    """Look at the rows of a changed matrix that belongs to no block."""
    shape = base.tensors[name].shape
    if len(shape) != 2 or _block_of(name) or sorted(found.shape) != sorted(shape):
        return
    table = found if tuple(found.shape) == tuple(shape) else found.T
    problem = find_wrong_rows(name, measure_rows(table, read_tensor(base, name)))
    if problem is not None:
        yield problem


def _pair(file: OnnxFile, base: Checkpoint) -> _Pairs:
    """Find the base's tensor of each layer and tensor; each is taken once."""
    quantized = find_layers(file).layers
    parts = {id(part) for layer in quantized for part in layer.parts}
    layers: list[tuple[OnnxLayer, tuple[str, ...]]] = []
    nameless: list[OnnxLayer] = []
    for layer in quantized:
        name = _find_name(f"{layer.name}{_WEIGHT}", base)
        if name is not None and sorted(base.tensors[name].shape) == sorted(layer.shape):
            layers.append((layer, (name,)))
        elif (fused := _find_fused(layer, base)) is not None:
            layers.append((layer, (fused,)))
        elif joined := _find_joined(layer, base):
            layers.append((layer, joined))
        else:
            nameless.append(layer)
    plain = []
    for tensor in file.tensors.values():
        name = _find_name(tensor.name, base) if tensor.kind.floating else None
        if name is not None and id(tensor) not in parts and tensor.count > 1:
            plain.append((tensor, name))
    taken = {name for _, names in layers for name in names} | {name for _, name in plain}
    free = [n for n, info in base.tensors.items() if len(info.shape) == 2 and n not in taken]
    return _Pairs(tuple(layers), tuple(plain), tuple(nameless), tuple(free))


def _decode_layers(
    pairs: _Pairs, base: Checkpoint, problems: list[str]
) -> Iterator[tuple[OnnxLayer, Tensor, tuple[str, ...]]]:
    """Yield each layer, its weight, and the base's tensors of it; what has none is a problem.

    A weight is decoded once, and of each matrix of the base one sample is read.

    Raises:
        CheckpointError: the base is damaged.
    """
    free = list(pairs.free)
    samples: dict[str, np.ndarray] = {}
    for layer, names in (*pairs.layers, *((layer, ()) for layer in pairs.nameless)):
        try:
            found = decode_layer(layer)
        except ArtifactError as error:
            problems.append(str(error))
            continue
        if not names:
            name = _find_alike(found, base, free, samples)
            if name is None:
                problems.append(
                    f"layer {layer.name} has no weight in {base.source.name} that it could be"
                )
                continue
            free.remove(name)
            names = (name,)
        yield layer, torch.from_numpy(found), names


def _find_name(name: str, base: Checkpoint) -> str | None:
    """Return the base's tensor of a name in a graph; None where there is none, or several are."""
    ending = _BIAS if name.endswith(_BIAS) else _WEIGHT
    own = f"{strip_name(name.removesuffix(ending))}{ending}"
    if own in base.tensors:
        return own
    # Checkpoints of a part of a model lack its prefix, and graphs may.
    ends = [each for each in base.tensors if each.endswith(f".{own}") or own.endswith(f".{each}")]
    return ends[0] if len(ends) == 1 else None


def _find_fused(layer: OnnxLayer, base: Checkpoint) -> str | None:
    """Return the base's tensor that a layer is some rows of."""
    for own, (fused, _) in _FUSED.items():
        if layer.name.endswith(f".{own}"):
            return _find_name(f"{layer.name.removesuffix(own)}{fused}{_WEIGHT}", base)
    return None


def _find_joined(layer: OnnxLayer, base: Checkpoint) -> tuple[str, ...]:
    """Return the base's tensors that a layer is one behind the other; none where it is not."""
    for own, parts in _JOINED.items():
        if layer.name.endswith(f".{own}"):
            prefix = layer.name.removesuffix(own)
            found = [_find_name(f"{prefix}{part}{_WEIGHT}", base) for part in parts]
            names = tuple(name for name in found if name is not None)
            shapes = [base.tensors[name].shape for name in names]
            rows = sum(shape[0] for shape in shapes)
            if len(names) == len(parts) and all(
                (rows, *shape[1:]) == tuple(layer.shape) for shape in shapes
            ):
                return names
    return ()


def _read_rows(layer: OnnxLayer, name: str, base: Checkpoint) -> Tensor:
    """Return the base's weight of a layer: the whole tensor, or the layer's rows of it; float32.

    Raises:
        CheckpointError: the base is damaged.
    """
    weight, rows = read_tensor(base, name).float(), layer.shape[0]
    part = next((part for own, (_, part) in _FUSED.items() if layer.name.endswith(own)), 0)
    if len(weight) <= rows or weight.shape[1:] != layer.shape[1:]:
        return weight
    start = len(weight) + part * rows if part < 0 else 0
    return weight[start : start + rows]


def _find_alike(
    found: np.ndarray, base: Checkpoint, free: list[str], samples: dict[str, np.ndarray]
) -> str | None:
    """Return the base's matrix that a weight comes nearest to, by a sample of both.

    Args:
        found: [O, I].
        free: names that are not taken.
        samples: name -> corner of the base's matrix; what is missing is added.

    Raises:
        CheckpointError: the base is damaged.
    """
    best, nearest = _ALIKE, None
    for name in free:
        if base.tensors[name].shape != found.shape:
            continue
        if name not in samples:
            corner = read_tensor(base, name)[:_SAMPLE, :_SAMPLE]
            # A copy, so that the rest is not kept.
            samples[name] = corner.to(torch.float32, copy=True).numpy()
        cosine = _cosine(found[:_SAMPLE, :_SAMPLE], samples[name])
        if cosine > best:
            best, nearest = cosine, name
    return nearest


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float((first * second).sum()) / length if length else 0.0


def _compare(
    layer: OnnxLayer,
    found: Tensor,
    names: tuple[str, ...],
    base: Checkpoint,
    ratios: Mapping[str, Tensor],
) -> Iterator[ComparedLayer]:
    """Compare a layer, decoded, with each tensor of the base that it has the rows of.

    Raises:
        ArtifactError: the shapes differ.
        CheckpointError: the base is damaged.
    """
    rows = [base.tensors[name].shape[0] for name in names]
    parts = found.split(rows) if len(names) > 1 else (found,)
    for part, name in zip(parts, names, strict=True):
        yield _compare_rows(layer, part, name, base, ratios)


def _compare_rows(
    layer: OnnxLayer, found: Tensor, name: str, base: Checkpoint, ratios: Mapping[str, Tensor]
) -> ComparedLayer:
    """Compare some rows of a layer, decoded, under the fold that explains them best.

    Raises:
        ArtifactError: the shapes differ.
        CheckpointError: the base is damaged.
    """
    weight = _read_rows(layer, name, base)
    if found.shape != weight.shape:
        # GPT-2's layers are stored [I, O].
        weight = weight.T
    if found.shape != weight.shape:
        raise ArtifactError(
            f"layer {layer.name} is {list(found.shape)}, the base's is {list(weight.shape)}"
        )
    near = {
        norm: ratio
        for norm, ratio in ratios.items()
        if _block_of(norm) == _block_of(name) and len(ratio) == weight.shape[1]
    }
    # Of a part of a fused tensor the layer's own name says more.
    called = (
        name.removesuffix(_WEIGHT) if len(weight) == base.tensors[name].shape[0] else layer.name
    )
    return explain_layer(called, found, weight, near)


def _block_of(name: str) -> str:
    """The name up to the number of its block."""
    match = re.match(r".*?\.\d+\.", name)
    return match[0] if match else ""


def _read_plain(tensor: OnnxTensor) -> Tensor:
    return torch.from_numpy(read_floats(tensor))


def _is_equal(found: Tensor, weight: Tensor) -> bool:
    """Whether a tensor has the base's values: maybe transposed, or with what a norm adds."""
    if found.dim() == 2 and found.shape == weight.T.shape and torch.equal(found, weight.T):
        return True
    return found.shape == weight.shape and bool(
        torch.equal(found, weight) or torch.equal(found, weight + 1)
    )
