"""Whether a graph computes what transformers does, tried on an excerpt of the checkpoint.

The excerpt has two decoder blocks, of different kinds where there are such, and the rows of a few
tokens of the embedding and the output layer, all with the checkpoint's own weights. Its graph is
written as a whole checkpoint's is, without codes, and run by ONNX Runtime.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, read_tensor
from quantkit.checkpoint.skeleton import build_skeleton, build_unchecked
from quantkit.errors import ArtifactError, writing
from quantkit.formats.onnx.decoder_files import write_float_files
from quantkit.formats.onnx.decoder_graph import HEAD, DecoderGraph
from quantkit.formats.onnx.names import GRAPH
from quantkit.formats.onnx.packages import runtime_errors
from quantkit.formats.passthrough import read_content
from quantkit.formats.shards import Content, TensorSpec, write_document, write_shards
from quantkit.records import OnnxPlan, Source

TOLERANCES: Mapping[str, float] = MappingProxyType({"fp32": 1e-3, "fp16": 3e-2})
"""What a graph computes in -> largest difference of a logit relative to the largest logit.

Right graphs were seen to differ by 4e-7 to 4e-6, one without its sliding window by 5e-2, one with
wrong frequencies by 5e-1; in float16 right ones by 1e-3.
"""

FLOAT_PLAN = OnnxPlan(
    precision="fp32",
    quantized=False,
    activations="fp32",
    accuracy_level=0,
    embeddings="float",
    lm_head="float",
    tensor_bytes=0,
)
"""A graph with all weights as the checkpoint has them."""

_BLOCKS = 2
_TOKENS = 64
"""Rows of the vocabulary."""
_LENGTH, _PREFILL = 32, 20
_WINDOW = 8
"""Tokens of a sliding window, so that some are out of sight."""


def check_agreement(checkpoint: Checkpoint, folder: Path, activations: str = "fp32") -> float:
    """Run an excerpt in ONNX Runtime and in transformers, there in float32.

    A first run fills the key/value cache, a second goes on with it.

    Args:
        folder: exists; a temporary folder is made in it.
        activations: what the graph computes in, fp32 or fp16.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        ArtifactError: the two differ.
    """
    with writing(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
        excerpt = _write_excerpt(checkpoint, Path(scratch) / "excerpt")
        plan = replace(FLOAT_PLAN, activations=activations)
        graph = write_float_files(excerpt, plan, Path(scratch) / "graph").graph
        tokens = torch.randperm(
            excerpt.config["vocab_size"], generator=torch.Generator().manual_seed(0)
        )[:_LENGTH].unsqueeze(0)
        expected = _run_transformers(excerpt, tokens)
        found = _run_onnx(Path(scratch) / "graph" / GRAPH, tokens, graph)
    difference = float((found - expected).abs().max() / expected.abs().max())
    tolerance = TOLERANCES[activations]
    if not difference <= tolerance:
        raise ArtifactError(
            f"the ONNX graph of {checkpoint.source.name} does not compute what transformers does: "
            f"logits differ by {difference:.1e} of the largest, more than {tolerance:.0e}; no "
            f"graph is written, export another format"
        )
    return difference


def _write_excerpt(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Write two blocks and a few rows of the vocabulary as a checkpoint of their own."""
    parsed = cast(Any, build_unchecked(checkpoint)).config
    kinds = getattr(parsed, "layer_types", None)
    blocks = _choose_blocks(parsed.num_hidden_layers, kinds)
    vocabulary = parsed.vocab_size
    rows = torch.arange(min(_TOKENS, vocabulary)) * (vocabulary // min(_TOKENS, vocabulary))
    config = {
        **checkpoint.config,
        "num_hidden_layers": len(blocks),
        "vocab_size": len(rows),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    if kinds is not None:
        config["layer_types"] = [kinds[block] for block in blocks]
    if isinstance(config.get("sliding_window"), int):
        config["sliding_window"] = min(config["sliding_window"], _WINDOW)
    folder.mkdir()
    specs, contents = [], []
    for name, tensor in _choose_tensors(checkpoint, blocks).items():
        info = checkpoint.tensors[tensor]
        shortened = info.shape[0] == vocabulary and not name.startswith("model.layers.")
        shape = (len(rows), *info.shape[1:]) if shortened else info.shape
        specs.append(TensorSpec(name, info.dtype, shape))
        contents.append((name, tensor, rows if shortened else None))
    write_shards(folder, specs, _read(checkpoint, contents), 1 << 62)
    write_document(folder / "config.json", config)
    return open_checkpoint(Source(checkpoint.source.name, folder, None))


def _choose_blocks(count: int, kinds: list[str] | None) -> list[int]:
    """Return the first block and the next one, or the next of another kind."""
    others = (block for block in range(1, count) if kinds and kinds[block] != kinds[0])
    return [0, *[next(others, 1)][: min(count, _BLOCKS) - 1]]


def _choose_tensors(checkpoint: Checkpoint, blocks: list[int]) -> dict[str, str]:
    """Return name in the excerpt -> name in the checkpoint."""
    chosen = {}
    for name in checkpoint.tensors:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            chosen[name] = name
        elif int(match[1]) in blocks:
            chosen[f"model.layers.{blocks.index(int(match[1]))}.{match[2]}"] = name
    return chosen


def _read(
    checkpoint: Checkpoint, contents: Iterable[tuple[str, str, Tensor | None]]
) -> Iterator[tuple[str, Content]]:
    for name, tensor, rows in contents:
        if rows is None:
            yield name, read_content(checkpoint, tensor)
        else:
            yield name, read_tensor(checkpoint, tensor)[rows]


def _run_transformers(excerpt: Checkpoint, tokens: Tensor) -> Tensor:
    """Return the logits [1, T, V] of transformers in float32."""
    model = cast(Any, build_skeleton(excerpt))
    weights = {name: read_tensor(excerpt, name).float() for name in excerpt.tensors}
    model.load_state_dict(weights, strict=False, assign=True)
    if HEAD not in weights:
        model.tie_weights()
    with torch.inference_mode():
        logits: Tensor = model(tokens).logits
    return logits


def _run_onnx(path: Path, tokens: Tensor, graph: DecoderGraph) -> Tensor:
    """Return the logits [1, T, V] of ONNX Runtime, in two runs.

    Raises:
        ArtifactError: it cannot run the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # As it lies: then weights are cast one at a time, and not held in float32 all at once.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    heads, width = graph.builder.num_kv_heads, graph.builder.head_size
    half = graph.builder.io_dtype.name == "FLOAT16"
    empty = np.zeros((1, heads, 0, width), np.float16 if half else np.float32)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {each.name for each in session.get_inputs()}
        outputs = [each.name for each in session.get_outputs()]
        past: Mapping[str, np.ndarray] = {
            name: empty for name in inputs if name.startswith("past_key_values.")
        }
        logits = []
        for start, stop in ((0, _PREFILL), (_PREFILL, tokens.shape[1])):
            feed = {
                "input_ids": tokens[:, start:stop].numpy(),
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
                **past,
            }
            given = {name: value for name, value in feed.items() if name in inputs}
            found = dict(zip(outputs, session.run(outputs, given), strict=True))
            past = {name: found[name.replace("past_key_values", "present")] for name in past}
            logits.append(torch.from_numpy(found["logits"]).float())
    except runtime_errors() as error:
        message = " ".join(str(error).split())
        raise ArtifactError(f"ONNX Runtime cannot run the graph: {message}") from error
    return torch.cat(logits, dim=1)
