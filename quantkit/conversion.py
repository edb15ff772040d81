"""Models into other formats without data: quantized ones as they are, plain ones into GGUF."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint, hash_files, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.describe import describe_artifact, describe_model, package_versions
from quantkit.durable import write_words
from quantkit.errors import ArtifactError, InputError, NotYetError, OutputError, ResourceError
from quantkit.formats.modelopt.layout import AWQ
from quantkit.formats.readers.description import TITLES, is_foreign
from quantkit.formats.readers.modelopt import scales_inputs
from quantkit.formats.readers.stored import StoredModel, open_stored
from quantkit.formats.rewriting import Rewriting, plan_repacking, plan_weights, write_rewriting
from quantkit.gguf_conversion import GgufConversion, plan_gguf_conversion
from quantkit.inputs import PLAIN, ConvertOptions, check_convert_inputs
from quantkit.recipe import ExportSpec
from quantkit.records import Artifact, Progress, Source
from quantkit.running import silent, staged
from quantkit.schemes import MODELOPT
from quantkit.staging import commit, existing_folder, partial_of


@dataclass(frozen=True)
class Conversion:
    """What a conversion made."""

    source: str
    """What the user called the checkpoint."""
    source_format: str
    """GPTQ, AWQ, FP8, ModelOpt, compressed-tensors, safetensors for plain weights, or gguf and its
    types."""
    layers: int
    """Quantized layers that were converted."""
    artifact: Artifact
    notes: tuple[str, ...]
    """What is not as one might think."""


def convert(
    source: str | os.PathLike[str],
    *,
    to: str,
    output: str | os.PathLike[str],
    dtype: str | None = None,
    base: str | os.PathLike[str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    pre_tokenizer: str | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint in another format, without data.

    Codes of a quantized checkpoint are not rounded again. A plain one becomes a GGUF file with the
    codes that llama.cpp would choose; `quantize` finds better ones with calibration data.

    Args:
        source: GPTQ, AWQ, FP8, ModelOpt, compressed-tensors or plain checkpoint: a folder, a Hub
            id, id@revision; or a GGUF file, the first part where it is split.
        to: `compressed-tensors`, with the same codes, scales and zero points; or `safetensors`,
            with the weights that they stand for; or, from plain weights, `gguf:TYPE`.
        output: folder to make; it holds the model and `quantkit.json`, which says where it is from.
        dtype: of the weights in `safetensors`: `float32` is exact; by default the checkpoint's own,
            of a GGUF file that of `base`.
        base: for a GGUF file to `safetensors`: the checkpoint that it was made from, which config,
            tokenizer and names are taken from.
        imatrix: for GGUF: llama.cpp's importance matrix, `.gguf` or `.dat`.
        pre_tokenizer: for GGUF: llama.cpp's name of it, where it is not recognised.
        requantize: round the weights of a GGUF file a second time, to another `gguf:TYPE`.
        overwrite: replace an output that exists.
        progress: called after each layer.

    Raises:
        InputError: something that was given cannot be used; there is no output then.
        ResourceError: the disk is too small.
    """
    target, tell = Path(output), progress or silent
    options = ConvertOptions(
        dtype=dtype,
        base=None if base is None else os.fspath(base),
        imatrix=None if imatrix is None else os.fspath(imatrix),
        pre_tokenizer=pre_tokenizer,
        requantize=requantize,
    )
    check_convert_inputs(os.fspath(source), to, target, options, overwrite=overwrite)
    planned = plan_gguf_conversion(os.fspath(source), to, options)
    if planned is not None:
        return _convert_gguf(planned, os.fspath(source), to, target, overwrite, tell)
    _refuse_unfinished(target)
    with staged(target, overwrite=overwrite, tell=tell) as partial:
        model = _open_model(os.fspath(source))
        rewriting = _plan(model, to, dtype)
        _check_disk(target.absolute().parent, rewriting.tensor_bytes)
        limit = ExportSpec().max_shard_bytes
        artifact = write_rewriting(rewriting, partial, limit, tell)
        artifact = replace(artifact, name=target.name)
        _write_evidence(rewriting, artifact, partial)
        commit(partial, target, overwrite=overwrite)
    return Conversion(
        source=os.fspath(source),
        source_format=TITLES[model.quantization.method],
        layers=len(model.layers),
        artifact=replace(artifact, folder=target),
        notes=rewriting.notes,
    )


def _convert_gguf(
    planned: GgufConversion, source: str, to: str, target: Path, overwrite: bool, tell: Progress
) -> Conversion:
    """Do a conversion to or from GGUF; see `convert`."""
    _refuse_unfinished(target)
    _check_disk(target.absolute().parent, planned.tensor_bytes)
    with staged(target, overwrite=overwrite, tell=tell) as partial:
        artifact = planned.write(partial, tell)
        if artifact.file_type is None:
            artifact = replace(artifact, name=target.name)
        about = {
            "from": planned.source_format,
            "to": to,
            **planned.settings,
            "notes": list(planned.notes),
        }
        model = describe_model(planned.source, planned.hash_source())
        _write_origin(model, about, artifact, target.name, partial)
        commit(partial, target, overwrite=overwrite)
    artifact = replace(artifact, folder=target)
    return Conversion(source, planned.source_format, 0, artifact, planned.notes)


def _refuse_unfinished(target: Path) -> None:
    """Leave an unfinished job alone.

    Raises:
        OutputError: there is one.
    """
    if (partial_of(target) / "workspace").exists():
        raise OutputError(
            f"{partial_of(target)} holds an unfinished job: finish it, delete it, or choose "
            f"another --output"
        )


def loadable(location: Path, runtime: str, scratch: Path) -> AbstractContextManager[Path]:
    """What the runtime loads: others have kernels for what transformers lacks."""
    if runtime != "transformers":
        return nullcontext(location)
    return dequantized_folder(location, scratch)


def note_loading(location: Path, role: str, runtime: str) -> tuple[str, ...]:
    """What to say where the runtime loads something else than the files at `location`."""
    return note_dequantized(location, role) if runtime == "transformers" else ()


@contextmanager
def dequantized_folder(folder: Path, scratch: Path) -> Iterator[Path]:
    """Yield a folder that transformers can load without the kernels of other tools.

    That is `folder` itself, unless it is a GPTQ, AWQ, FP8 or ModelOpt checkpoint: then it is a
    temporary folder in `scratch` with its dequantized weights in float32, exactly, which is removed
    afterwards. ModelOpt's become compressed-tensors with the same codes and scales, so that
    transformers rounds inputs, and keys and values, as a server does.

    Raises:
        ArtifactError, CheckpointError: the checkpoint is damaged or contradicts itself.
        ResourceError: the disk is too small.
    """
    checkpoint = _open_folder(folder)
    if not is_foreign(folder, checkpoint.config):
        yield folder
        return
    model = _check_problems(open_stored(checkpoint), str(folder))
    rewriting = plan_repacking(model) if _repacks(model) else plan_weights(model, "float32")
    _check_disk(scratch, rewriting.tensor_bytes)
    with tempfile.TemporaryDirectory(prefix="dequantized-", dir=scratch) as place:
        write_rewriting(rewriting, Path(place), ExportSpec().max_shard_bytes, silent)
        yield Path(place)


def note_dequantized(folder: Path, role: str) -> tuple[str, ...]:
    """Say that a checkpoint is judged on its dequantized weights, where it is; headers only.

    Args:
        folder: of the checkpoint.
        role: who is judged, for instance `the artifact`.

    Raises:
        ArtifactError, CheckpointError: it cannot be read.
    """
    checkpoint = _open_folder(folder)
    if not is_foreign(folder, checkpoint.config):
        return ()
    model = _check_problems(open_stored(checkpoint), str(folder))
    method = model.quantization.method
    if _repacks(model):
        note = (
            f"{role} is in ModelOpt's layout and was judged in transformers as compressed-tensors "
            f"with the same codes and scales: TensorRT-LLM itself was not run"
        )
        if model.quantization.kv_cache == "fp8":
            note += "; its PyTorch backend takes 1 for the scales of an FP8 key/value cache"
        return (note,)
    note = (
        f"{role} is {TITLES[method]} and was judged on its dequantized weights: "
        f"{len(model.layers)} layers, in float32"
    )
    if method == "fp8" or (method == "modelopt" and model.quantization.algorithm != AWQ):
        bits = "FP8" if method == "fp8" else "eight bits"
        note += f"; a server also rounds their inputs to {bits}, which is not measured"
    return (note,)


def _repacks(model: StoredModel) -> bool:
    """Whether transformers can be given the codes themselves.

    Raises:
        ArtifactError: a tensor is damaged.
    """
    if model.quantization.method != MODELOPT:
        return False
    return not any(scales_inputs(model.checkpoint, layer) for layer in model.layers.values())


def _open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(Source(str(folder), folder, None))


def _open_model(source: str) -> StoredModel:
    """Open what shall be converted; an output of quantkit stands for the artifact in it.

    Raises:
        InputError: it is missing, damaged, not quantized, or quantized in a way that is not read.
    """
    found = resolve_source(source)
    for inner in (found.folder / name for name in ("compressed-tensors", MODELOPT)):
        if not (found.folder / "config.json").is_file() and (inner / "config.json").is_file():
            found = replace(found, folder=inner)
    return _check_problems(open_stored(open_checkpoint(found)), source)


def _check_problems(model: StoredModel | None, source: str) -> StoredModel:
    if model is None:
        raise InputError(
            f"{source} is not quantized, so there is nothing to convert: `quantkit quantize "
            f"{source}` makes a quantized model of it"
        )
    if model.problems:
        more = len(model.problems) - 1
        hint = f" (and {more} more: see `quantkit inspect`)" if more else ""
        raise ArtifactError(f"{source}: {model.problems[0]}{hint}")
    return model


def _plan(model: StoredModel, to: str, dtype: str | None) -> Rewriting:
    method, name = model.quantization.method, model.checkpoint.source.name
    if to == PLAIN:
        return plan_weights(model, dtype)
    if method == to:
        raise InputError(f"{name} is {to} already: there is nothing to convert")
    if method == "fp8":
        raise NotYetError(
            f"{name} is FP8, and --to {to!r} of FP8 is not yet built (built: --to {PLAIN})"
        )
    return plan_repacking(model)


def _check_disk(place: Path, needed: int) -> None:
    """Compare the free space at `place`, or where it will be, with the bytes that are written.

    Raises:
        ResourceError: it is too little.
    """
    place = existing_folder(place)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"{needed / 1e6:,.0f} MB are to be written to {place}, which has {free / 1e6:,.0f} MB "
            f"left: free some space or choose another --output"
        )


def _write_evidence(rewriting: Rewriting, artifact: Artifact, folder: Path) -> None:
    """Write `quantkit.json` of a quantized checkpoint that was rewritten."""
    about = {
        "from": TITLES[rewriting.model.quantization.method],
        "to": rewriting.format,
        "layers": len(rewriting.layers),
        "notes": list(rewriting.notes),
    }
    checkpoint = rewriting.model.checkpoint
    model = describe_model(checkpoint.source, hash_files(checkpoint))
    _write_origin(model, about, artifact, artifact.name, folder)


def _write_origin(
    model: dict[str, Any], about: dict[str, Any], artifact: Artifact, path: str, folder: Path
) -> None:
    """Write `quantkit.json`: where the artifact is from, and the hashes of all files."""
    evidence: dict[str, Any] = {
        "schema": 1,
        "verdict": "UNJUDGED",
        "conversion": about,
        "model": model,
        "versions": package_versions(),
        "artifacts": [{**describe_artifact(artifact, folder), "path": path}],
    }
    write_words(folder / "quantkit.json", json.dumps(evidence, indent=2, ensure_ascii=False) + "\n")
