"""Checkpoints as other tools write them, packed number by number from the formats' definitions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.cases import stored_tensors

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each place in a word, lowest bits first."""


@dataclass(frozen=True)
class Codes:
    """One layer as numbers: unsigned codes [O, I] and zero points [O, G], scales [O, G]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: tuple[int, ...]
    """The group of each column."""

    @property
    def weight(self) -> Tensor:
        """scale * (code - zero), one number at a time, float32 [O, I]."""
        numbers = zip(self.codes.tolist(), self.zeros.tolist(), self.scales.tolist(), strict=True)
        weight = [
            [
                scales[group] * (code - zeros[group])
                for code, group in zip(codes, self.groups, strict=True)
            ]
            for codes, zeros, scales in numbers
        ]
        return torch.tensor(weight, dtype=torch.float32)


def draw_codes(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Codes:
    """Draw a layer; zero points go from 1 to the largest that GPTQ's first layout can store."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(1, (1 << bits) - 1, (rows, count), generator=generator)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    scales = torch.rand(rows, count, generator=generator) / columns**0.5 / (1 << (bits - 2)) + 1e-3
    order = [column // group_size for column in range(columns)] if groups is None else groups
    return Codes(codes, zeros, scales.to(dtype), tuple(order))


def pack_words(values: Sequence[int], bits: int) -> list[int]:
    """Pack unsigned values into 32-bit words, the first in the lowest bits; as signed numbers."""
    words = [0] * (len(values) * bits // 32)
    for place, value in enumerate(values):
        shift = place * bits
        words[shift // 32] |= int(value) << (shift % 32)
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def pack_gptq(
    layer: Codes, bits: int, *, version: int = 1, g_idx: bool = True
) -> dict[str, Tensor]:
    """GPTQ's tensors; the first version stores each zero point less one."""
    rows = [pack_words(row.tolist(), bits) for row in layer.codes]
    stored = layer.zeros - 1 if version == 1 else layer.zeros
    zeros = [pack_words(column.tolist(), bits) for column in stored.T]
    parts = {
        "qweight": torch.tensor(rows, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor(zeros, dtype=torch.int32),
        "scales": layer.scales.T.contiguous(),
    }
    if g_idx:
        parts["g_idx"] = torch.tensor(layer.groups, dtype=torch.int32)
    return parts


def pack_awq(layer: Codes) -> dict[str, Tensor]:
    """AWQ's tensors in the gemm layout."""
    return {
        "qweight": _pack_awq_rows(layer.codes.T),
        "qzeros": _pack_awq_rows(layer.zeros.T),
        "scales": layer.scales.T.contiguous(),
    }


def _pack_awq_rows(values: Tensor) -> Tensor:
    """Pack [N, O] along O, the columns of a word in AWQ's order."""
    packed = []
    for row in values.tolist():
        places = [row[start + column] for start in range(0, len(row), 8) for column in AWQ_ORDER]
        packed.append(pack_words(places, 4))
    return torch.tensor(packed, dtype=torch.int32)


def gptq_config(**changes: Any) -> dict[str, Any]:
    """A quantization_config as AutoGPTQ and GPTQModel write it."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq",
    } | changes


def awq_config(**changes: Any) -> dict[str, Any]:
    """A quantization_config as AutoAWQ writes it."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    } | changes


def fp8_config(**changes: Any) -> dict[str, Any]:
    """A quantization_config as DeepSeek and Qwen publish it."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    } | changes


@dataclass
class Foreign:
    """A pico model whose blocks' linear layers are stored as another tool stores them."""

    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> the float32 weight that its tensors stand for."""
    codes: dict[str, Codes] = field(default_factory=dict)

    def edit_tensors(self, changes: dict[str, Tensor | None]) -> None:
        """Replace or, with None, remove tensors; the model must lie in one file."""
        path = self.folder / "model.safetensors"
        tensors: dict[str, Any] = {**load_file(path), **changes}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})

    def edit_config(self, **changes: Any) -> None:
        """Change keys of the quantization_config."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))


def linear_names(tensors: dict[str, Tensor]) -> list[str]:
    """The linear layers of the blocks of a Llama-like model."""
    return sorted(name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight"))


def write_foreign(
    model: Path, folder: Path, parts: dict[str, dict[str, Tensor]], config: dict[str, Any]
) -> None:
    """Copy the pico model in `model` with `parts` in place of the weights of layers."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = stored_tensors(model)
    for name, stored in parts.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    document = json.loads(path.read_text()) | {"quantization_config": config}
    path.write_text(json.dumps(document))


def make_gptq(
    model: Path, folder: Path, *, version: int = 1, g_idx: bool = True, **changes: Any
) -> Foreign:
    """Store the layers of the pico model in `model` as GPTQ, with drawn codes.

    `changes` go into the config; those of bits, group_size, sym and desc_act into the tensors too.
    """
    config = gptq_config(**changes)
    made = Foreign(folder)
    parts = {}
    tensors = stored_tensors(model)
    for seed, name in enumerate(linear_names(tensors)):
        rows, columns = tensors[f"{name}.weight"].shape
        size = columns if config["group_size"] == -1 else config["group_size"]
        groups = _shuffled(columns, size, seed) if config["desc_act"] else None
        drawn = draw_codes(
            rows,
            columns,
            bits=config["bits"],
            group_size=size,
            symmetric=config["sym"],
            groups=groups,
            seed=seed,
        )
        made.codes[name], made.weights[name] = drawn, drawn.weight
        parts[name] = pack_gptq(drawn, config["bits"], version=version, g_idx=g_idx)
    write_foreign(model, folder, parts, config)
    return made


def _shuffled(columns: int, group_size: int, seed: int) -> list[int]:
    """The group of each column of an act-order layer."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    groups = torch.empty(columns, dtype=torch.int64)
    groups[order] = torch.arange(columns) // group_size
    return groups.tolist()


def make_awq(model: Path, folder: Path, **changes: Any) -> Foreign:
    """Store the layers of the pico model in `model` as AWQ, with drawn codes."""
    config = awq_config(**changes)
    made = Foreign(folder)
    parts = {}
    tensors = stored_tensors(model)
    for seed, name in enumerate(linear_names(tensors)):
        rows, columns = tensors[f"{name}.weight"].shape
        size = columns if config["group_size"] == -1 else config["group_size"]
        symmetric = not config["zero_point"]
        drawn = draw_codes(rows, columns, group_size=size, symmetric=symmetric, seed=seed)
        made.codes[name], made.weights[name] = drawn, drawn.weight
        parts[name] = pack_awq(drawn)
    write_foreign(model, folder, parts, config)
    return made


def make_fp8(model: Path, folder: Path, **changes: Any) -> Foreign:
    """Store the layers of the pico model in `model` in FP8 with scales of blocks."""
    config = fp8_config(**changes)
    made = Foreign(folder)
    parts = {}
    tensors = stored_tensors(model)
    for name in linear_names(tensors):
        weight = tensors[f"{name}.weight"].float()
        codes, scale, value = round_blocks(weight, config["weight_block_size"])
        made.weights[name] = value
        parts[name] = {"weight": codes, "weight_scale_inv": scale}
    write_foreign(model, folder, parts, config)
    return made


def round_blocks(weight: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight block by block: codes, scales, and the weight that they stand for."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    value = torch.empty(rows, columns)
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for y, top in enumerate(range(0, rows, block[0])):
        for x, left in enumerate(range(0, columns, block[1])):
            place = (slice(top, top + block[0]), slice(left, left + block[1]))
            scale[y, x] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scale[y, x]).to(torch.float8_e4m3fn)
            value[place] = codes[place].float() * scale[y, x]
    return codes, scale, value
