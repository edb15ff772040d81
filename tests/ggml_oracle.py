"""llama.cpp's own encoders and decoders, called in the shared object of the xllamacpp wheel."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from torch import Tensor

from quantkit.ggml_types import GgmlType


@cache
def library() -> ctypes.CDLL:
    """The shared object, with the prototypes of ggml.h."""
    path = Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"
    found = ctypes.CDLL(str(path))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return found


def encode_with_ggml(kind: GgmlType, weight: Tensor, importance: Tensor | None) -> Tensor:
    """Return what `ggml_quantize_chunk` makes of float32 [R, I]: bytes uint8 [R, row bytes].

    Args:
        importance: float32 [I], the importance matrix of the columns; None without one.
    """
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
    result = np.zeros((rows, kind.row_bytes(columns)), dtype=np.uint8)
    matrix = None if importance is None else np.ascontiguousarray(importance.numpy(), np.float32)
    written = library().ggml_quantize_chunk(
        kind.id,
        source.ctypes.data,
        result.ctypes.data,
        0,
        rows,
        columns,
        None if matrix is None else matrix.ctypes.data,
    )
    assert written == result.size
    return torch.from_numpy(result)
