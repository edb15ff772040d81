"""Conversions to and from GGUF files: what stands in their way, and their writing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantkit.checkpoint.headers import WEIGHT_DTYPES
from quantkit.checkpoint.reader import Checkpoint, hash_files, open_checkpoint
from quantkit.checkpoint.source import resolve_source
from quantkit.errors import CalibrationError, InputError
from quantkit.exports import name_model
from quantkit.formats.gguf.container import PART_NAME, GgufFile, open_gguf
from quantkit.formats.gguf.cursor import opened
from quantkit.formats.gguf.dequantizing import plan_dequantizing, write_dequantized
from quantkit.formats.gguf.header import MetadataValue
from quantkit.formats.gguf.imatrix import Imatrix, read_imatrix
from quantkit.formats.gguf.inspection import find_gguf, name_scheme
from quantkit.formats.gguf.model import (
    SolvedTensor,
    describe_imatrix,
    open_model,
    plan_file,
    write_model,
)
from quantkit.formats.gguf.requantizing import (
    is_quantized,
    plan_requantizing,
    write_requantized,
)
from quantkit.formats.readers.stored import open_stored
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, GGUF
from quantkit.inputs import PLAIN, ConvertOptions, check_source
from quantkit.recipe import ExportSpec
from quantkit.records import Artifact, Event, Progress, Source


@dataclass(frozen=True)
class GgufConversion:
    """A conversion to or from a GGUF file that can be done."""

    source: Source
    source_format: str
    hash_source: Callable[[], Mapping[str, str]]
    """Returns file name -> sha256 of what is converted."""
    settings: Mapping[str, str]
    """What evidence shall name besides."""
    tensor_bytes: int
    """Bytes that will be written."""
    notes: tuple[str, ...]
    write: Callable[[Path, Progress], Artifact]
    """Writes the artifact into a folder."""


def plan_gguf_conversion(source: str, to: str, options: ConvertOptions) -> GgufConversion | None:
    """Open what shall be converted and plan it; headers, and the importance matrix.

    Args:
        source: a checkpoint, a GGUF file, or a folder with one.
        to: a target of `convert`.

    Returns:
        None where neither side is GGUF.

    Raises:
        InputError: it cannot be done.
    """
    # What has a config is a checkpoint, whatever lies beside.
    path = None if (Path(source) / "config.json").is_file() else find_gguf(Path(source))
    check_source(source, to, options, is_gguf=path is not None)
    target, _, file_type = to.partition(":")
    file_type = file_type.upper()
    if path is None:
        return _plan_encoding(source, file_type, options) if target == GGUF else None
    file = open_gguf(path)
    if target == GGUF:
        return _plan_requantizing(source, file, file_type, options)
    return _plan_decoding(source, file, options)


def _plan_encoding(source: str, file_type: str, options: ConvertOptions) -> GgufConversion:
    """A plain checkpoint -> a GGUF file."""
    checkpoint = _open_plain(
        source, f"{source} is quantized, and GGUF files are made of plain weights"
    )
    matrix = _read_matrix(options.imatrix)
    model = open_model(checkpoint, options.pre_tokenizer)
    file = plan_file(model, file_type, has_importance=matrix is not None)
    coded = (name for name, kind in file.types.items() if GGML_TYPES[kind].quantized)
    notes = (*file.notes, *_compare_names(matrix, options.imatrix, coded, file.types.keys()))

    def write(folder: Path, tell: Progress) -> Artifact:
        tell(Event("write", 0, 1, file_type))
        artifact = write_model(
            model,
            file,
            folder,
            name_model(checkpoint),
            ExportSpec().max_shard_bytes,
            find_solved=lambda block, name: SolvedTensor(),
            find_importance=_finder(matrix),
            origin=_describe_matrix(matrix, options.imatrix),
        )
        tell(Event("write", 1, 1))
        return artifact

    return GgufConversion(
        source=checkpoint.source,
        source_format=PLAIN,
        hash_source=lambda: hash_files(checkpoint),
        settings=_name_settings(imatrix=options.imatrix),
        tensor_bytes=file.tensor_bytes,
        notes=notes,
        write=write,
    )


def _plan_requantizing(
    source: str, file: GgufFile, file_type: str, options: ConvertOptions
) -> GgufConversion:
    """A GGUF file -> a GGUF file of another mix of types."""
    if is_quantized(file) and not options.requantize:
        raise InputError(
            f"{file.path} is {name_scheme(file)}: its weights were rounded once, and rounding them "
            f"again loses more; start from the original, or say --requantize"
        )
    matrix = _read_matrix(options.imatrix)
    plan = plan_requantizing(file, file_type, has_importance=matrix is not None)
    kinds = plan.types.items()
    coded = (name for name, kind in kinds if kind.quantized and kind != file.tensors[name].kind)
    notes = [*plan.notes, *_compare_names(matrix, options.imatrix, coded, plan.types.keys())]
    if is_quantized(file):
        notes.append("its weights were rounded twice: one made from the original is better")

    def write(folder: Path, tell: Progress) -> Artifact:
        tell(Event("write", 0, 1, file_type))
        artifact = write_requantized(
            plan,
            folder,
            _find_stem(file.path),
            ExportSpec().max_shard_bytes,
            find_importance=_finder(matrix),
            origin=_describe_matrix(matrix, options.imatrix),
        )
        tell(Event("write", 1, 1))
        return artifact

    return GgufConversion(
        source=Source(source, file.path.parent, None),
        source_format=f"{GGUF}, {name_scheme(file)}",
        hash_source=lambda: _hash_parts(file),
        settings=_name_settings(imatrix=options.imatrix),
        tensor_bytes=plan.tensor_bytes,
        notes=tuple(notes),
        write=write,
    )


def _plan_decoding(source: str, file: GgufFile, options: ConvertOptions) -> GgufConversion:
    """A GGUF file -> a plain checkpoint, with config and tokenizer of the one it was made from."""
    name = str(options.base)
    base = _open_plain(name, f"--base {name} is quantized, it must be plain")
    dtype = options.dtype or _choose_dtype(base)
    plan = plan_dequantizing(file, base, dtype)
    notes = []
    if options.dtype is None and dtype != "float32" and is_quantized(file):
        notes.append(
            f"weights are rounded to {dtype}, the dtype of {name}; --dtype float32 is exact"
        )
    return GgufConversion(
        source=Source(source, file.path.parent, None),
        source_format=f"{GGUF}, {name_scheme(file)}",
        hash_source=lambda: _hash_parts(file),
        settings=_name_settings(base=name),
        tensor_bytes=plan.tensor_bytes,
        notes=tuple(notes),
        write=lambda folder, tell: write_dequantized(
            plan, folder, ExportSpec().max_shard_bytes, tell
        ),
    )


def _open_plain(source: str, refusal: str) -> Checkpoint:
    """Open a checkpoint that is not quantized.

    Raises:
        InputError: it is; `refusal` says why that matters.
    """
    checkpoint = open_checkpoint(resolve_source(source))
    if open_stored(checkpoint) is not None:
        raise InputError(
            f"{refusal}: make them first with `quantkit convert {source} --to {PLAIN} "
            f"--output FOLDER`"
        )
    return checkpoint


def _choose_dtype(base: Checkpoint) -> str:
    told = str(base.config.get("dtype") or base.config.get("torch_dtype"))
    told = told.removeprefix("torch.")
    return told if told in WEIGHT_DTYPES else "float32"


def _read_matrix(imatrix: str | None) -> Imatrix | None:
    return None if imatrix is None else read_imatrix(Path(imatrix))


def _compare_names(
    matrix: Imatrix | None, imatrix: str | None, coded: Iterable[str], names: Iterable[str]
) -> list[str]:
    """Say which tensors get codes without importance.

    Args:
        coded: tensors that get codes.
        names: all tensors of the file.

    Raises:
        CalibrationError: the importance matrix was made for another model.
    """
    if matrix is None:
        return []
    extra = sorted(name for name in matrix.entries.keys() - set(names) if name.startswith("blk."))
    if extra:
        raise CalibrationError(
            f"{imatrix} has an entry for {extra[0]}, which the model does not have"
            f"{f' (and {len(extra) - 1} more)' if len(extra) > 1 else ''}: it was made for another "
            f"model"
        )
    unknown = [name for name in coded if name not in matrix.entries]
    if not unknown:
        return []
    others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    return [f"the importance matrix has no entry for {unknown[0]}{others}: rounded without"]


def _finder(matrix: Imatrix | None) -> Callable[[str, int], Tensor | None]:
    """Return what looks importance up; plain matrices are the only ones that are built."""

    def find(name: str, columns: int) -> Tensor | None:
        found = None if matrix is None else matrix.find_importance(name, columns)
        if found is not None and found.ndim > 1:
            raise CalibrationError(
                f"the importance matrix has {len(found)} matrices for {name}, which is one: it was "
                f"made for another model"
            )
        return found

    return find


def _describe_matrix(matrix: Imatrix | None, imatrix: str | None) -> dict[str, MetadataValue]:
    return {} if matrix is None else describe_imatrix(matrix, Path(str(imatrix)).name)


def _name_settings(**settings: str | None) -> dict[str, str]:
    return {name: value for name, value in settings.items() if value is not None}


def _find_stem(path: Path) -> str:
    """Return the name of a GGUF file without the number of its part and its mix of types."""
    match = PART_NAME.fullmatch(path.name)
    stem = path.name.removesuffix(".gguf") if match is None else match[1]
    kinds = "|".join(map(re.escape, FILE_TYPES))
    return re.sub(rf"(?<=.)[-._]({kinds})$", "", stem, flags=re.IGNORECASE)


def _hash_parts(file: GgufFile) -> dict[str, str]:
    """Return file name -> sha256 of all parts of a GGUF file."""
    hashes = {}
    for part in file.parts:
        with opened(part) as (handle, _):
            hashes[part.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return hashes
