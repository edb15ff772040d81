"""Damage to ONNX graphs of decoders: to the graph, its data file, or what lies beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .kinds import (
    LAYER,
    Damage,
    edit_json,
    find_end,
    permute_vocabulary,
    reverse_merges,
    swap_nibbles,
    truncate,
)
from .sides import SIDE_DAMAGE

FILE, DATA = "model.onnx", "model.onnx.data"
DOWN = f"model.layers.{LAYER}.mlp.down_proj"
Floats = NDArray[np.float32]


def _edit_data(
    name: str, dtype: str, change: Callable[[NDArray[Any], Path], NDArray[Any]]
) -> Callable[[Path, Path], None]:
    """Make a function on one tensor of the data file one on folders."""

    def apply(folder: Path, baseline: Path) -> None:
        place = _find_tensor(onnx.load(folder / FILE, load_external_data=False), name)
        with (folder / DATA).open("r+b") as stream:
            stream.seek(int(place["offset"]))
            flat = np.frombuffer(stream.read(int(place["length"])), np.dtype(dtype))
            values = change(flat.reshape(place["shape"]).copy(), baseline)
            stream.seek(int(place["offset"]))
            stream.write(values.astype(dtype).tobytes())

    return apply


def _find_tensor(model: Any, name: str) -> dict[str, Any]:
    tensor = next(each for each in model.graph.initializer if each.name == name)
    found: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
    return found | {"shape": tuple(tensor.dims)}


def _edit_graph(change: Callable[[Any], None]) -> Callable[[Path, Path], None]:
    def apply(folder: Path, baseline: Path) -> None:
        model = onnx.load(folder / FILE, load_external_data=False)
        change(model)
        onnx.save(model, folder / FILE)

    return apply


def _set_attribute(
    operator: str, name: str, value: float, only: str = ""
) -> Callable[[Path, Path], None]:
    def change(model: Any) -> None:
        for node in model.graph.node:
            if node.op_type == operator and any(only in each for each in node.input):
                kept = [each for each in node.attribute if each.name != name]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return _edit_graph(change)


def _transpose_scales(values: Floats, baseline: Path) -> Floats:
    return values.reshape(256, -1).T.reshape(-1)


def _shift_scales(values: Floats, baseline: Path) -> Floats:
    return np.roll(values.reshape(256, -1), 1, axis=0).reshape(-1)


def _swap(values: NDArray[np.uint8], baseline: Path) -> NDArray[np.uint8]:
    return swap_nibbles(values)


def _randomize(values: NDArray[np.uint8], baseline: Path) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, values.shape, np.uint8)


def _spoil_row(values: Floats, baseline: Path) -> Floats:
    values.reshape(256, -1)[7] = np.nan
    return values


def _clear_end(values: NDArray[np.uint16], baseline: Path) -> NDArray[np.uint16]:
    values[find_end(baseline)] = 0
    return values


def _fill_norm(values: Floats, baseline: Path) -> Floats:
    return np.ones_like(values)


def _change_theta(values: Floats, baseline: Path) -> Floats:
    positions, half = values.shape
    rates = 500_000.0 ** (-np.arange(half) / half)
    return np.cos(np.outer(np.arange(positions), rates)).astype(np.float32)


def _add_zero_points(model: Any) -> None:
    """Codes are taken to be around 7, and not around 8 as without zero points."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and node.input[1] == f"{DOWN}.codes":
            name, (rows, blocks, _) = f"{DOWN}.zeros", (256, 24, 16)
            zeros = np.full(rows * blocks // 2, 0x77, np.uint8)
            model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, name))
            node.input.append(name)


def _exchange_codes(model: Any) -> None:
    """Codes, scales and all: o_proj of one block in another."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and f".{LAYER}.attn.o_proj" in node.input[1]:
            for index in (1, 2):
                node.input[index] = node.input[index].replace(f".{LAYER}.", f".{LAYER + 1}.")


def _exchange_gate_and_up(model: Any) -> None:
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and f".{LAYER}.mlp." in node.input[1]:
            for index in (1, 2):
                for one, other in (("gate", "up"), ("up", "gate")):
                    if f".{one}_proj" in node.input[index]:
                        node.input[index] = node.input[index].replace(one, other)
                        break


def _shift_data(folder: Path, baseline: Path) -> None:
    """The data begin 64 bytes later than the graph says."""
    data = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(bytes(64) + data)


def _shift_place(model: Any) -> None:
    """The graph looks for one tensor 64 bytes later than it lies."""
    tensor = next(each for each in model.graph.initializer if each.name == f"{DOWN}.codes")
    for entry in tensor.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) + 64)


def _truncate(folder: Path, baseline: Path) -> None:
    truncate(folder / DATA)


def _change_end(folder: Path, baseline: Path) -> None:
    with edit_json(folder / "genai_config.json") as config:
        config["model"]["eos_token_id"] = 77


def _reverse_merges(folder: Path, baseline: Path) -> None:
    reverse_merges(folder / "tokenizer.json")


def _permute_vocabulary(folder: Path, baseline: Path) -> None:
    permute_vocabulary(folder / "tokenizer.json")


def _find_side(name: str) -> Callable[[Path, Path], None]:
    return next(each.apply for each in SIDE_DAMAGE if each.name == name)


def _damage(name: str, words: str, apply: Callable[[Path, Path], None]) -> Damage:
    return Damage(name, words, "onnx_int4", apply)


_NORM = f"model.layers.{LAYER}.post_attention_layernorm.weight"
_SCALES, _CODES, _EMBEDDING = f"{DOWN}.scales", f"{DOWN}.codes", "model.embed_tokens.weight.stored"

GRAPH_DAMAGE = (
    _damage(
        "scales transposed",
        "scales in columns' order",
        _edit_data(_SCALES, "<f4", _transpose_scales),
    ),
    _damage(
        "scales shifted",
        "each row has the row above's scales",
        _edit_data(_SCALES, "<f4", _shift_scales),
    ),
    _damage(
        "nibbles swapped", "two codes of a byte in the wrong order", _edit_data(_CODES, "u1", _swap)
    ),
    _damage("layer random", "codes of one layer are random", _edit_data(_CODES, "u1", _randomize)),
    _damage("NaN in a row", "scales of one row are NaN", _edit_data(_SCALES, "<f4", _spoil_row)),
    _damage("zero points of 7", "in place of the default of 8", _edit_graph(_add_zero_points)),
    _damage("layer of a neighbour", "o_proj of the next block", _edit_graph(_exchange_codes)),
    _damage(
        "gate and up exchanged", "the wrong one is activated", _edit_graph(_exchange_gate_and_up)
    ),
    _damage("data shifted", "all begin 64 bytes later than said", _shift_data),
    _damage("tensor shifted", "one is read 64 bytes too late", _edit_graph(_shift_place)),
    _damage("block_size wrong", "64 for 32", _set_attribute("MatMulNBits", "block_size", 64, DOWN)),
    _damage("attention scale", "1 for 1/8", _set_attribute("GroupQueryAttention", "scale", 1.0)),
    _damage(
        "rotary interleaved",
        "pairs of neighbours are turned",
        _set_attribute("GroupQueryAttention", "rotary_interleaved", 1),
    ),
    _damage("rope theta", "cos_cache of 500,000", _edit_data("cos_cache", "<f4", _change_theta)),
    _damage("norm of ones", "a norm's weight was not stored", _edit_data(_NORM, "<f4", _fill_norm)),
    _damage(
        "end of sequence lost",
        "its row of the tied head is zero",
        _edit_data(_EMBEDDING, "<u2", _clear_end),
    ),
    _damage("file truncated", "the last 30 % of the data are missing", _truncate),
    _damage("another end of sequence", "eos_token_id of genai_config.json", _change_end),
    _damage("merges reversed", "tokenizer.json has other ranks", _reverse_merges),
    _damage("vocabulary permuted", "200 tokens have other ids", _permute_vocabulary),
    _damage("chat template lost", "no chat_template.jinja", _find_side("chat template lost")),
)
