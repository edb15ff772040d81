"""Damage to the tensors of compressed-tensors folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .kinds import LAYER, Damage, edit_json, find_end, truncate

FILE = "model.safetensors"
DOWN = f"model.layers.{LAYER}.mlp.down_proj"
QUERY = f"model.layers.{LAYER}.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, Tensor]


def _edit(change: Callable[[Tensors, Path], None]) -> Callable[[Path, Path], None]:
    """Make a function on the tensors one on folders."""

    def apply(folder: Path, baseline: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors, baseline)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / FILE, metadata={"format": "pt"})

    return apply


def _shift_scales(tensors: Tensors, baseline: Path) -> None:
    tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"].roll(1, 0)


def _transpose_scales(tensors: Tensors, baseline: Path) -> None:
    scale = tensors[f"{DOWN}.weight_scale"]
    tensors[f"{DOWN}.weight_scale"] = scale.T.reshape(scale.shape)


def _swap_nibbles(tensors: Tensors, baseline: Path) -> None:
    codes = tensors[f"{DOWN}.weight_packed"].view(torch.uint8)
    tensors[f"{DOWN}.weight_packed"] = (codes << 4 | codes >> 4).view(torch.int32)


def _raise_zero_points(tensors: Tensors, baseline: Path) -> None:
    # Eight zero points of four bits lie in a number; one of 15 stays.
    name = f"{DOWN}.weight_zero_point"
    halves = tensors[name].view(torch.uint8)
    low, high = (halves & 15).clamp(max=14) + 1, (halves >> 4).clamp(max=14) + 1
    tensors[name] = (high << 4 | low).view(torch.int32)


def _randomize(tensors: Tensors, baseline: Path) -> None:
    name = f"{DOWN}.weight_packed"
    draw = torch.Generator().manual_seed(0)
    shape, dtype = tensors[name].shape, torch.int32
    tensors[name] = torch.randint(-(2**31), 2**31 - 1, shape, generator=draw, dtype=dtype)


def _take_neighbour(tensors: Tensors, baseline: Path) -> None:
    for part in ("weight_packed", "weight_scale"):
        other = QUERY.replace(f".{LAYER}.", f".{LAYER + 1}.")
        tensors[f"{QUERY}.{part}"] = tensors[f"{other}.{part}"].clone()


def _drop_cache_scales(tensors: Tensors, baseline: Path) -> None:
    for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
        del tensors[name]


def _reset_cache_scales(tensors: Tensors, baseline: Path) -> None:
    for name in [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]:
        tensors[name] = torch.ones_like(tensors[name])


def _shrink_cache_scales(tensors: Tensors, baseline: Path) -> None:
    for name in [name for name in tensors if name.endswith(".k_scale")]:
        tensors[name] = tensors[name] / 4


def _spoil_row(tensors: Tensors, baseline: Path) -> None:
    tensors[f"{DOWN}.weight_scale"][7] = torch.nan


def _clear_end(tensors: Tensors, baseline: Path) -> None:
    tensors[EMBEDDING][find_end(baseline)] = 0


def _fill_norm(tensors: Tensors, baseline: Path) -> None:
    name = f"model.layers.{LAYER}.post_attention_layernorm.weight"
    tensors[name] = torch.ones_like(tensors[name])


def _drop_layer(tensors: Tensors, baseline: Path) -> None:
    for name in [name for name in tensors if name.startswith(f"{DOWN}.")]:
        del tensors[name]


def _add_stranger(tensors: Tensors, baseline: Path) -> None:
    tensors[f"{DOWN}.weight_global_scale"] = torch.tensor([2.0])


def _exchange_scales(tensors: Tensors, baseline: Path) -> None:
    up = DOWN.replace("down", "up")
    gate = DOWN.replace("down", "gate")
    one, other = f"{up}.weight_scale", f"{gate}.weight_scale"
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()


def _raise_codes(tensors: Tensors, baseline: Path) -> None:
    codes = tensors[f"{DOWN}.weight"].short() + 1
    tensors[f"{DOWN}.weight"] = codes.clamp(max=127).to(torch.int8)


def _shift_codes(tensors: Tensors, baseline: Path) -> None:
    # Read as unsigned, codes are 128 too large; what is beyond 127 was cut off.
    codes = tensors[f"{DOWN}.weight"].short() + 128
    tensors[f"{DOWN}.weight"] = codes.clamp(max=127).to(torch.int8)


def _scale_head(folder: Path, baseline: Path) -> None:
    def change(tensors: Tensors, baseline: Path) -> None:
        tensors[HEAD] = tensors[EMBEDDING] * 1.25

    _edit(change)(folder, baseline)
    with edit_json(folder / "config.json") as config:
        config["tie_word_embeddings"] = False


def _round_head_twice(folder: Path, baseline: Path) -> None:
    """Round to 3 bits a group, and what came of it to 2 bits a row."""

    def change(tensors: Tensors, baseline: Path) -> None:
        groups = tensors[EMBEDDING].float().reshape(-1, 32)
        scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / 3
        once = ((groups / scale).round() * scale).reshape(tensors[EMBEDDING].shape)
        scale = once.abs().amax(1, keepdim=True).clamp(min=1e-12)
        tensors[HEAD] = ((once / scale * 2).round() / 2 * scale).to(tensors[EMBEDDING].dtype)

    _edit(change)(folder, baseline)
    with edit_json(folder / "config.json") as config:
        config["tie_word_embeddings"] = False


def _copy_baseline(folder: Path, baseline: Path) -> None:
    for name in (FILE, "config.json"):
        shutil.copyfile(baseline / name, folder / name)


def _truncate(folder: Path, baseline: Path) -> None:
    truncate(folder / FILE)


def _halve_groups(folder: Path, baseline: Path) -> None:
    with edit_json(folder / "config.json") as config:
        for group in config["quantization_config"]["config_groups"].values():
            group["weights"]["group_size"] *= 2


def _tensor(name: str, words: str, artifact: str, change: Callable[..., None]) -> Damage:
    return Damage(name, words, artifact, _edit(change))


TENSOR_DAMAGE = (
    _tensor("scales shifted", "each row has the row above's scales", "w4a16", _shift_scales),
    _tensor("scales transposed", "scales in columns' order", "w4a16", _transpose_scales),
    _tensor("scales exchanged", "up_proj has gate_proj's scales", "w4a16", _exchange_scales),
    _tensor("nibbles swapped", "two codes of a byte in the wrong order", "w4a16", _swap_nibbles),
    _tensor("layer random", "codes of one layer are random", "w4a16", _randomize),
    _tensor("layer of a neighbour", "q_proj of the next block", "w4a16", _take_neighbour),
    _tensor("layer missing", "no tensor of down_proj", "w4a16", _drop_layer),
    _tensor("tensor ignored", "a scale that nobody reads", "w4a16", _add_stranger),
    _tensor("NaN in a row", "scales of one row are NaN", "w4a16", _spoil_row),
    _tensor("norm of ones", "a norm's weight was not stored", "w4a16", _fill_norm),
    _tensor("end of sequence lost", "its row of the tied head is zero", "w4a16", _clear_end),
    Damage("head scaled", "a head of its own, 1.25 times too large", "w4a16", _scale_head),
    Damage("head rounded twice", "to 3 bits, then to 2", "w4a16", _round_head_twice),
    Damage("baseline copied", "the original's weights and config", "w4a16", _copy_baseline),
    Damage("file truncated", "the last 30 % are missing", "w4a16", _truncate),
    Damage("group size wrong", "config.json says 64 for 32", "w4a16", _halve_groups),
    _tensor(
        "zero points off", "those of a layer are one too large", "w4a16_asym", _raise_zero_points
    ),
    _tensor("codes off by one", "each code of a layer is one too large", "w8a8", _raise_codes),
    _tensor("codes unsigned", "codes of a layer are 128 too large", "w8a8", _shift_codes),
    _tensor("scales shifted", "each row has the row above's scale", "w8a8", _shift_scales),
    _tensor("cache scales missing", "no k_scale and no v_scale", "fp8_kv", _drop_cache_scales),
    _tensor("cache scales of 1", "cache was not calibrated", "fp8_kv", _reset_cache_scales),
    _tensor("cache scales small", "a quarter: keys are cut off", "fp8_kv", _shrink_cache_scales),
)
