"""Names of dtypes: onnx's, torch's, safetensors'."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "FLOAT": torch.float32,
        "FLOAT16": torch.float16,
        "BFLOAT16": torch.bfloat16,
        "UINT8": torch.uint8,
        "INT8": torch.int8,
        "INT32": torch.int32,
        "INT64": torch.int64,
        "BOOL": torch.bool,
    }
)
"""onnx's name of a dtype -> torch's."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}
)

FLOATS: Mapping[str, str] = MappingProxyType({"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"})
"""safetensors' name of a dtype -> onnx's."""

ACTIVATIONS: Mapping[str, str] = MappingProxyType({"fp32": "FLOAT", "fp16": "FLOAT16"})
"""The recipe's name of what a graph computes in -> onnx's."""
