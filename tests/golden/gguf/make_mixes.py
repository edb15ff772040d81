"""Make mixes.json again with llama.cpp's own quantizer.

    python tests/golden/gguf/make_mixes.py BUILD

Needs llama-cpp-python; BUILD says which llama.cpp is in it. Every model is written as a GGUF file
of zeros in 16 bits and quantized to every file type, without and with an importance matrix.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]


def main(build: str) -> None:
    """Quantize every case to every file type and write down the types of its tensors."""
    sys.path.insert(0, str(ROOT))
    from quantkit.ggml_types import FILE_TYPES
    from tests.formats.gguf.models import MIXED, describe_headers

    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (family, config) in MIXED.items():
            columns = _write_zeros(describe_headers(family, **config), Path(scratch))
            types = {}
            for file_type in FILE_TYPES.values():
                plain, weighed = (
                    _quantize(Path(scratch), file_type.number, matrix) for matrix in ({}, columns)
                )
                types[file_type.name] = plain
                if weighed != plain:
                    types[f"{file_type.name} imatrix"] = weighed
            rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(types[key])}" for key in types)
            lines.append(f"  {json.dumps(name)}: {{\n{rows}\n  }}")
    made_by = json.dumps(f"llama_model_quantize of llama.cpp at {build}")
    text = f'{{\n "made_by": {made_by},\n "cases": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    Path(__file__).with_name("mixes.json").write_text(text)


def _write_zeros(checkpoint: object, folder: Path) -> dict[str, int]:
    """Write source.gguf; return the columns of each tensor that can be quantized."""
    from quantkit.formats.gguf.architecture import describe_architecture, read_architecture
    from quantkit.formats.gguf.header import GgufSpec
    from quantkit.formats.gguf.tensors import lay_out_tensors
    from quantkit.formats.gguf.writing import write_gguf
    from quantkit.ggml_types import FILE_TYPES, GGML_TYPES

    architecture = read_architecture(checkpoint)
    tensors = lay_out_tensors(checkpoint, architecture)
    metadata = describe_architecture(architecture, 0, "zeros", FILE_TYPES["F16"])
    specs = [
        GgufSpec(tensor.name, GGML_TYPES["F16" if tensor.quantizable else "F32"], tensor.shape)
        for tensor in tensors
    ]
    contents = ((spec.name, [bytes(spec.size)]) for spec in specs)
    write_gguf(folder, "source", metadata, specs, contents, 1 << 40)
    return {tensor.name: tensor.shape[-1] for tensor in tensors if tensor.quantizable}


def _quantize(folder: Path, number: int, columns: dict[str, int]) -> dict[str, str] | None:
    """Return the types of the layers over the blocks; None where llama.cpp refuses."""
    import llama_cpp
    from gguf import GGUFReader

    ones = {name: np.ones(count, np.float32) for name, count in columns.items()}
    matrix = (llama_cpp.llama_model_imatrix_data * (len(ones) + 1))()
    for entry, (name, values) in zip(matrix, ones.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, 1
    if ones:
        parameters.imatrix = matrix
    target = folder / "target.gguf"
    source = str(folder / "source.gguf").encode()
    if llama_cpp.llama_model_quantize(source, str(target).encode(), ctypes.byref(parameters)):
        return None
    types: dict[str, list[str]] = {}
    for tensor in sorted(GGUFReader(target).tensors, key=lambda tensor: _block(tensor.name)):
        if len(tensor.shape) > 1:
            stem = tensor.name.split(".")[-2]
            types.setdefault(stem, []).append(tensor.tensor_type.name)
    return {stem: shorten(types[stem]) for stem in sorted(types)}


def _block(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def shorten(types: Iterable[str]) -> str:
    """Write a type for each block as `2 Q6_K, 4 Q4_K`."""
    return ", ".join(f"{len(list(run))} {name}" for name, run in groupby(types))


if __name__ == "__main__":
    main(*sys.argv[1:])
