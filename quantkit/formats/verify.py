"""Is an artifact well-formed, complete and finite, and would its runtimes load it?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.comparison import Comparison, compare_artifact
from quantkit.formats.completeness import check_completeness
from quantkit.formats.config_groups import count_malformed_groups
from quantkit.formats.decode import list_layers, open_artifact
from quantkit.formats.gguf.comparison import compare_gguf
from quantkit.formats.gguf.inspection import open_gguf_artifact
from quantkit.formats.gguf.verification import check_gguf, find_gguf_support
from quantkit.formats.inspect import COMPRESSED_TENSORS, PLAIN, inspect_artifact
from quantkit.formats.inspected import Inspection
from quantkit.formats.modelopt.verification import check_modelopt
from quantkit.formats.onnx.comparison import compare_onnx
from quantkit.formats.onnx.container import open_graph
from quantkit.formats.onnx.verification import check_onnx
from quantkit.formats.reader_rules import ClaimedLayer, check_fused, check_layers, claim_layers
from quantkit.formats.readers.stored import open_stored
from quantkit.formats.runtimes import RuntimeSupport, find_support
from quantkit.formats.stored_values import check_cache_scales, check_codes, check_values
from quantkit.schemes import MODELOPT, ONNX

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "vocab.txt")


@dataclass(frozen=True)
class Verification:
    """What was checked, and what came of it."""

    folder: Path
    """Where the weights are, and config.json where the format has one."""
    format: str
    scheme: str
    kv_cache: str
    tensors: int
    layers: int
    """Quantized ones."""
    problems: tuple[str, ...]
    """What makes the artifact unfit, one line each."""
    notes: tuple[str, ...]
    """What should be known and is no fault."""
    runtimes: tuple[RuntimeSupport, ...]
    comparison: Comparison | None
    """None: no base was given."""
    file: Path | None = None
    """The ONNX file, or the GGUF file or its first part; None for the formats that are folders."""


def verify_artifact(path: Path, against: str | None = None) -> Verification:
    """Check every tensor of an artifact, or of a checkpoint, against what its readers expect.

    Args:
        path: an output folder of quantkit, a compressed-tensors folder, a checkpoint, a GGUF or
            ONNX file or a folder with one.
        against: folder, Hub id or id@revision of the checkpoint that it was made from.

    Raises:
        ArtifactError: nothing is there that can be read, or a GGUF file is of another model than
            `against`.
        CheckpointError: `against` cannot be read, or is quantized itself.
    """
    found = inspect_artifact(path)
    if not is_verifiable(found):
        raise ArtifactError(
            f"{path} is {found.format}: what is verified is {COMPRESSED_TENSORS}, GGUF, ONNX, "
            f"{MODELOPT} and checkpoints that are not quantized"
        )
    base = None if against is None else open_checkpoint(resolve_source(against))
    if found.file is not None:
        read = _read_onnx if found.format == ONNX else _read_gguf
        return _verify_file(found, found.file, read(found.file, base))
    if found.format == MODELOPT:
        return _verify_modelopt(found, base)
    artifact = open_artifact(found.folder)
    complete = check_completeness(artifact)
    problems = [*found.problems, *complete.problems]
    claimed: tuple[ClaimedLayer, ...] = ()
    try:
        claimed = claim_layers(artifact, complete.linears)
        problems += _check_layers(artifact, claimed)
    except ArtifactError as error:
        problems.append(str(error))
    problems += check_values(artifact)
    comparison = None
    if base is not None:
        comparison = compare_artifact(artifact, base)
        problems += comparison.problems
    return Verification(
        folder=found.folder,
        format=found.format,
        scheme=found.scheme,
        kv_cache=found.kv_cache,
        tensors=len(artifact.tensors),
        layers=sum(1 for _ in list_layers(artifact)),
        problems=tuple(dict.fromkeys(problems)),
        notes=(*complete.notes, *_find_notes(artifact, found)),
        runtimes=find_support(claimed, found.kv_cache),
        comparison=comparison,
    )


def is_verifiable(found: Inspection) -> bool:
    """Whether `verify_artifact` reads the format of an artifact."""
    return found.file is not None or found.format in (COMPRESSED_TENSORS, PLAIN, MODELOPT)


@dataclass(frozen=True)
class _Checked:
    """What was found out about the tensors of a file."""

    tensors: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    runtimes: tuple[RuntimeSupport, ...]
    comparison: Comparison | None


def _read_gguf(file: Path, base: Checkpoint | None) -> _Checked:
    """Check a GGUF file for llama.cpp."""
    artifact = open_gguf_artifact(file)
    checked = check_gguf(artifact)
    comparison = None if base is None else compare_gguf(artifact, base)
    runtimes = (find_gguf_support(artifact),)
    return _Checked(
        len(artifact.tensors), tuple(checked.problems), tuple(checked.notes), runtimes, comparison
    )


def _read_onnx(file: Path, base: Checkpoint | None) -> _Checked:
    """Check a graph for ONNX Runtime."""
    graph = open_graph(file)
    checked = check_onnx(graph)
    comparison = None if base is None else compare_onnx(graph, base)
    return _Checked(
        len(graph.tensors),
        tuple(checked.problems),
        tuple(checked.notes),
        tuple(checked.runtimes),
        comparison,
    )


def _verify_file(found: Inspection, file: Path, checked: _Checked) -> Verification:
    problems = [*found.problems, *checked.problems]
    problems += () if checked.comparison is None else checked.comparison.problems
    return Verification(
        folder=found.folder,
        format=found.format,
        scheme=found.scheme,
        kv_cache=found.kv_cache,
        tensors=checked.tensors,
        layers=sum(layer.scheme != "none" for layer in found.layers),
        problems=tuple(dict.fromkeys(problems)),
        notes=checked.notes,
        runtimes=checked.runtimes,
        comparison=checked.comparison,
        file=file,
    )


def _verify_modelopt(found: Inspection, base: Checkpoint | None) -> Verification:
    artifact = open_artifact(found.folder)
    model = open_stored(artifact)
    if model is None:
        raise ArtifactError(f"{found.folder} was changed while it was in use")
    checked = check_modelopt(model, base)
    return Verification(
        folder=found.folder,
        format=found.format,
        scheme=found.scheme,
        kv_cache=found.kv_cache,
        tensors=len(artifact.tensors),
        layers=len(model.layers),
        problems=tuple(dict.fromkeys([*found.problems, *checked.problems])),
        notes=(*checked.notes, *_find_notes(artifact, found)),
        runtimes=checked.runtimes,
        comparison=checked.comparison,
    )


def _check_layers(artifact: Checkpoint, claimed: tuple[ClaimedLayer, ...]) -> Iterator[str]:
    malformed = count_malformed_groups(artifact.config)
    if malformed:
        yield f"{malformed} config groups describe no layout that is known"
    yield from check_layers(artifact, claimed)
    yield from check_fused(artifact, claimed)
    yield from check_cache_scales(artifact)
    try:
        yield from check_codes(artifact, claimed)
    except CheckpointError as error:
        yield str(error)


def _find_notes(artifact: Checkpoint, found: Inspection) -> Iterable[str]:
    if "auto_map" in artifact.config:
        yield "config.json names code of its own (auto_map), which no reader runs unasked"
    if not any((found.folder / name).is_file() for name in _TOKENIZERS):
        yield "there is no tokenizer: a server needs one"
