"""Are the numbers that a GGUF file stores finite: its floating-point tensors and block scales?

The places of the float16 within a block are those of ggml-common.h of llama.cpp; what is checked
is what `ggml_validate_row_data` checks there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quantkit.formats.gguf.container import GgufFile, StoredTensor, read_tensor_rows
from quantkit.ggml_types import GgmlType

_FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
)

_SCALES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S"), (0,)
        ),
        **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ1_S", "Q1_0", "Q2_0"), (0,)),
        **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
        "TQ1_0": (52,),
        "TQ2_0": (64,),
    }
)
"""Type -> bytes of a block at which its float16 scales and minimums begin."""

_E8M0_NAN = 255
_BYTES_AT_ONCE = 1 << 25


def find_infinite(file: GgufFile) -> Iterator[str]:
    """Yield a line for each tensor with a number that is NaN or infinite.

    Raises:
        CheckpointError: the file changed meanwhile.
    """
    for tensor in file.tensors.values():
        bad = sum(count_infinite(tensor.kind, rows) for rows in _read_pieces(file, tensor))
        if bad:
            what = "values" if tensor.kind.name in _FLOATS else "scales or minimums of blocks"
            yield f"tensor {tensor.name} has {bad} {what} that are not finite numbers"


def count_infinite(kind: GgmlType, rows: Tensor) -> int:
    """Count the floating-point numbers in uint8 [R, row bytes] that are NaN or infinite.

    Whole numbers, and blocks whose scales are always finite, have none.
    """
    if kind.name in _FLOATS:
        return int((~torch.isfinite(rows.view(_FLOATS[kind.name]))).sum())
    blocks = rows.reshape(-1, kind.block_bytes)
    if kind.name == "MXFP4":
        return int((blocks[:, 0] == _E8M0_NAN).sum())
    if kind.name == "IQ1_M":
        return int((~torch.isfinite(_collect_scales(blocks))).sum())
    return sum(
        int((~torch.isfinite(blocks[:, place : place + 2].contiguous().view(torch.float16))).sum())
        for place in _SCALES.get(kind.name, ())
    )


def _collect_scales(blocks: Tensor) -> Tensor:
    """Return the float16 scale of IQ1_M's blocks, whose quarters are the upper bits of others."""
    words = blocks[:, 48:56].contiguous().view(torch.int16).to(torch.int32) >> 12 & 15
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    bits = (words << shifts).sum(1, dtype=torch.int32)
    return bits.to(torch.int16).view(torch.float16)


def _read_pieces(file: GgufFile, tensor: StoredTensor) -> Iterator[Tensor]:
    count = max(1, _BYTES_AT_ONCE // tensor.row_bytes)
    for first in range(0, tensor.rows, count):
        yield read_tensor_rows(file, tensor.name, first, min(count, tensor.rows - first))
