"""An encoder as a float ONNX graph: transformers' exporter, then pooling and the names of a file.

Letters of shapes: B texts, T tokens of the longest one, H hidden features, C classes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantkit.encoders.checks import OLDEST_OPSET
from quantkit.encoders.data import pad_texts
from quantkit.errors import InputError, is_out_of_memory
from quantkit.formats.onnx.packages import ENCODERS, require_onnx
from quantkit.formats.onnx.pooling_graph import append_pooling
from quantkit.records.encoders import EncoderInfo

if TYPE_CHECKING:
    import onnx_ir as ir

TOKENS = "last_hidden_state"
"""Optimum, and with it sentence-transformers' ONNX backend, takes the vectors of tokens from an
output of this name."""

SENTENCE = "sentence_embedding"
LOGITS = "logits"

_EXAMPLE_LENGTHS = (7, 4)
"""Tokens of the texts that are traced: two texts and padding, so that nothing is taken for 1."""


def export_encoder(model: nn.Module, info: EncoderInfo, opset: int | None = None) -> ir.Model:
    """Return the graph of an encoder, its weights as initializers.

    Inputs are those of `info`, int64 [batch, sequence]. Outputs: for embeddings `last_hidden_state`
    [B, T, H] and `sentence_embedding` [B, H]; for classifiers `logits`,
    [B, C] or, of tokens, [B, T, C]; all float32.

    Args:
        model: in evaluation mode, on the CPU.
        info: what it is.
        opset: version of the operators; None: what the exporter gives.

    Raises:
        MissingPackageError: the packages of ONNX are absent.
        InputError: the exporter cannot express the model, or not in this version.
    """
    require_onnx(ENCODERS)
    if opset is not None and opset < OLDEST_OPSET:
        raise InputError(
            f"opset {opset} is too old: torch's ONNX exporter writes {OLDEST_OPSET} and later; "
            f"leave opset out of the export"
        )
    graph = _trace(model, info, opset)
    given = graph.graph.opset_imports[""]
    if opset is not None and given != opset:
        raise InputError(
            f"torch's ONNX exporter cannot write opset {opset} (it gave {given}): leave opset out "
            f"of the export"
        )
    _name(graph, info)
    _keep_norms_apart(graph)
    return graph


def make_batch(
    info: EncoderInfo, lengths: tuple[int, ...], vocabulary: int
) -> Mapping[str, Tensor]:
    """Return texts of made-up tokens as the model takes them, int64 [B, T].

    Args:
        info: says what the model takes.
        lengths: tokens of each text.
        vocabulary: ids that there are; no text holds that of padding.
    """
    shape = (len(lengths), max(lengths))
    generator = torch.Generator().manual_seed(shape[1])
    ids = torch.randint(0, vocabulary - 1, shape, generator=generator)
    ids += (ids >= info.pad_id).long()
    texts = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return {name: torch.from_numpy(array) for name, array in pad_texts(info, texts).items()}


def _trace(model: nn.Module, info: EncoderInfo, opset: int | None) -> ir.Model:
    from transformers.exporters import OnnxConfig, OnnxExporter

    vocabulary = int(model.config.vocab_size)  # type: ignore[arg-type, union-attr]
    batch = make_batch(info, _EXAMPLE_LENGTHS, vocabulary)
    dynamic = torch.export.Dim.DYNAMIC
    config = OnnxConfig(
        opset_version=opset,
        dynamic_shapes={name: {0: dynamic, 1: dynamic} for name in batch},
    )
    try:
        with _quiet():
            exported = OnnxExporter().export(model, dict(batch), config)
    except Exception as error:
        # The exporter's stages raise whatever they like; memory alone is no fault of the model.
        if is_out_of_memory(error):
            raise
        words = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"torch's ONNX exporter cannot take {info.architecture}: {type(error).__name__}: "
            f"{words or 'no reason given'}"
        ) from error
    program: ir.Model = exported.program
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, notes and warnings from the user's terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _name(model: ir.Model, info: EncoderInfo) -> None:
    """Give the graph its outputs, the names of its axes, and nothing that no output needs."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    _name_axes(graph)
    output = graph.outputs[0]
    shape = output.shape
    output.name = "model_output"
    if output.dtype != ir.DataType.FLOAT:
        output = ir.tape.Tape(graph).op("Cast", [output], {"to": ir.DataType.FLOAT})
        output.shape, output.dtype = shape, ir.DataType.FLOAT
    outputs = [output]
    if info.pooling is None:
        output.name = LOGITS
    else:
        output.name = TOKENS
        outputs.append(append_pooling(model, output, inputs["attention_mask"], info.pooling))
    graph.outputs[:] = outputs
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [inputs[name] for name in info.inputs]
    graph.name = info.architecture


def _keep_norms_apart(model: ir.Model) -> None:
    """Write the sums that norms read as Sum, in place of Add, which computes the same.

    ONNX Runtime joins Add and LayerNormalization into SkipLayerNormalization, whose CPU kernel
    takes seven times as long as both apart: a third of the time of an INT8 encoder.
    """
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "LayerNormalization" else None
        producer = source.producer() if source is not None else None
        if producer is not None and producer.op_type == "Add":
            producer.op_type = "Sum"


def _name_axes(graph: ir.Graph) -> None:
    """Call the axes of texts and tokens `batch` and `sequence` wherever their symbols occur."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in graph.inputs:
        if value.shape is not None:
            for symbol, name in zip(value.shape, ("batch", "sequence"), strict=True):
                names[str(symbol)] = name
        value.shape = ir.Shape(["batch", "sequence"])
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape(
                    [d if isinstance(d, int) else names.get(str(d), d.value) for d in value.shape]
                )
