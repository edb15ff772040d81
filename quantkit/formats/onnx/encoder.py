"""The ONNX writer of encoders: a model and its codes -> one file that ONNX Runtime loads.

The float graph is compared with the model, the written one with what it should compute; what
drifts is refused, and nothing is left of it. Beside the graph lie the config, the tokenizer and the
modules of sentence-transformers, whose ONNX backend loads the folder.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from quantkit import __version__
from quantkit.checkpoint.reader import Checkpoint, read_pieces
from quantkit.durable import sync
from quantkit.encoders.simulation import simulated
from quantkit.errors import ArtifactError, InputError, writing
from quantkit.formats.onnx.encoder_agreement import (
    check_agreement,
    check_rounded,
    make_batches,
    run_model,
)
from quantkit.formats.onnx.encoder_export import export_encoder
from quantkit.formats.onnx.encoder_half import halve, store_half
from quantkit.formats.onnx.encoder_quantization import quantize_layers
from quantkit.formats.onnx.encoder_tables import quantize_tables
from quantkit.formats.onnx.names import DATA, GRAPH
from quantkit.formats.onnx.packages import ENCODERS, require_onnx
from quantkit.formats.shards import write_document
from quantkit.formats.sidecars import copy_side_files
from quantkit.recipe.exporting import ExportSpec
from quantkit.records.encoders import EncoderInfo, EncoderPlan, SolvedEncoder, TextRows
from quantkit.records.judging import Artifact
from quantkit.schemes import ONNX

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT_TOLERANCE = 1e-4
"""How far the float graph's outputs may be from the model's, relative to the largest one. Measured
for all families: up to 1e-6."""

HALF_TOLERANCE = 2e-2
"""The same for float16. Measured: up to 2.4e-3."""

_LARGEST_FILE = 1_900_000_000
"""Bytes of weights inside of a graph's file, whose format ends at 2 GiB."""


def write_encoder(
    checkpoint: Checkpoint,
    plan: EncoderPlan,
    solved: SolvedEncoder,
    export: ExportSpec,
    folder: Path,
    model: nn.Module,
    rows: TextRows | None,
    keep_float: Path | None = None,
) -> Artifact:
    """Write the graph of an encoder and what belongs to it into `folder`.

    Args:
        checkpoint: whose config and side files are taken over.
        plan: says the precision.
        solved: codes; for fp16 and fp32 it is not looked at.
        export: the opset, and what fp16 computes in.
        folder: made when it is absent; holds no artifact yet.
        model: of `load_encoder`, on the CPU; not changed.
        rows: texts of the user's, on a few of which the graph is checked as well.
        keep_float: for int8: folder for the float32 graph that the codes go into, `model.onnx`;
            None: it is not kept.

    Returns:
        The artifact with the hashes of its files.

    Raises:
        InputError: the model cannot be exported, or not so.
        ArtifactError: the graph computes something else than it should; nothing is left of it.
        CheckpointError: a side file cannot be read.
        ResourceError, OutputError: a file cannot be written.
    """
    require_onnx(ENCODERS)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if plan.precision == "int8":
        files, tensor_bytes = _write_int8(plan, solved, export, folder, model, rows, keep_float)
    else:
        files, tensor_bytes = _write_float(plan, export, folder, model, rows)
    files |= copy_side_files(checkpoint, folder)
    # Code stays behind, so what names it does as well.
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    files["config.json"] = write_document(folder / "config.json", config)
    return Artifact(
        name=folder.name,
        format=ONNX,
        folder=folder,
        files=dict(sorted(files.items())),
        tensor_bytes=tensor_bytes,
        bits_per_weight=8 * tensor_bytes / plan.parameters,
    )


def write_float_encoder(
    checkpoint: Checkpoint,
    info: EncoderInfo,
    folder: Path,
    model: nn.Module,
    opset: int | None = None,
) -> Path:
    """Write the float32 graph of an encoder, what its artifacts are compared with.

    Args:
        checkpoint: of the encoder.
        info: what it is.
        folder: where to.
        model: of `load_encoder`, on the CPU.
        opset: version of the operators; None: what the exporter gives.

    Returns:
        Path of `model.onnx` in `folder`, which is made when it is absent.

    Raises:
        InputError: the model cannot be exported.
        ArtifactError: the graph computes something else than the model.
        ResourceError, OutputError: a file cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    batches = make_batches(model, info, None)
    with _staged(export_encoder(model, info, opset), folder) as graph:
        check_agreement(graph, info, batches, run_model(model, info, batches), FLOAT_TOLERANCE)
    return folder / GRAPH


def _write_float(
    plan: EncoderPlan,
    export: ExportSpec,
    folder: Path,
    model: nn.Module,
    rows: TextRows | None,
) -> tuple[dict[str, str], int]:
    """Write a graph without codes; return the hashes of its files and the bytes of its tensors."""
    info, half = plan.info, plan.precision == "fp16"
    batches = make_batches(model, info, rows)
    if half and export.activations == "fp16":
        graph = export_encoder(halve(model), info, export.opset)
    else:
        graph = export_encoder(model, info, export.opset)
        if half:
            store_half(graph)
    with _staged(graph, folder) as path:
        expected = run_model(model, info, batches)
        check_agreement(path, info, batches, expected, HALF_TOLERANCE if half else FLOAT_TOLERANCE)
    return _hash(folder), _count_bytes(graph)


def _write_int8(
    plan: EncoderPlan,
    solved: SolvedEncoder,
    export: ExportSpec,
    folder: Path,
    model: nn.Module,
    rows: TextRows | None,
    keep_float: Path | None,
) -> tuple[dict[str, str], int]:
    """Write a graph with codes; return what `_write_float` does."""
    info = plan.info
    if export.activations == "fp16":
        raise InputError(
            "the scales of an INT8 encoder are float32: leave activations out of the export"
        )
    batches = make_batches(model, info, rows)
    graph = export_encoder(model, info, export.opset)
    with tempfile.TemporaryDirectory(prefix=".float-", dir=folder) as place:
        path = (keep_float or Path(place)) / GRAPH
        _save(graph, path)
        exact = run_model(model, info, batches)
        check_agreement(path, info, batches, exact, FLOAT_TOLERANCE)
    quantize_layers(graph, solved.layers)
    quantize_tables(graph, solved.tables)
    with simulated(model, solved.layers, solved.tables):
        expected = run_model(model, info, batches)
    with _staged(graph, folder) as path:
        check_rounded(path, info, batches, expected, exact)
    return _hash(folder), _count_bytes(graph)


@contextmanager
def _staged(model: ir.Model, folder: Path) -> Iterator[Path]:
    """Write a graph where it can be checked; it moves to `folder` if nothing is raised.

    Raises:
        ArtifactError: the graph is not what ONNX asks of one.
        ResourceError, OutputError: it cannot be written.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # The exporter leaves lines and paths of the code that it followed.
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "quantkit", __version__
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as place:
        path = Path(place) / GRAPH
        _save(model, path)
        _check(path)
        yield path
        with writing(folder / GRAPH):
            for file in sorted(Path(place).iterdir(), reverse=True):
                sync(file)
                file.replace(folder / file.name)
            sync(folder)


def _save(model: ir.Model, path: Path, largest: int = _LARGEST_FILE) -> None:
    """Write a graph: one file, or a second one with its weights where they are more than it may
    hold."""
    import onnx_ir as ir

    beside = DATA if _count_bytes(model) > largest else None
    with writing(path):
        ir.save(model, path, external_data=beside, size_threshold_bytes=1024)


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        words = str(error).strip().partition("\n")[0][:300]
        raise ArtifactError(f"the graph that was made is no valid ONNX: {words}") from error


def _count_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )


def _hash(folder: Path) -> dict[str, str]:
    """Return the sha256 of the graph's files."""
    hashes = {}
    for name in (GRAPH, DATA):
        if (folder / name).is_file():
            digest = hashlib.sha256()
            for piece in read_pieces(folder / name):
                digest.update(piece)
            hashes[name] = digest.hexdigest()
    return hashes
