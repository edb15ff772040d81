"""Decoders as ONNX graphs for ONNX Runtime and onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import PlanError, writing
from quantkit.formats.onnx.agreement import FLOAT_PLAN, check_agreement
from quantkit.formats.onnx.decoder_files import (
    check_graph,
    measure_entries,
    require_architecture,
    write_files,
    write_float_files,
)
from quantkit.formats.onnx.decoder_graph import build_graph
from quantkit.formats.onnx.decoder_layout import rewrite
from quantkit.formats.onnx.dtypes import FLOATS
from quantkit.formats.onnx.names import GRAPH
from quantkit.formats.onnx.packages import require_onnx
from quantkit.formats.onnx.rotary import find_wrong_rotary
from quantkit.formats.shards import write_document
from quantkit.formats.sidecars import copy_side_files
from quantkit.recipe import ExportSpec
from quantkit.records import Artifact, OnnxPlan, Plan, SolvedBlock
from quantkit.schemes import ONNX, ONNX_TABLE_BLOCK


def plan_decoder(checkpoint: Checkpoint, export: ExportSpec) -> OnnxPlan:
    """Say what an ONNX graph of a decoder will hold.

    Its size is that with all layers of the blocks in float: the plan of the job takes their codes
    into account, and says the precision where the recipe does not.

    Raises:
        MissingPackageError: a package of the extra `onnx` is absent.
        PlanError: the checkpoint cannot become a graph.
        CheckpointError: transformers cannot build the model.
        ArtifactError: onnxruntime-genai cannot build the graph.
    """
    require_onnx()
    architecture = require_architecture(checkpoint)
    problems = list(_find_problems(checkpoint, export))
    if problems:
        raise PlanError(problems)
    precision = export.precision or ""
    plan = OnnxPlan(
        precision=precision,
        quantized=precision not in {"fp16", "fp32"},
        activations=export.activations,
        accuracy_level=export.accuracy_level,
        embeddings=export.embeddings or "float",
        lm_head=export.lm_head,
        tensor_bytes=0,
        notes=tuple(_find_notes(checkpoint, export)),
    )
    graph = build_graph(checkpoint, architecture, export.activations)
    wrong = list(find_wrong_rotary(graph, checkpoint))
    if wrong:
        raise PlanError(wrong)
    return replace(plan, tensor_bytes=measure_entries(rewrite(graph, plan, checkpoint, {})))


def write_decoder(
    checkpoint: Checkpoint,
    plan: Plan,
    graph: OnnxPlan,
    load: Callable[[int], SolvedBlock],
    folder: Path,
    name: str,
) -> Artifact:
    """Write the graph, its tensors and what onnxruntime-genai needs into `folder`.

    Args:
        checkpoint: every tensor that `load` does not replace is read from it.
        plan: made for `checkpoint`.
        graph: one of `plan.onnx`.
        load: returns the solved block with an index; called once a block and in their order.
        folder: holds no artifact yet; made where it is absent.
        name: of the artifact.

    Raises:
        ArtifactError: the graph does not compute what transformers does, a value does not fit into
            float16, or the graph does not pass onnx's checks.
        CheckpointError: a tensor of the checkpoint cannot be read.
        ResourceError, OutputError: a file cannot be written.
        ValueError: a solved block does not fit the plan.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_agreement(checkpoint, folder, graph.activations)
    if graph.quantized:
        quantized = {linear.name: linear for linear in plan.linears if linear.quantized}
        written = write_files(checkpoint, graph, quantized, load, folder)
    else:
        written = write_float_files(checkpoint, graph, folder)
    check_graph(folder / GRAPH)
    files = {**written.files, **copy_side_files(checkpoint, folder)}
    # Last: readers take a folder that has a config for a model.
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    files["config.json"] = write_document(folder / "config.json", config)
    return Artifact(
        name=name,
        format=ONNX,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=written.tensor_bytes,
        bits_per_weight=8 * written.tensor_bytes / plan.parameters,
    )


def write_float_decoder(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the graph with all weights as the checkpoint has them; return `folder`.

    ONNX Runtime and onnxruntime-genai can load it.

    Raises:
        MissingPackageError: a package of the extra `onnx` is absent.
        PlanError: the checkpoint cannot become a graph.
        ArtifactError, CheckpointError, ResourceError, OutputError: as `write_decoder`.
    """
    require_onnx()
    write_float_files(checkpoint, FLOAT_PLAN, folder)
    copy_side_files(checkpoint, folder)
    return folder


def _find_problems(checkpoint: Checkpoint, export: ExportSpec) -> Iterable[str]:
    odd = [info for info in checkpoint.tensors.values() if info.dtype not in FLOATS]
    if odd:
        yield (
            f"format onnx: {odd[0].name} is {odd[0].dtype} ({len(odd)} such tensors); start from a "
            f"checkpoint in {', '.join(FLOATS)}"
        )
    hidden = checkpoint.config.get("hidden_size", 0)
    tables = {"embeddings": export.embeddings or "float", "lm_head": export.lm_head}
    for key, precision in tables.items():
        if precision != "float" and hidden % ONNX_TABLE_BLOCK:
            yield (
                f"{key} {precision}: the hidden size {hidden} is not a multiple of "
                f"{ONNX_TABLE_BLOCK}; use `{key}: float`"
            )
    if not _has_end(checkpoint):
        yield (
            "neither config.json nor generation_config.json has an eos_token_id, and there is no "
            "tokenizer: onnxruntime-genai would not know where to stop; add eos_token_id"
        )


def _has_end(checkpoint: Checkpoint) -> bool:
    """Whether something says which token ends a text."""
    if checkpoint.config.get("eos_token_id") is not None:
        return True
    files = {path.name: path for path in checkpoint.side_files}
    if "tokenizer_config.json" in files:
        return True
    found = files.get("generation_config.json")
    return found is not None and read_json(found).get("eos_token_id") is not None


def _find_notes(checkpoint: Checkpoint, export: ExportSpec) -> Iterable[str]:
    for key, precision in (("embeddings", export.embeddings), ("lm_head", export.lm_head)):
        if precision in {"int4", "int8"}:
            yield (
                f"{key} in {precision}: rounded without data, in blocks of {ONNX_TABLE_BLOCK} "
                f"columns whose scales leave the least squared error"
            )
    if export.activations == "fp16":
        yield "activations fp16 are for GPUs; most CPUs are slower with them"
        if "Gemma" in str(checkpoint.config.get("architectures")):
            yield "Gemma's hidden states can overflow in float16; use `activations: fp32`"
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    if export.precision == "fp16" and dtypes != {"F16"}:
        yield "precision fp16: weights are rounded to float16"
