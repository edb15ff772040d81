"""The formats of a recipe: which files there will be, and their writing from solved blocks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from quantkit import tracing
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.compressed_tensors import write_compressed_tensors
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix
from quantkit.formats.gguf.model import (
    FindSolved,
    GgufModel,
    SolvedTensor,
    describe_imatrix,
    open_model,
    plan_file,
    write_model,
)
from quantkit.formats.modelopt.writing import write_modelopt
from quantkit.formats.onnx.decoder import plan_decoder, write_decoder
from quantkit.ggml_types import GGUF
from quantkit.recipe import AUTO, ExportSpec
from quantkit.records import (
    Artifact,
    Event,
    GgufPlan,
    OnnxPlan,
    Plan,
    Progress,
    SolvedBlock,
    TokenWindows,
)
from quantkit.schemes import MODELOPT, ONNX

IMATRIX = "imatrix.gguf"
"""File of the importance matrix."""

LoadSolved = Callable[[int], SolvedBlock]
"""Index of a block -> the solved block, empty where nothing of it was solved."""


def plan_gguf_files(
    exports: Sequence[ExportSpec],
    checkpoint: Checkpoint,
    chosen: Mapping[str, str] | None = None,
    *,
    has_importance: bool,
) -> tuple[GgufPlan, ...]:
    """Say what the GGUF files of a recipe will hold, in its order.

    Args:
        chosen: name of a tensor in the checkpoint -> its type, for a file of the type `auto` whose
            types have been chosen.
        has_importance: whether the recipe's method weighs errors by what calibration saw.

    Raises:
        CheckpointError: the checkpoint cannot become a GGUF file.
        RecipeError: an override of types does not fit the checkpoint.
        InputError: a mix of types needs calibration.
    """
    wanted = [export for export in exports if export.format == GGUF]
    models = _open_models(checkpoint, [export.pre_tokenizer for export in wanted])
    return tuple(
        plan_file(
            models[export.pre_tokenizer],
            str(export.type),
            [(override.match, override.type) for override in export.overrides],
            has_importance=has_importance,
            candidates=export.candidates if export.type == AUTO else (),
            chosen=chosen,
        )
        for export in wanted
    )


def plan_onnx_graphs(exports: Sequence[ExportSpec], checkpoint: Checkpoint) -> tuple[OnnxPlan, ...]:
    """Say what the ONNX graphs of a recipe will hold, in its order, with no layer quantized yet.

    Raises:
        MissingPackageError: a package of the extra `onnx` is absent.
        PlanError, CheckpointError, ArtifactError: the checkpoint cannot become a graph.
    """
    return tuple(plan_decoder(checkpoint, export) for export in exports if export.format == ONNX)


def _open_models(
    checkpoint: Checkpoint, pre_tokenizers: Sequence[str | None]
) -> dict[str | None, GgufModel]:
    """Name of a pre-tokenizer -> the model with it; files mostly agree, and share one."""
    return {name: open_model(checkpoint, name) for name in dict.fromkeys(pre_tokenizers)}


def write_exports(
    checkpoint: Checkpoint,
    plan: Plan,
    exports: Sequence[ExportSpec],
    load: LoadSolved,
    root: Path,
    tell: Progress,
    calibration: TokenWindows | None,
) -> list[Artifact]:
    """Write every export of a recipe into a folder of its own below `root`.

    Beside a GGUF file lies the importance matrix of its calibration, as llama.cpp reads it.

    Raises:
        ResourceError, OutputError: a file cannot be written.
    """
    artifacts, files, graphs = [], iter(enumerate(plan.gguf)), iter(plan.onnx)
    models = _open_models(checkpoint, [file.pre_tokenizer for file in plan.gguf])
    matrix = None
    if models and calibration is not None:
        matrix = _collect_importance(next(iter(models.values())), plan, load, calibration)
    for done, export in enumerate(exports):
        title = " ".join(filter(None, (export.format, export.type, export.precision)))
        tell(Event("write", done, len(exports), title))
        with tracing.span(
            "export", {"format": export.format, "type": export.type or export.precision}
        ):
            limit = export.max_shard_bytes
            folder = root / export.format
            if export.format == ONNX:
                artifacts.append(_write_graph(checkpoint, plan, next(graphs), load, folder))
                continue
            if export.format != GGUF:
                shutil.rmtree(folder, ignore_errors=True)
                write = write_modelopt if export.format == MODELOPT else write_compressed_tensors
                artifacts.append(write(checkpoint, plan, load, folder, limit))
                continue
            number, file = next(files)
            if len(plan.gguf) > 1:
                folder /= file.type
            shutil.rmtree(folder, ignore_errors=True)
            find = _find_solved(number, load)
            artifacts.append(
                _write_file(models[file.pre_tokenizer], file, folder, limit, find, matrix)
            )
    tell(Event("write", len(exports), len(exports)))
    return artifacts


def _write_graph(
    checkpoint: Checkpoint, plan: Plan, graph: OnnxPlan, load: LoadSolved, folder: Path
) -> Artifact:
    """Write an ONNX graph; several have folders of their own."""
    name = f"{name_model(checkpoint)}-{graph.precision}"
    if len(plan.onnx) > 1:
        folder /= graph.precision
    shutil.rmtree(folder, ignore_errors=True)
    return write_decoder(checkpoint, plan, graph, load, folder, name)


def _write_file(
    model: GgufModel,
    file: GgufPlan,
    folder: Path,
    max_shard_bytes: int,
    find: FindSolved,
    matrix: Imatrix | None,
) -> Artifact:
    """Write a GGUF file, and its importance matrix beside it."""
    artifact = write_model(
        model,
        file,
        folder,
        name_model(model.checkpoint),
        max_shard_bytes,
        find_solved=find,
        find_importance=lambda name, columns: None,
        origin={} if matrix is None else describe_imatrix(matrix, IMATRIX),
    )
    if matrix is None:
        return artifact
    hashes = {**artifact.files, IMATRIX: write_imatrix(folder / IMATRIX, matrix)}
    return replace(artifact, files=dict(sorted(hashes.items())))


def _collect_importance(
    model: GgufModel, plan: Plan, load: LoadSolved, calibration: TokenWindows
) -> Imatrix | None:
    """Return what calibration saw, by the names of the file; None where no method looked at it."""
    names = {tensor.source: tensor.name for tensor in model.tensors}
    tokens = int((calibration.weights > 0).sum())
    entries = {
        names[name]: ImatrixEntry((means * tokens).unsqueeze(0), torch.tensor([tokens]))
        for block in plan.blocks
        for name, means in load(block.index).importance.items()
    }
    if not entries:
        return None
    count, length = calibration.ids.shape
    return Imatrix(entries, (Path(calibration.source).name,), count, length)


def name_model(checkpoint: Checkpoint) -> str:
    """Return the last part of what the user called the checkpoint, as part of a file name."""
    name = checkpoint.source.name.partition("@")[0].rstrip("/\\")
    last = re.split(r"[/\\]", name)[-1] or checkpoint.source.folder.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"


def _find_solved(number: int, load: LoadSolved) -> FindSolved:
    """Find what was solved for GGUF file `number`; one block is held at a time."""
    held: list[SolvedBlock] = []

    def find(block: int, name: str) -> SolvedTensor:
        if not held or held[0].index != block:
            held.clear()
            held.append(load(block))
        return SolvedTensor(held[0].encoded.get(f"{number}:{name}"), held[0].divided.get(name))

    return find
