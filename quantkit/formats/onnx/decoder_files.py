"""The files of a decoder's graph: the graph, its tensors, genai_config.json."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.durable import write_atomically
from quantkit.encoders.architectures import FAMILIES
from quantkit.errors import ArtifactError, PlanError, writing
from quantkit.formats.onnx.architectures import ARCHITECTURES, Architecture, find_architecture
from quantkit.formats.onnx.decoder_contents import stream_contents
from quantkit.formats.onnx.decoder_graph import HEAD, DecoderGraph, build_graph
from quantkit.formats.onnx.decoder_joining import join_projections
from quantkit.formats.onnx.decoder_layout import Entry, rewrite
from quantkit.formats.onnx.dtypes import ITEM_BYTES
from quantkit.formats.onnx.external import TensorPlace, lay_out, write_tensors
from quantkit.formats.onnx.names import DATA, GENAI_CONFIG, GRAPH
from quantkit.formats.passthrough import is_same
from quantkit.formats.shards import write_document
from quantkit.records import LinearPlan, OnnxPlan, SolvedBlock


@dataclass(frozen=True)
class WrittenGraph:
    """What was written. files: name -> sha256."""

    graph: DecoderGraph
    files: Mapping[str, str]
    tensor_bytes: int


def require_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return what builds the graph of a checkpoint.

    Raises:
        PlanError: nothing does.
    """
    architecture = find_architecture(checkpoint.config)
    if architecture is None:
        names = checkpoint.config.get("architectures") or ["a model without an architecture"]
        raise PlanError(
            [
                f"format onnx has no graph for {names[0]} (known decoders: "
                f"{', '.join(ARCHITECTURES)}; encoders: {', '.join(FAMILIES)}, each as Model, "
                f"ForSequenceClassification or ForTokenClassification)"
            ]
        )
    return architecture


def measure_entries(entries: Iterable[Entry]) -> int:
    """Return the bytes of the tensors."""
    return sum(math.prod(entry.shape) * ITEM_BYTES[entry.dtype] for entry in entries)


def write_files(
    checkpoint: Checkpoint,
    plan: OnnxPlan,
    quantized: Mapping[str, LinearPlan],
    load: Callable[[int], SolvedBlock],
    folder: Path,
) -> WrittenGraph:
    """Write graph, tensors and genai_config.json into `folder`, which is made if it is absent.

    Args:
        quantized: the layers whose codes go in, by name.
        load: returns the solved block with an index; called once a block and in their order.

    Raises:
        PlanError: nothing builds the graph.
        ArtifactError, CheckpointError, ResourceError, OutputError, ValueError: as `write_decoder`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    graph = build_graph(checkpoint, require_architecture(checkpoint), plan.activations)
    if graph.head == graph.embedding and _has_own_head(checkpoint, graph):
        graph = replace(graph, head=HEAD)
    entries = join_projections(graph, rewrite(graph, plan, checkpoint, quantized))
    places = lay_out((entry.name, entry.dtype, entry.shape) for entry in entries)
    contents = stream_contents(checkpoint, entries, load)
    files = {DATA: write_tensors(folder / DATA, places, contents)}
    files[GRAPH] = _write_graph(graph, places, folder / GRAPH)
    files[GENAI_CONFIG] = _write_genai_config(graph, folder)
    return WrittenGraph(graph, files, measure_entries(entries))


def _has_own_head(checkpoint: Checkpoint, graph: DecoderGraph) -> bool:
    """Whether an output layer that the config ties is stored and differs, as transformers asks."""
    return HEAD in checkpoint.tensors and not is_same(checkpoint, HEAD, graph.embedding)


def write_float_files(checkpoint: Checkpoint, plan: OnnxPlan, folder: Path) -> WrittenGraph:
    """Do the same without codes."""
    return write_files(checkpoint, plan, {}, _nothing_solved, folder)


def _nothing_solved(index: int) -> SolvedBlock:
    return SolvedBlock(index, (), {}, ())


def _write_graph(graph: DecoderGraph, places: Iterable[TensorPlace], path: Path) -> str:
    """Write the graph, whose tensors lie in the file beside it; return its sha256."""
    import onnx_ir

    model = graph.builder.model
    for place in places:
        model.graph.initializers[place.name].const_value = onnx_ir.ExternalTensor(
            DATA,
            place.offset,
            place.size,
            onnx_ir.DataType[place.dtype],
            shape=onnx_ir.Shape(place.shape),
            name=place.name,
            base_dir=path.parent,
        )
    data = onnx_ir.to_proto(model).SerializeToString(deterministic=True)

    def write(beside: Path) -> None:
        beside.write_bytes(data)

    write_atomically(path, write)
    return hashlib.sha256(data).hexdigest()


def _write_genai_config(graph: DecoderGraph, folder: Path) -> str:
    """Let the builder write genai_config.json, without what ties it to one kind of device.

    Raises:
        ArtifactError: the builder misses something in the checkpoint.
    """
    path = folder / GENAI_CONFIG
    try:
        with contextlib.redirect_stdout(io.StringIO()), writing(path):
            graph.builder.make_genai_config(graph.config, {}, str(folder))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"onnxruntime-genai cannot write {GENAI_CONFIG}: {error}") from error
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document["model"]["decoder"]["session_options"]["provider_options"] = []
    return write_document(path, document)


def check_graph(path: Path) -> None:
    """Let onnx check the graph as it lies, but for operators that are ONNX Runtime's own.

    Raises:
        ArtifactError: it does not pass.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        # ONNX Runtime has it in the domain of the standard, which does not know it.
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    checked = path.with_name(f"{path.name}.checked")
    try:
        checked.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(checked))
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"{path} does not pass onnx's checks: {error}") from error
    finally:
        checked.unlink(missing_ok=True)
