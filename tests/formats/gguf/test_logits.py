"""What llama.cpp computes with the file of each architecture, compared with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint, read_tensor
from quantkit.formats.gguf.architecture import (
    Architecture,
    describe_architecture,
    read_architecture,
)
from quantkit.formats.gguf.header import GgufSpec, MetadataValue, Value
from quantkit.formats.gguf.tensors import GgufTensor, lay_out_tensors, make_values
from quantkit.formats.gguf.writing import write_gguf
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES
from quantkit.judging.runtimes.llamacpp_library import Library, Model
from quantkit.numerics.divergence import compare_logits
from tests.formats.gguf.models import CASES, draw_case

TOKENS = 96
WINDOW = 32
"""Shorter than the text, so that layers with a sliding window are told from the others."""


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a model in float32, without a tokenizer."""
    architecture = read_architecture(checkpoint)
    tensors = lay_out_tensors(checkpoint, architecture)
    specs = [GgufSpec(tensor.name, GGML_TYPES["F32"], tensor.shape) for tensor in tensors]
    write_gguf(
        folder, "pico", describe(architecture), specs, contents(checkpoint, tensors), 1 << 30
    )
    return folder / "pico.gguf"


def describe(architecture: Architecture) -> dict[str, MetadataValue]:
    return {
        **describe_architecture(architecture, 1, "pico", FILE_TYPES["F32"]),
        "tokenizer.ggml.model": Value("string", "no_vocab"),
        f"{architecture.name}.vocab_size": Value("uint32", architecture.config["vocab_size"]),
    }


def contents(
    checkpoint: Checkpoint, tensors: tuple[GgufTensor, ...]
) -> Iterator[tuple[str, list[bytes]]]:
    for tensor in tensors:
        weight = None if tensor.source is None else read_tensor(checkpoint, tensor.source)
        yield tensor.name, [make_values(tensor, weight).contiguous().numpy().tobytes()]


def logits_of_transformers(folder: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        found: Tensor = model.eval()(ids[None]).logits[0]
    return found


def logits_of_llama_cpp(file: Path, ids: Tensor) -> Tensor:
    model = Model(Library(), file, "cpu", 1)
    model.start(len(ids))
    found = torch.from_numpy(model.run(ids.tolist(), 0, every=True).copy())
    model.close()
    return found


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    gemma = case.startswith("gemma")
    # llama.cpp has no other layers with a window, and takes the factors of longrope by its context.
    config = {"sliding_window": WINDOW if gemma else None}
    if case == "phi3-long":
        config["original_max_position_embeddings"] = 64
    checkpoint = draw_case(tmp_path, CASES[case], **config)
    ids = torch.randint(300, (TOKENS,), generator=torch.Generator().manual_seed(1))
    expected = logits_of_transformers(tmp_path, ids)
    found = logits_of_llama_cpp(write(checkpoint, tmp_path), ids)
    divergence = compare_logits(expected, found, ids).kl.mean()
    # Keys and values are float16 there, and Gemma's activation is a table in float16.
    assert divergence < (1e-4 if gemma else 1e-6)
