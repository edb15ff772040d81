"""Bytes of a model's weights in each format, from the shapes that its config implies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantkit.capacity import read_shape
from quantkit.checkpoint.headers import read_json
from quantkit.checkpoint.paths import join_inside
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.skeleton import build_on_meta, parse_config
from quantkit.checkpoint.source import resolve_config
from quantkit.encoders.architectures import is_encoder
from quantkit.errors import CheckpointError, InputError
from quantkit.estimating.records import WeightEstimate
from quantkit.formats.gguf.architecture import read_architecture
from quantkit.formats.gguf.mixes import choose_types, fitting_type
from quantkit.formats.gguf.tensors import lay_out_tensors
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, GGUF, FileType
from quantkit.records import TensorInfo

GROUP_SIZE = 128
"""Columns that share a scale in the 4-bit format that is estimated."""
_SCALE = 2
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_KEPT = re.compile(r"(^|[._])(router|gate|conv1d|norm|layernorm)(\.|$)|embed|lm_head")
"""Names of what stays in 16 bits within blocks: routers, convolutions, norms."""
_WORD_BYTES = 40
"""Of a GGUF file's tokenizer for each word of the vocabulary: its text, type and score or merges.
The bundled model's has 29."""
_OUTSIDE = "Q6_K"
"""llama.cpp's type of an output layer, and of an embedding that is one, in nearly every file."""

_WITHOUT_RULES = (
    "GGUF sizes are without the rules of their mixes: quantkit writes none of this architecture"
)
_COMPRESSED = "compressed-tensors"


@dataclass(frozen=True)
class Shapes:
    """The parameters that a config implies, tied ones once."""

    checkpoint: Checkpoint
    """With headers of a 16-bit checkpoint, and no file behind them."""
    config: Mapping[str, Any]
    """With transformers' defaults filled in."""
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(math.prod(info.shape) for info in self.checkpoint.tensors.values())


def read_shapes(model: str) -> Shapes:
    """Build a model of a folder's or a Hub repository's config.json, on the meta device.

    Raises:
        CheckpointError: there is no such model, or transformers cannot build it.
    """
    source = resolve_config(model)
    path = join_inside(source.folder, "config.json")
    if not path.is_file():
        raise CheckpointError(f"{model} has no config.json: it is not a Hugging Face model")
    config = read_json(path)
    notes = []
    if any(key in config for key in _QUANTIZATION_KEYS):
        notes.append("the config is of a quantized model: sizes are those of its 16-bit original")
    plain = {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
    if is_encoder(plain):
        raise CheckpointError(
            f"{model} is an encoder: its parts are planned by `quantkit plan`, and `estimate` is "
            f"for models that generate text"
        )
    # The number of layers is bounded there, before any is built.
    read_shape(plain, str(path))
    checkpoint = Checkpoint(source, MappingProxyType(plain), MappingProxyType({}), ())
    parsed = parse_config(checkpoint, alone=True)
    skeleton = build_on_meta(checkpoint, lambda: _build(parsed))
    tensors = {
        name: TensorInfo(name, "BF16", tuple(parameter.shape), path, 0, 2 * parameter.numel())
        for name, parameter in skeleton.named_parameters()
    }
    checkpoint = replace(checkpoint, tensors=MappingProxyType(tensors))
    return Shapes(checkpoint, MappingProxyType(parsed.to_dict()), tuple(notes))


def _build(parsed: Any) -> Any:
    """Make the model with nothing in memory, large tensors of experts included."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)


def estimate_weights(shapes: Shapes) -> tuple[WeightEstimate, ...]:
    """Return the sizes of the 32-bit and 16-bit checkpoint and of every quantized format.

    As quantkit writes them: layers of the blocks have codes, embeddings, output layer and norms
    stay in 16 bits, but for GGUF files, whose mixes have types for these too.
    """
    parameters = shapes.parameters
    tensors = shapes.checkpoint.tensors
    eight = sum(_bytes_of(info, _eight_bits) for info in tensors.values())
    four = sum(_bytes_of(info, _four_bits) for info in tensors.values())
    rows = [
        WeightEstimate("FP32", "safetensors", 4 * parameters, 32.0),
        WeightEstimate("BF16", "safetensors", 2 * parameters, 16.0),
        _row("w8a8 (INT8)", _COMPRESSED, eight, parameters),
        _row("fp8_dynamic (FP8)", _COMPRESSED, eight, parameters),
        _row(f"w4a16 (4-bit, groups of {GROUP_SIZE})", _COMPRESSED, four, parameters),
    ]
    return (*rows, *_estimate_files(shapes.checkpoint, parameters))


def estimate_from_count(parameters: int) -> tuple[WeightEstimate, ...]:
    """The same for so many weights of which nothing else is known: all have the same bits."""
    four = 4 + 8 * _SCALE / GROUP_SIZE
    flat = [
        ("FP32", "safetensors", 32.0),
        ("BF16", "safetensors", 16.0),
        ("w8a8 (INT8)", _COMPRESSED, 8.0),
        ("fp8_dynamic (FP8)", _COMPRESSED, 8.0),
        (f"w4a16 (4-bit, groups of {GROUP_SIZE})", _COMPRESSED, four),
        *(
            (name, GGUF, kind.default.bits_per_weight)
            for name, kind in FILE_TYPES.items()
            if kind.default.quantized
        ),
    ]
    return tuple(
        WeightEstimate(name, written, round(parameters * bits / 8), bits)
        for name, written, bits in flat
    )


def read_count(text: str) -> int | None:
    """Return the number of weights that `7B`, `1.5b` or `350M` stand for; None for other words.

    Raises:
        InputError: it is none, or more than there are.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT])", text.strip(), re.IGNORECASE)
    if match is None:
        return None
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match.group(2).upper()]
    count = round(float(match.group(1)) * scale)
    if not 0 < count <= 1e15:
        raise InputError(f"{text}: no model has so many weights; for instance 7B or 350M")
    return count


def _row(name: str, written: str, size: int, parameters: int, note: str = "") -> WeightEstimate:
    return WeightEstimate(name, written, size, 8 * size / parameters, note)


def _bytes_of(info: TensorInfo, quantized: Any) -> int:
    """Bytes of one parameter; those outside of blocks and small ones stay in 16 bits."""
    if len(info.shape) < 2 or _KEPT.search(info.name) or not _IN_A_BLOCK.search(info.name):
        return info.size
    *stacked, rows, columns = info.shape
    return math.prod(stacked) * int(quantized(rows, columns))


def _eight_bits(rows: int, columns: int) -> int:
    """A byte a weight and a scale a row."""
    return rows * columns + rows * _SCALE


def _four_bits(rows: int, columns: int) -> int:
    """Codes packed into whole int32, a scale a group, and the shape as two int64."""
    return rows * -(-columns // 8) * 4 + rows * -(-columns // GROUP_SIZE) * _SCALE + 16


def _estimate_files(checkpoint: Checkpoint, parameters: int) -> Iterator[WeightEstimate]:
    """GGUF files: by llama.cpp's mixes where quantkit writes the architecture."""
    quantized = [kind for kind in FILE_TYPES.values() if kind.default.quantized]
    try:
        architecture = read_architecture(checkpoint)
        tensors = lay_out_tensors(checkpoint, architecture)
    except CheckpointError:
        yield from _approximate_files(checkpoint, quantized, parameters)
        return
    for kind in quantized:
        types = choose_types(kind, tensors, architecture, True).types
        size = sum(
            each.parameters // each.shape[-1] * types[each.name].row_bytes(each.shape[-1])
            for each in tensors
        )
        yield _file_row(kind.name, size, checkpoint, parameters)


def _file_row(
    name: str, size: int, checkpoint: Checkpoint, parameters: int, note: str = ""
) -> WeightEstimate:
    """A file with tensors of `size` bytes and the tokenizer."""
    vocabulary = checkpoint.config.get("vocab_size")
    words = _WORD_BYTES * vocabulary if isinstance(vocabulary, int) else 0
    return replace(_row(name, GGUF, size, parameters, note), size_bytes=size + words)


def _approximate_files(
    checkpoint: Checkpoint, kinds: Sequence[FileType], parameters: int
) -> Iterator[WeightEstimate]:
    """Files of other architectures: the default type for all, and six bits for the tables."""
    for kind in kinds:
        size = 0
        for info in checkpoint.tensors.values():
            if len(info.shape) < 2:
                size += 2 * info.size
                continue
            table = not _IN_A_BLOCK.search(info.name) and kind.name != "Q8_0"
            found = fitting_type(GGML_TYPES[_OUTSIDE] if table else kind.default, info.shape[-1])
            size += math.prod(info.shape[:-1]) * found.row_bytes(info.shape[-1])
        yield _file_row(kind.name, size, checkpoint, parameters, _WITHOUT_RULES)
