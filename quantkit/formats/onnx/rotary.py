"""The rotary embedding of a graph, compared with transformers' before any work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_unchecked
from quantkit.formats.onnx.decoder_graph import DecoderGraph

TOLERANCE = 1e-3
"""Largest difference of an entry, all of which lie between -1 and 1 but for a common factor."""

_TABLES = (("", None), ("_global", "full_attention"), ("_local", "sliding_attention"))
"""Ending of the tables' names -> the layers that they are for; None: all."""
_POSITIONS = 64


def find_wrong_rotary(graph: DecoderGraph, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the problem of a rotary embedding that is not the checkpoint's.

    Positions over the whole context are compared: a few tokens would not tell how low frequencies
    are scaled. Graphs that choose between embeddings as they run are left to the agreement of
    logits.

    Args:
        graph: as the builder made it.
    """
    model = cast(Any, build_unchecked(checkpoint)).model
    initializers = graph.builder.model.graph.initializers
    for ending, kind in _TABLES:
        names = [f"{function}_cache{ending}" for function in ("cos", "sin")]
        if not all(name in initializers for name in names):
            continue
        if kind is not None and kind not in model.config.layer_types:
            continue
        tables = [torch.from_numpy(initializers[name].const_value.numpy()) for name in names]
        difference = _compare(model, tables, kind)
        if not difference <= TOLERANCE:
            kinds = "" if kind is None else f" of {kind} layers"
            ropes = checkpoint.config.get("rope_parameters") or checkpoint.config.get(
                "rope_scaling"
            )
            yield (
                f"format onnx: onnxruntime-genai makes another rotary embedding{kinds} than "
                f"transformers (it differs by {difference:.1e}) of {ropes}; export another format"
            )


def _compare(model: Any, tables: list[Tensor], kind: str | None) -> float:
    """Return the largest difference of cosines and sines at some positions."""
    length, half = tables[0].shape
    positions = torch.unique(torch.linspace(0, length - 1, _POSITIONS).long())
    kinds = () if kind is None else (kind,)
    with torch.inference_mode():
        expected = model.rotary_emb(torch.zeros(1, 1, 1), positions.unsqueeze(0), *kinds)
    return max(
        float((table[positions] - values[0, :, :half]).abs().max())
        for table, values in zip(tables, expected, strict=True)
    )
