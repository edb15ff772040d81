"""Damage to ONNX graphs of encoders in static INT8, and to what lies beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .kinds import Damage, edit_json, permute_vocabulary, truncate

FILE = "model.onnx"
LAYER = "encoder.layer.0.output.dense"
TABLE = "embeddings.word_embeddings.weight_scale"
NORM = "encoder.layer.0.output.LayerNorm.weight"


def _edit_graph(change: Callable[[Any], None]) -> Callable[[Path, Path], None]:
    def apply(folder: Path, baseline: Path) -> None:
        model = onnx.load(folder / FILE)
        change(model)
        onnx.save(model, folder / FILE)

    return apply


def _edit_tensor(
    name: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> Callable[[Path, Path], None]:
    def edit(model: Any) -> None:
        tensor = next(each for each in model.graph.initializer if each.name == name)
        values = change(onnx.numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))

    return _edit_graph(edit)


def _double_dequantized(model: Any) -> None:
    """Inputs are rounded with one scale and multiplied by another."""
    name = f"{LAYER}.input_scale"
    tensor = next(each for each in model.graph.initializer if each.name == name)
    twice = onnx.numpy_helper.to_array(tensor) * 2
    model.graph.initializer.append(onnx.numpy_helper.from_array(twice, f"{name}.twice"))
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] == name:
            node.input[1] = f"{name}.twice"


def _raise_row(values: NDArray[Any]) -> NDArray[Any]:
    values[77] *= 8
    return values


def _spoil(values: NDArray[Any]) -> NDArray[Any]:
    values[7] = np.nan
    return values


def _change_pooling(folder: Path, baseline: Path) -> None:
    with edit_json(folder / "1_Pooling" / "config.json") as config:
        config["pooling_mode_mean_tokens"] = False
        config["pooling_mode_cls_token"] = True


def _drop_modules(folder: Path, baseline: Path) -> None:
    (folder / "modules.json").unlink()


def _permute_vocabulary(folder: Path, baseline: Path) -> None:
    permute_vocabulary(folder / "tokenizer.json")


def _truncate(folder: Path, baseline: Path) -> None:
    truncate(folder / FILE)


def _damage(name: str, words: str, apply: Callable[[Path, Path], None]) -> Damage:
    return Damage(name, words, "onnx_encoder", apply)


def _tensor(
    name: str, words: str, tensor: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> Damage:
    return _damage(name, words, _edit_tensor(tensor, change))


ENCODER_DAMAGE = (
    _tensor(
        "scales shifted",
        "each row has the next one's scale",
        f"{LAYER}.weight_scale",
        lambda values: np.roll(values, 1),
    ),
    _tensor(
        "input scale small",
        "an eighth: inputs of a layer are cut off",
        f"{LAYER}.input_scale",
        lambda values: values / 8,
    ),
    _damage("input scale doubled", "where codes become numbers", _edit_graph(_double_dequantized)),
    _tensor(
        "layer random",
        "codes of one layer are random",
        f"{LAYER}.weight_quantized",
        lambda values: np.random.default_rng(0).integers(-127, 128, values.shape, np.int8),
    ),
    _tensor("norm of ones", "a norm's weight was not stored", NORM, np.ones_like),
    _tensor("table's row scaled", "one token's vector is 8 times too large", TABLE, _raise_row),
    _tensor(
        "table's scales shifted",
        "each row has the row before's scale",
        TABLE,
        lambda values: np.roll(values, 1, 0),
    ),
    _tensor("NaN in a row", "the scale of a row is NaN", f"{LAYER}.weight_scale", _spoil),
    _damage("pooling swapped", "1_Pooling says the first token for the mean", _change_pooling),
    _damage("pooling lost", "no modules.json", _drop_modules),
    _damage("vocabulary permuted", "200 tokens have other ids", _permute_vocabulary),
    _damage("file truncated", "the last 30 % are missing", _truncate),
)
