"""What llama.cpp itself makes of a GGUF file: its `llama_model_quantize`, in its own environment.

Run by gguf_quality.py under an interpreter that has llama-cpp-python:

    python llama_quantize_job.py SOURCE.gguf RESULT.gguf FILE_TYPE_NUMBER IMATRIX.npz

IMATRIX.npz holds, by tensor name, the mean square of each input, which is what llama-quantize hands
over from an importance matrix file.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp
import numpy as np


def main() -> int:
    """Quantize one file."""
    source, result, number, matrix = sys.argv[1:]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(number)
    params.nthread = 2
    with np.load(matrix) as archive:
        values = {name: np.ascontiguousarray(archive[name], np.float32) for name in archive.files}
    entry = llama_cpp.llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    # The list ends with an entry without a name.
    entries = (entry * (len(values) + 1))()
    for place, (name, each) in enumerate(values.items()):
        entries[place] = entry(name.encode(), each.ctypes.data_as(pointer), each.size)
    params.imatrix = entries
    return int(
        llama_cpp.llama_model_quantize(source.encode(), result.encode(), ctypes.byref(params))
    )


if __name__ == "__main__":
    sys.exit(main())
