"""Damage to GGUF files in Q4_K_M: their bytes in place, or their metadata written anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.formats.gguf.container import GgufFile, open_gguf, read_tensor_rows
from quantkit.formats.gguf.header import Array, GgufSpec, MetadataValue, Value
from quantkit.formats.gguf.writing import write_gguf

from .kinds import LAYER, Damage, find_end, order_permuted, swap_nibbles, truncate

IMATRIX = "imatrix.gguf"
Metadata = dict[str, MetadataValue]
Bytes = NDArray[np.uint8]

GATE = f"blk.{LAYER}.ffn_gate.weight"
SCALES, CODES = slice(4, 16), slice(16, 144)
"""Of a block of Q4_K: two float16, packed scales and minimums, codes."""


def _find(folder: Path) -> Path:
    return next(path for path in folder.glob("*.gguf") if path.name != IMATRIX)


def _edit_metadata(change: Callable[[Metadata], None]) -> Callable[[Path, Path], None]:
    def apply(folder: Path, baseline: Path) -> None:
        path = _find(folder)
        file = open_gguf(path)
        metadata = dict(file.metadata)
        change(metadata)
        specs = [GgufSpec(each.name, each.kind, each.shape) for each in file.tensors.values()]
        contents = [(name, read_tensor_rows(file, name)) for name in file.tensors]
        write_gguf(folder, "damaged", metadata, specs, contents, 1 << 60)
        os.replace(folder / "damaged.gguf", path)

    return apply


def _edit_rows(
    select: Callable[[str], bool], change: Callable[[Bytes, GgufFile, Path], Bytes]
) -> Callable[[Path, Path], None]:
    """Make a function on the bytes [R, row bytes] of some tensors one on folders."""

    def apply(folder: Path, baseline: Path) -> None:
        file = open_gguf(_find(folder))
        chosen = [tensor for tensor in file.tensors.values() if select(tensor.name)]
        if not chosen:
            raise ValueError(f"{file.path} has no such tensor")
        for tensor in chosen:
            rows = read_tensor_rows(file, tensor.name).numpy().reshape(tensor.rows, -1).copy()
            changed = change(rows, file, baseline)
            with tensor.file.open("r+b") as stream:
                stream.seek(tensor.start)
                stream.write(changed.tobytes())

    return apply


def _count_heads(file: GgufFile, key: str) -> int:
    return int(file.metadata[f"llama.attention.{key}"].content)  # type: ignore[arg-type]


def _undo_permutation(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    heads = _count_heads(file, "head_count")
    order = order_permuted(len(rows), heads if len(rows) == 256 else heads // 2)
    return rows[np.argsort(order)]


def _permute_values(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    return rows[order_permuted(len(rows), _count_heads(file, "head_count_kv"))]


def _swap_nibbles(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    blocks = rows.reshape(-1, 144)
    blocks[:, CODES] = swap_nibbles(blocks[:, CODES])
    return blocks


def _shift_scales(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    blocks = rows.reshape(-1, 144)
    blocks[:, SCALES] = np.roll(blocks[:, SCALES], 1, axis=0)
    return blocks


def _exchange_super_scales(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    blocks = rows.reshape(-1, 144)
    blocks[:, :4] = blocks[:, [2, 3, 0, 1]]
    return blocks


def _take_neighbour(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    other = GATE.replace(f".{LAYER}.", f".{LAYER + 1}.")
    return read_tensor_rows(file, other).numpy()


def _randomize(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    blocks = rows.reshape(-1, 144)
    blocks[:, CODES] = np.random.default_rng(0).integers(0, 256, (len(blocks), 128))
    return blocks


def _spoil_row(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    rows[7, :2] = np.array([np.nan], np.float16).view(np.uint8)
    return rows


def _clear_end(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    rows[find_end(baseline)] = 0
    return rows


def _fill_norm(rows: Bytes, file: GgufFile, baseline: Path) -> Bytes:
    return np.ones_like(rows.view(np.float32)).view(np.uint8)


def _truncate(folder: Path, baseline: Path) -> None:
    truncate(_find(folder))


def _set(key: str, value: MetadataValue) -> Callable[[Path, Path], None]:
    def change(metadata: Metadata) -> None:
        metadata[key] = value

    return _edit_metadata(change)


def _drop_template(metadata: Metadata) -> None:
    del metadata["tokenizer.chat_template"]


def _change_template(metadata: Metadata) -> None:
    key = "tokenizer.chat_template"
    text = str(metadata[key].content).partition("{% if add_generation_prompt")[0]
    metadata[key] = Value("string", text)


def _reverse_merges(metadata: Metadata) -> None:
    key = "tokenizer.ggml.merges"
    metadata[key] = Array("string", [str(pair) for pair in metadata[key].content][::-1])  # type: ignore[union-attr]


def _permute_vocabulary(metadata: Metadata) -> None:
    key = "tokenizer.ggml.tokens"
    tokens = [str(token) for token in metadata[key].content]  # type: ignore[union-attr]
    tokens[300:500] = [tokens[499], *tokens[300:499]]
    metadata[key] = Array("string", tokens)


def _narrow_heads(metadata: Metadata) -> None:
    for key, factor in (
        ("attention.head_count", 2),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 0.5),
        ("attention.value_length", 0.5),
        ("rope.dimension_count", 0.5),
    ):
        full = f"llama.{key}"
        if full in metadata:
            metadata[full] = Value("uint32", int(metadata[full].content * factor))  # type: ignore[operator]


def _is_query_or_key(name: str) -> bool:
    return name.endswith((".attn_q.weight", ".attn_k.weight"))


def _only(wanted: str) -> Callable[[str], bool]:
    return lambda name: name == wanted


def _damage(name: str, words: str, apply: Callable[[Path, Path], None]) -> Damage:
    return Damage(name, words, "gguf", apply)


_NORM = f"blk.{LAYER}.ffn_norm.weight"
_VALUES = f"blk.{LAYER}.attn_v.weight"

GGUF_DAMAGE = (
    _damage(
        "rows not permuted",
        "q and k as in the checkpoint",
        _edit_rows(_is_query_or_key, _undo_permutation),
    ),
    _damage(
        "rows permuted", "v in the order of q and k", _edit_rows(_only(_VALUES), _permute_values)
    ),
    _damage(
        "nibbles swapped",
        "two codes of a byte in the wrong order",
        _edit_rows(_only(GATE), _swap_nibbles),
    ),
    _damage(
        "scales shifted", "each block has the one's before", _edit_rows(_only(GATE), _shift_scales)
    ),
    _damage(
        "d and dmin exchanged",
        "in each block of a layer",
        _edit_rows(_only(GATE), _exchange_super_scales),
    ),
    _damage(
        "layer of a neighbour",
        "ffn_gate of the next block",
        _edit_rows(_only(GATE), _take_neighbour),
    ),
    _damage("layer random", "codes of one layer are random", _edit_rows(_only(GATE), _randomize)),
    _damage("NaN in a row", "the scale of a block is NaN", _edit_rows(_only(GATE), _spoil_row)),
    _damage("norm of ones", "a norm's weight was not stored", _edit_rows(_only(_NORM), _fill_norm)),
    _damage(
        "end of sequence lost",
        "its row of the tied head is zero",
        _edit_rows(_only("token_embd.weight"), _clear_end),
    ),
    _damage("file truncated", "the last 30 % are missing", _truncate),
    _damage(
        "BOS flag flipped",
        "add_bos_token is false",
        _set("tokenizer.ggml.add_bos_token", Value("bool", False)),
    ),
    _damage(
        "EOS flag flipped",
        "add_eos_token is true",
        _set("tokenizer.ggml.add_eos_token", Value("bool", True)),
    ),
    _damage(
        "another end of sequence",
        "eos_token_id names another token",
        _set("tokenizer.ggml.eos_token_id", Value("uint32", 77)),
    ),
    _damage(
        "another pre-tokenizer",
        "gpt-2 for llama-bpe",
        _set("tokenizer.ggml.pre", Value("string", "gpt-2")),
    ),
    _damage("merges reversed", "other ranks", _edit_metadata(_reverse_merges)),
    _damage(
        "vocabulary permuted", "200 tokens have other ids", _edit_metadata(_permute_vocabulary)
    ),
    _damage("chat template lost", "no tokenizer.chat_template", _edit_metadata(_drop_template)),
    _damage("chat template cut", "it opens no turn to answer in", _edit_metadata(_change_template)),
    _damage(
        "rope theta",
        "500,000 for 10,000",
        _set("llama.rope.freq_base", Value("float32", 500_000.0)),
    ),
    _damage(
        "norm epsilon",
        "1e-2 for 1e-6",
        _set("llama.attention.layer_norm_rms_epsilon", Value("float32", 1e-2)),
    ),
    _damage("config of another model", "heads of half the size", _edit_metadata(_narrow_heads)),
)
