"""llama.cpp's own reader of GGUF headers, called in the shared object of the xllamacpp wheel."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from tests.ggml_oracle import library


class _Parameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@cache
def _functions() -> ctypes.CDLL:
    found = library()
    found.gguf_init_from_file.restype = ctypes.c_void_p
    found.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    found.gguf_get_n_tensors.restype = ctypes.c_int64
    found.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    found.gguf_get_tensor_name.restype = ctypes.c_char_p
    found.gguf_get_tensor_name.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.gguf_get_tensor_offset.restype = ctypes.c_size_t
    found.gguf_get_tensor_offset.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.gguf_get_data_offset.restype = ctypes.c_size_t
    found.gguf_get_data_offset.argtypes = [ctypes.c_void_p]
    found.gguf_free.argtypes = [ctypes.c_void_p]
    return found


def read_places(path: Path) -> dict[str, int] | None:
    """Tensor name -> byte of the file where it begins; None where llama.cpp refuses the file."""
    functions = _functions()
    context = functions.gguf_init_from_file(str(path).encode(), _Parameters(True, None))
    if not context:
        return None
    start = functions.gguf_get_data_offset(context)
    places = {
        functions.gguf_get_tensor_name(context, number).decode(): start
        + functions.gguf_get_tensor_offset(context, number)
        for number in range(functions.gguf_get_n_tensors(context))
    }
    functions.gguf_free(context)
    return places
