"""What is in a GGUF file, from its header alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import ArtifactError, CheckpointError
from quantkit.formats.gguf.container import PART_NAME, GgufFile, StoredTensor, open_gguf
from quantkit.formats.inspected import InspectedLayer, Inspection
from quantkit.ggml_types import FILE_TYPES, GGUF

_FILE_TYPE_NAMES = {file_type.number: file_type.name for file_type in FILE_TYPES.values()}
_SENTENCES = {
    "context length": "{architecture}.context_length",
    "blocks": "{architecture}.block_count",
    "name": "general.name",
}
"""What people ask -> the metadata that answers it."""
_IMPORTANCE = "quantize.imatrix."


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that is meant by a file or a folder, the first part where it is split.

    Returns:
        None where the folder has none, or has the files of another artifact beside. Importance
        matrices and other files that are no model do not count where there is one.

    Raises:
        ArtifactError: a folder has several.
    """
    if not path.is_dir():
        return path if path.suffix == ".gguf" and path.exists() else None
    own = (path / "quantkit.json").is_file()
    if own and (path / "compressed-tensors").is_dir():
        return None
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return None
    folder = path / GGUF if own and (path / GGUF).is_dir() else path
    # An output has a folder for each mix of types where there are several.
    files = _list_files(folder) or [
        file for name in FILE_TYPES for file in _list_files(folder / name)
    ]
    if len(files) > 1:
        files = [file for file in files if _is_model(file)] or files
    if len(files) > 1:
        names = ", ".join(file.relative_to(path).as_posix() for file in files)
        raise ArtifactError(f"{path} holds {len(files)} GGUF files: name one of {names}")
    return files[0] if files else None


def open_gguf_artifact(file: Path) -> GgufFile:
    """Open a GGUF file as an artifact.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        return open_gguf(file)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error


def inspect_gguf(file: Path) -> Inspection:
    """Look into a GGUF file; the verdict is left to whoever knows where evidence lies.

    Raises:
        ArtifactError: it cannot be read.
    """
    found = open_gguf_artifact(file)
    tensors = list(found.tensors.values())
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    tensor_bytes = sum(tensor.size for tensor in tensors)
    architecture = found.find_text("general.architecture")
    counts = Counter(tensor.kind.name for tensor in tensors)
    return Inspection(
        folder=file.parent,
        format=GGUF,
        scheme=name_scheme(found),
        architecture="" if architecture is None else _make_printable(architecture),
        layers=tuple(_describe(tensor) for tensor in tensors if len(tensor.shape) > 1),
        tensors=dict(sorted(counts.items())),
        parameters=parameters,
        tensor_bytes=tensor_bytes,
        bits_per_weight=8 * tensor_bytes / parameters if parameters else 0.0,
        quantization_config=None,
        kv_cache="none",
        verdict=None,
        problems=(),
        file=file,
        details=dict(_find_details(found)),
    )


def name_scheme(file: GgufFile) -> str:
    """Return the mix that the file says it is, or its types of blocks, most used first."""
    number = file.find("general.file_type")
    if isinstance(number, int) and number in _FILE_TYPE_NAMES:
        return _FILE_TYPE_NAMES[number]
    kinds = [tensor.kind for tensor in file.tensors.values()]
    counts = Counter(kind.name for kind in kinds if kind.quantized)
    return ", ".join(sorted(counts, key=lambda name: (-counts[name], name))) or "none"


def _list_files(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder, of a split one the first part."""
    return [file for file in sorted(folder.glob("*.gguf")) if not _is_later_part(file)]


def _is_model(file: Path) -> bool:
    """Whether a file is a model, or damaged so that nobody can tell."""
    try:
        return open_gguf(file).find_text("general.type") in (None, "model")
    except CheckpointError:
        return True


def _is_later_part(file: Path) -> bool:
    match = PART_NAME.fullmatch(file.name)
    return match is not None and int(match[2]) != 1


def _describe(tensor: StoredTensor) -> InspectedLayer:
    kind = tensor.kind
    low, high = kind.codes
    bits = (high - low).bit_length() or math.floor(kind.bits_per_weight)
    return InspectedLayer(
        name=tensor.name.removesuffix(".weight"),
        scheme=kind.name if kind.quantized else "none",
        group_size=kind.sub_block if kind.quantized else None,
        bits=bits,
        shape=tensor.shape,
        size=tensor.size,
        sharing="group" if kind.quantized else "none",
    )


def _find_details(file: GgufFile) -> Iterator[tuple[str, str]]:
    """Yield what people ask, and the answer, where the file has one."""
    yield "file", file.path.name if len(file.parts) == 1 else f"{len(file.parts)} parts"
    architecture = file.find("general.architecture")
    kind = file.find("general.type")
    if kind is not None:
        yield "kind of file", _make_printable(kind)
    for what, key in _SENTENCES.items():
        value = file.find(key.format(architecture=architecture))
        if value is not None:
            yield what, _make_printable(value)
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.kind.name] += tensor.size
    yield "bytes", ", ".join(f"{name} {size:,}" for name, size in sizes.most_common())
    yield from _describe_tokenizer(file)
    words = ", ".join(
        f"{key.removeprefix(_IMPORTANCE)} {_make_printable(file.find(key))}"
        for key in file.metadata
        if key.startswith(_IMPORTANCE)
    )
    yield "importance matrix", words or "none recorded"


def _describe_tokenizer(file: GgufFile) -> Iterator[tuple[str, str]]:
    model = file.find("tokenizer.ggml.model")
    tokens = file.find_array("tokenizer.ggml.tokens")
    if model is None and tokens is None:
        yield "tokenizer", "none"
        return
    pre = file.find("tokenizer.ggml.pre")
    count = 0 if tokens is None else len(tokens)
    named = "pre-tokenizer not named" if pre is None else f"pre-tokenizer {_make_printable(pre)}"
    yield "tokenizer", f"{_make_printable(model)}, {named}, {count:,} tokens"
    has_template = bool(file.find("tokenizer.chat_template"))
    yield "chat template", "yes" if has_template else "none"


def _make_printable(value: object) -> str:
    """Return the beginning of a value, without what could move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:200])
