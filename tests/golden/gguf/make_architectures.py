"""Make architectures.json again with llama.cpp's own converter.

    python tests/golden/gguf/make_architectures.py LLAMA_CPP COMMIT

LLAMA_CPP is a checkout of llama.cpp at COMMIT. Its converter runs without its vocabulary step: the
models have no tokenizer that it knows.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[3]


def main(llama_cpp: str, commit: str) -> None:
    """Convert every case and write down what came out."""
    sys.path[:0] = [str(ROOT), f"{llama_cpp}/gguf-py", llama_cpp]
    from tests.formats.gguf.models import CASES, make_case
    from tests.helpers import write_pico_tokenizer

    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in CASES.items():
            folder = Path(scratch) / name
            make_case(folder, case)
            write_pico_tokenizer(folder)
            file = folder / "model.gguf"
            _convert(folder, file)
            cases[name] = _describe(file)
    table = {"made_by": f"convert_hf_to_gguf.py of llama.cpp at {commit}", "cases": cases}
    # Innermost lists on one line each.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", _join, json.dumps(table, indent=1))
    Path(__file__).with_name("architectures.json").write_text(text + "\n")


def _join(match: re.Match[str]) -> str:
    return "[" + re.sub(r"\s*\n\s*", " ", match[1]) + "]"


def _convert(folder: Path, file: Path) -> None:
    import conversion
    import gguf
    from conversion import base

    conversion.load_all_models()
    parameters = base.ModelBase.load_hparams(folder, False)
    architecture = base.get_model_architecture(parameters, base.ModelType.TEXT)
    model = base.ModelBase.from_model_architecture(architecture)
    model.set_vocab = lambda self: None
    model(folder, gguf.LlamaFileType.ALL_F32, file, eager=True).write()


def _describe(file: Path) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(file)
    metadata = {
        key: [value.types[0].name.lower(), value.contents()]
        for key, value in reader.fields.items()
        if not key.startswith("GGUF.") and key != "general.name"
    }
    tensors: dict[str, list[Any]] = {}
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        values = np.ascontiguousarray(tensor.data, dtype=np.float32)
        shape = "x".join(str(size) for size in reversed(tensor.shape))
        made = tensor.name.startswith("rope_")
        digest = hashlib.sha256(values.tobytes()).hexdigest()[:16]
        tensors[tensor.name] = [shape, *(values.tolist() if made else [digest])]
    return {"metadata": metadata, "tensors": tensors}


if __name__ == "__main__":
    main(*sys.argv[1:])
