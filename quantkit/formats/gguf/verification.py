"""Would llama.cpp load a GGUF file, and is everything in it that the model needs?

The rules are those of llama-model-loader.cpp, llama-model.cpp and llama-vocab.cpp of llama.cpp
(build 11549), which end the process on a fault rather than explain it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from quantkit.errors import nearest
from quantkit.formats.gguf.container import GgufFile
from quantkit.formats.gguf.finiteness import find_infinite
from quantkit.formats.gguf.known_architectures import KNOWN_ARCHITECTURES
from quantkit.formats.gguf.tensors import name_block_tensors
from quantkit.formats.gguf.vocabulary_checks import check_tokenizer, note_tokenizer
from quantkit.formats.runtimes import Answer, RuntimeSupport

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_QKV = frozenset({"attn_q.weight", "attn_k.weight", "attn_v.weight"})
_FUSED = "attn_qkv.weight"
_BIASES = frozenset({"attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias"})
_SCALES = (".scale", ".input_scale")
"""Endings of what the types of floats in blocks of 16 have beside a matrix."""
_KEYS = ("block_count", "context_length", "embedding_length")
_ALWAYS = ("token_embd.weight", "output_norm.weight")
_SOMETIMES = frozenset(
    {
        "output.weight",
        "output.bias",
        "cls.output.weight",
        "dense_2.weight",
        "dense_3.weight",
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
    }
)


@dataclass(frozen=True)
class GgufCheck:
    """What was checked, and what came of it."""

    problems: tuple[str, ...]
    """What makes the file unfit, one line each."""
    notes: tuple[str, ...]
    """What should be known and is no fault."""


@dataclass(frozen=True)
class _Sizes:
    """Numbers of the metadata; None where they are not one for all blocks."""

    blocks: int | None
    hidden: int | None
    feed_forward: int | None
    heads: int | None
    key_value_heads: int | None
    key: int | None
    value: int | None
    tokens: int | None


def check_gguf(file: GgufFile) -> GgufCheck:
    """Check the metadata, the tensors and every block of an opened GGUF file.

    Raises:
        CheckpointError: the file changed meanwhile.
    """
    problems = list(find_infinite(file))
    kind = file.find_text("general.type")
    if kind not in (None, "model"):
        return GgufCheck(tuple(problems), (f"a GGUF file of the type {kind!r}: it is no model",))
    architecture = file.find_text("general.architecture")
    if architecture is None or architecture not in KNOWN_ARCHITECTURES:
        near = nearest(architecture or "", KNOWN_ARCHITECTURES)
        problems.append(f"llama.cpp knows no architecture {architecture!r}{near}")
        return GgufCheck(tuple(problems), ())
    sizes = _read_sizes(file, architecture)
    notes = list(note_tokenizer(file))
    problems += check_tokenizer(file)
    for key in _KEYS:
        if file.find(f"{architecture}.{key}") is None:
            problems.append(f"metadata {architecture}.{key} is missing: llama.cpp refuses the file")
    if sizes.blocks is not None:
        problems += _check_blocks(file, sizes.blocks)
    names = name_block_tensors(architecture)
    if names is None or file.find(f"{architecture}.expert_count"):
        notes.append(
            f"not checked whether all tensors are there: those of {architecture}"
            f"{' with experts' if names else ''} are not known here"
        )
    elif sizes.blocks is not None:
        required, biases = names
        problems += _check_names(file, sizes.blocks, required)
        problems += _find_strangers(file, required | biases)
    problems += _check_shapes(file, sizes)
    return GgufCheck(tuple(problems), tuple(notes))


def find_gguf_support(file: GgufFile) -> RuntimeSupport:
    """Say whether llama.cpp has code for the architecture and the types of a file."""
    architecture = file.find_text("general.architecture")
    known = architecture in KNOWN_ARCHITECTURES
    answers = [
        Answer(
            "yes" if known else "no",
            "" if known else "no such architecture",
            "src/llama-arch.cpp",
            f"architecture {architecture if known else repr(architecture)}",
        )
    ]
    kinds = sorted({tensor.kind.name for tensor in file.tensors.values()})
    answers += [Answer("yes", "", "ggml/src/ggml.c", kind) for kind in kinds]
    return RuntimeSupport("llama.cpp", "yes" if known else "no", tuple(answers))


def _read_sizes(file: GgufFile, architecture: str) -> _Sizes:
    def number(key: str, otherwise: int | None = None) -> int | None:
        full = f"{architecture}.{key}"
        value = file.find(full)
        if full in file.metadata:
            return value if type(value) is int and value > 0 else None
        return otherwise

    hidden, heads = number("embedding_length"), number("attention.head_count")
    head = hidden // heads if hidden and heads else None
    tokens = file.find_array("tokenizer.ggml.tokens")
    return _Sizes(
        blocks=number("block_count"),
        hidden=hidden,
        feed_forward=number("feed_forward_length"),
        heads=heads,
        key_value_heads=number("attention.head_count_kv", heads),
        key=number("attention.key_length", head),
        value=number("attention.value_length", head),
        tokens=None if tokens is None else len(tokens),
    )


def _check_blocks(file: GgufFile, blocks: int) -> Iterator[str]:
    """Compare the numbers in the names with the number of blocks."""
    found = {int(match[1]) for match in map(_BLOCK.fullmatch, file.tensors) if match}
    if blocks > len(file.tensors):
        yield f"{blocks} blocks are claimed, but there are {len(file.tensors)} tensors"
        return
    for what, numbers in (
        ("have no tensor", sorted(set(range(blocks)) - found)),
        (f"have tensors, but there are {blocks} blocks", sorted(found - set(range(blocks)))),
    ):
        if numbers:
            shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            yield f"blocks {shown} {what}"


def _check_names(file: GgufFile, blocks: int, required: frozenset[str]) -> Iterator[str]:
    """Find tensors without which llama.cpp does not load the model."""
    missing = (name for name in _require(file, blocks, required) if name not in file.tensors)
    shown = list(islice(missing, 4))
    count = len(shown) + sum(1 for _ in missing)
    if count:
        yield f"{count} tensors are missing: {_shorten(shown)}"


def _require(file: GgufFile, blocks: int, required: frozenset[str]) -> Iterator[str]:
    # llama.cpp takes queries, keys and values in one matrix or in three, whatever is usual.
    one, three = sorted((required - _QKV) | {_FUSED}), sorted((required - {_FUSED}) | _QKV)
    yield from _ALWAYS
    for block in range(min(blocks, len(file.tensors))):
        for name in one if f"blk.{block}.{_FUSED}" in file.tensors else three:
            yield f"blk.{block}.{name}"


def _find_strangers(file: GgufFile, own: frozenset[str]) -> Iterator[str]:
    """Find tensors that llama.cpp does not use, for which it refuses the model."""
    known = own | _QKV | _BIASES | {_FUSED}
    strangers = []
    for name in file.tensors:
        match = _BLOCK.fullmatch(name)
        if not (match[2] in known if match else name in _SOMETIMES or name in _ALWAYS):
            strangers.append(name)
    strangers = [name for name in strangers if not name.endswith(_SCALES)]
    if strangers:
        yield (
            f"{len(strangers)} tensors do not belong to the architecture, for which llama.cpp "
            f"refuses the model: {_shorten(strangers)}"
        )


def _check_shapes(file: GgufFile, sizes: _Sizes) -> Iterator[str]:
    """Compare shapes with the metadata, for the names that every architecture uses alike."""
    expected = _expect_shapes(sizes)
    for name, tensor in file.tensors.items():
        match = _BLOCK.fullmatch(name)
        shape = expected.get(match[2] if match else name)
        if shape is None or len(shape) != len(tensor.shape):
            continue
        if any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)):
            words = ", ".join("?" if size is None else str(size) for size in shape)
            yield f"tensor {name} has the shape {list(tensor.shape)}, the metadata say [{words}]"


def _expect_shapes(sizes: _Sizes) -> Mapping[str, tuple[int | None, ...]]:
    hidden, forward = sizes.hidden, sizes.feed_forward
    queries = _multiply(sizes.heads, sizes.key)
    return {
        "token_embd.weight": (sizes.tokens, hidden),
        "output.weight": (sizes.tokens, hidden),
        "output_norm.weight": (hidden,),
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (_multiply(sizes.key_value_heads, sizes.key), hidden),
        "attn_v.weight": (_multiply(sizes.key_value_heads, sizes.value), hidden),
        "attn_output.weight": (hidden, _multiply(sizes.heads, sizes.value)),
        "ffn_gate.weight": (forward, hidden),
        "ffn_down.weight": (hidden, forward),
    }


def _multiply(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
