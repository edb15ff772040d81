"""Weights to the bytes of ggml's types and back: the entry points.

Bytes are those of `ggml_quantize_chunk` of llama.cpp (build 11549) for every type, with and without
an importance matrix, on any device. Rows are independent, so they are treated a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.ggml_types import GgmlType
from quantkit.numerics.ggml import packing
from quantkit.numerics.ggml.blocks import GgmlBlocks
from quantkit.numerics.ggml.encode_k import encode_k
from quantkit.numerics.ggml.nonlinear import NONLINEAR_KINDS, encode_nonlinear
from quantkit.numerics.ggml.packing_k import pack_k, unpack_k
from quantkit.numerics.ggml.row_threads import map_in_threads
from quantkit.numerics.ggml.simple import SIMPLE_KINDS, encode_eight_bits_at_once, encode_simple

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_CHUNK = 1 << 19
"""Weights at a time on a CPU: what its caches hold of them and of the steps of the search."""
_CHUNK_ON_GPU = 1 << 24


def encode(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> GgmlBlocks:
    """Choose codes and scales as llama.cpp does.

    Args:
        kind: a type with codes.
        weight: float32 [R, I].
        importance: float32 [I], how much the squared error of each column counts; None for none.

    Raises:
        ValueError: the type has no codes, the columns are not whole blocks, the shapes differ, a
            number is not finite or a scale is too large for float16.
    """
    if not kind.quantized:
        raise ValueError(f"{kind.name} has no codes")
    _check_shapes(kind, weight, importance)
    _check_values(kind, weight, importance)
    encode_part = partial(_encode_chunk, kind, importance=importance)
    return _concatenate(_map_parts(encode_part, _split_rows(weight), weight.device))


def encode_rows(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """Return the bytes of the weights in a type, with codes or without: uint8 [R, row bytes].

    Beyond weight and result it takes memory for a few rows only.

    Args:
        weight: float32 [R, I].
        importance: float32 [I], how much the squared error of each column counts; None for none.

    Raises:
        ValueError: as in `encode`; or float16 or bfloat16 cannot hold a weight.
    """
    _check_shapes(kind, weight, importance)
    if kind.name == "Q8_0" and (at_once := encode_eight_bits_at_once(weight)) is not None:
        return at_once
    _check_values(kind, weight, importance)
    shape = (len(weight), kind.row_bytes(weight.shape[1]))
    result = torch.empty(shape, dtype=torch.uint8, device=weight.device)

    def encode_part(pair: tuple[Tensor, Tensor]) -> None:
        part, place = pair
        if kind.quantized:
            place.copy_(pack(_encode_chunk(kind, part, importance)))
        else:
            place.copy_(_encode_floats(kind, part))

    parts = _split_rows(weight)
    _map_parts(encode_part, zip(parts, result.split(len(parts[0])), strict=True), weight.device)
    return result


def pack(blocks: GgmlBlocks) -> Tensor:
    """Return the bytes of the blocks, uint8 [R, row bytes].

    Raises:
        ValueError: a code or scale is out of its range.
    """
    return packing.pack(blocks) if blocks.type.name in packing.PACKED_HERE else pack_k(blocks)


def unpack(kind: GgmlType, data: Tensor) -> GgmlBlocks:
    """Return the blocks that bytes uint8 [R, row bytes] of a type with codes hold.

    Raises:
        ValueError: the type has no codes, or rows are not whole blocks.
    """
    if not kind.quantized:
        raise ValueError(f"{kind.name} has no codes")
    packing.split_blocks(kind, data)
    return packing.unpack(kind, data) if kind.name in packing.PACKED_HERE else unpack_k(kind, data)


def decode(kind: GgmlType, data: Tensor) -> Tensor:
    """Return the weights float32 [R, I] that bytes uint8 [R, row bytes] stand for.

    Raises:
        ValueError: rows are not whole blocks.
    """
    if kind.quantized:
        return unpack(kind, data).dequantize()
    return packing.split_blocks(kind, data).contiguous().view(_FLOATS[kind.name]).squeeze(2).float()


def _encode_chunk(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> GgmlBlocks:
    if kind.name in SIMPLE_KINDS:
        blocks = encode_simple(kind, weight, importance)
    elif kind.name in NONLINEAR_KINDS:
        blocks = encode_nonlinear(kind, weight, importance)
    else:
        blocks = encode_k(kind, weight, importance)
    for stored in (blocks.d, blocks.m):
        if stored is not None and not _is_finite(stored):
            raise ValueError(
                f"weights of up to {weight.abs().max():.3g} are too large for {kind.name}: a scale"
                " or minimum does not fit float16"
            )
    return blocks


def _encode_floats(kind: GgmlType, weight: Tensor) -> Tensor:
    # Both round to the nearest, ties to even, like ggml's conversions.
    stored = weight.to(_FLOATS[kind.name])
    if not _is_finite(stored):
        raise ValueError(f"weights of up to {weight.abs().max():.3g} do not fit {kind.name}")
    return stored.contiguous().view(torch.uint8)


def _check_shapes(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> None:
    shape = list(weight.shape)
    if weight.dim() != 2 or weight.dtype != torch.float32:
        raise ValueError(f"weight is {weight.dtype} {shape}, not float32 [rows, columns]")
    if not weight.numel():
        raise ValueError(f"weight {shape} is empty")
    kind.row_bytes(shape[1])
    if importance is None:
        return
    if importance.dtype != torch.float32 or list(importance.shape) != shape[1:]:
        raise ValueError(
            f"importance is {importance.dtype} {list(importance.shape)}, not float32 [{shape[1]}]"
        )


def _check_values(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> None:
    if not _is_finite(weight):
        row, column = (int(place) for place in (~torch.isfinite(weight)).nonzero()[0])
        raise ValueError(
            f"weight has {weight[row, column]:g} in row {row}, column {column}: {kind.name} holds"
            " finite values only"
        )
    if importance is None:
        return
    wrong = ~(torch.isfinite(importance) & (importance >= 0))
    if wrong.any():
        column = int(wrong.nonzero()[0])
        raise ValueError(
            f"importance of column {column} is {float(importance[column])}, not a finite number"
            " of at least 0"
        )


def _is_finite(values: Tensor) -> bool:
    """Say so in one pass; minimum and maximum hand a NaN on."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _split_rows(weight: Tensor) -> Sequence[Tensor]:
    limit = _CHUNK if weight.device.type == "cpu" else _CHUNK_ON_GPU
    return weight.split(max(1, limit // weight.shape[1]))


def _map_parts(
    function: Callable[[_Part], _Result], parts: Iterable[_Part], device: torch.device
) -> list[_Result]:
    if device.type == "cpu":
        return map_in_threads(function, parts)
    return [function(part) for part in parts]


def _concatenate(parts: list[GgmlBlocks]) -> GgmlBlocks:
    def joined(fields: list[Tensor | None]) -> Tensor | None:
        present = [field for field in fields if field is not None]
        return torch.cat(present) if present else None

    codes, d = (torch.cat(fields) for fields in ([p.codes for p in parts], [p.d for p in parts]))
    return GgmlBlocks(
        parts[0].type,
        codes,
        d,
        joined([part.m for part in parts]),
        joined([part.sub_scales for part in parts]),
        joined([part.sub_minimums for part in parts]),
    )


def divide_rows(kind: GgmlType, data: Tensor, divisor: Tensor) -> Tensor | None:
    """Divide rows of a type with codes by what every block stores as float16.

    Args:
        data: uint8 [R, row bytes].
        divisor: float32 [R], positive.

    Returns:
        The bytes of the rows with the same codes, or None where float16 cannot hold a scale or
        minimum within 1 % of what it should be.

    Raises:
        ValueError: rows are not whole blocks.
    """
    blocks = unpack(kind, data)
    stored = {}
    for name in ("d", "m"):
        old = getattr(blocks, name)
        if old is None:
            continue
        exact = old.float() / divisor.unsqueeze(1)
        stored[name] = exact.half()
        if not bool(((stored[name].float() - exact).abs() <= 0.01 * exact.abs()).all()):
            return None
    return pack(replace(blocks, **stored))
