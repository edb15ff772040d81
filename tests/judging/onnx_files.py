"""ONNX graphs of Llama checkpoints, made by onnxruntime-genai's builder alone, and of tables."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_onnx(checkpoint: Path, folder: Path, *, float16: bool = False) -> Path:
    """Write the unquantized graph of the checkpoint, and what onnxruntime-genai needs, to `folder`.

    Args:
        float16: whether the graph computes in float16.
    """
    import onnx_ir
    from onnxruntime_genai.models.builders import LlamaModel
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(checkpoint)
    dtype = onnx_ir.DataType.FLOAT16 if float16 else onnx_ir.DataType.FLOAT
    options = {"fuse_qkv": False, "shared_embeddings": False}
    folder.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        builder = LlamaModel(config, dtype, dtype, "cpu", str(folder / "cache"), options)
        builder.model_name_or_path = str(checkpoint)
        builder.make_model(str(checkpoint))
        onnx_ir.save(
            builder.model,
            folder / "model.onnx",
            external_data="model.onnx.data",
            size_threshold_bytes=0,
        )
        builder.make_genai_config(config, {}, str(folder))
    for name in SIDE_FILES:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder)
    return folder


def round_onnx(source: Path, folder: Path, *, bits: int = 4) -> Path:
    """Write the graph in `source` to `folder` as ONNX Runtime's own tool rounds it, in blocks."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.onnx*"))
    model = onnx.load(source / "model.onnx")
    tool = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=True)
    tool.process()
    onnx.save_model(
        tool.model.model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return folder


def write_table(path: Path, table: np.ndarray, *, output: str = "logits", extra: str = "") -> Path:
    """Write a graph without a cache, whose logits are the row of a table [V, V] for each token.

    Args:
        output: what the graph calls its logits.
        extra: an input that it takes besides, of text.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["batch", "length"])
    places = helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "length"])
    inputs = [ids, places]
    if extra:
        inputs.append(helper.make_tensor_value_info(extra, TensorProto.STRING, ["batch"]))
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        # Positions count, but for nothing.
        helper.make_node("Cast", ["position_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "zero"], ["zeros"]),
        helper.make_node("Unsqueeze", ["zeros", "last"], ["column"]),
        helper.make_node("Add", ["rows", "column"], [output]),
    ]
    tensors = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.zeros((), np.float32), "zero"),
        numpy_helper.from_array(np.array([-1]), "last"),
    ]
    shape = ["batch", "length", "vocabulary"]
    logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "table", inputs, [logits], tensors)
    opset = [helper.make_opsetid("", 20)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path
