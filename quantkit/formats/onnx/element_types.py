"""The types that elements of ONNX tensors have (onnx.TensorProto.DataType)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class DataType:
    """An element type of ONNX. content: the field that holds values which are not raw bytes."""

    number: int
    name: str
    bits: int
    content: str
    per_value: int = 1
    """Numbers in that field for one value."""

    @property
    def floating(self) -> bool:
        """Whether its values are real numbers with a fraction."""
        return "FLOAT" in self.name or self.name == "DOUBLE"


DATA_TYPES: Mapping[int, DataType] = MappingProxyType(
    {
        kind.number: kind
        for kind in (
            DataType(1, "FLOAT", 32, "float_data"),
            DataType(2, "UINT8", 8, "int32_data"),
            DataType(3, "INT8", 8, "int32_data"),
            DataType(4, "UINT16", 16, "int32_data"),
            DataType(5, "INT16", 16, "int32_data"),
            DataType(6, "INT32", 32, "int32_data"),
            DataType(7, "INT64", 64, "int64_data"),
            DataType(8, "STRING", 0, "string_data"),
            DataType(9, "BOOL", 8, "int32_data"),
            DataType(10, "FLOAT16", 16, "int32_data"),
            DataType(11, "DOUBLE", 64, "double_data"),
            DataType(12, "UINT32", 32, "uint64_data"),
            DataType(13, "UINT64", 64, "uint64_data"),
            DataType(14, "COMPLEX64", 64, "float_data", 2),
            DataType(15, "COMPLEX128", 128, "double_data", 2),
            DataType(16, "BFLOAT16", 16, "int32_data"),
            DataType(17, "FLOAT8E4M3FN", 8, "int32_data"),
            DataType(18, "FLOAT8E4M3FNUZ", 8, "int32_data"),
            DataType(19, "FLOAT8E5M2", 8, "int32_data"),
            DataType(20, "FLOAT8E5M2FNUZ", 8, "int32_data"),
            DataType(21, "UINT4", 4, "int32_data"),
            DataType(22, "INT4", 4, "int32_data"),
            DataType(23, "FLOAT4E2M1", 4, "int32_data"),
            DataType(24, "FLOAT8E8M0", 8, "int32_data"),
            DataType(25, "UINT2", 2, "int32_data"),
            DataType(26, "INT2", 2, "int32_data"),
        )
    }
)
