"""Whole pico models solved group by group, for the tests of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.blocks import Draft, finish_block, replay_input_group, solve_input_group
from quantkit.numerics.affine import dequantize_layer
from quantkit.records import LayerRecord, LayerStats, SolvedBlock
from tests.calibration.test_walk import make_recipe, make_windows, open_model, start_walk


@dataclass(frozen=True)
class Solved:
    """All blocks of a model; the tensors that the walk went on with; the statistics by layer."""

    blocks: list[SolvedBlock]
    live: dict[str, Tensor]
    stats: dict[str, LayerStats]

    @property
    def records(self) -> dict[str, LayerRecord]:
        """The record of every layer."""
        return {record.name: record for block in self.blocks for record in block.records}

    @property
    def folds(self) -> list[str]:
        """The first layer of every group whose input was scaled."""
        names = [name for block in self.blocks for name in block.replay]
        return [name.removeprefix("fold:") for name in names if name.startswith("fold:")]


def solve_all(folder: Path, **quantize: object) -> Solved:
    """Solve every block, and see to it that a replay gives the walk what it had."""
    checkpoint, plan = open_model(folder, make_recipe(**quantize))
    solved = Solved([], {}, {})
    for stop in start_walk(checkpoint, plan, make_windows()):
        groups = [group for group in stop.block.groups if group.quantized]
        if stop.group is groups[0]:
            draft, here = Draft(), {}
        for linear in stop.group.linears:
            solved.stats[linear.name] = stop.stats
        live = solve_input_group(stop.group, stop.stats, stop.tensors, draft, torch.bfloat16)
        for name, tensor in live.items():
            stop.replace(name, tensor)
        here |= live
        if stop.group is groups[-1]:
            block = finish_block(stop.block, draft)
            replayed: dict[str, Tensor] = {}
            for group in groups:
                replayed |= replay_input_group(group, block)
            assert replayed.keys() == here.keys()
            for name, tensor in replayed.items():
                assert torch.equal(tensor, here[name]), name
            solved.live.update(here)
            solved.blocks.append(block)
    return solved


def load_float(folder: Path) -> torch.nn.Module:
    """The model of a folder in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def logits(model: torch.nn.Module) -> Tensor:
    """Of the calibration windows."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(make_windows().ids)).logits


def load_walked(folder: Path, solved: Solved) -> torch.nn.Module:
    """The model as the walk left it."""
    model = load_float(folder)
    for name, tensor in solved.live.items():
        model.get_parameter(name).data = tensor.clone()
    return model


def load_artifact(folder: Path, solved: Solved) -> torch.nn.Module:
    """The model that the artifact describes, in float32."""
    model = load_float(folder)
    for block in solved.blocks:
        for layer in block.layers:
            model.get_submodule(layer.name).weight.data = dequantize_layer(layer)
        for name, tensor in block.dense.items():
            model.get_parameter(name).data = tensor.float()
    return model


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| relative to how much `expected` varies."""
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def add_outliers(folder: Path) -> Path:
    """Multiply channels of norms, up_proj and v_proj, and divide what reads them: no change.

    Factors are powers of two, so the bfloat16 checkpoint computes what it computed before.
    """
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone()
    blocks = {name.split(".mlp.")[0] for name in tensors if ".mlp." in name}
    for block in blocks:
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"{block}.{norm}.weight"][[3, 17]] *= 64
            for reader in readers:
                tensors[f"{block}.{reader}.weight"][:, [3, 17]] /= 64
        tensors[f"{block}.mlp.up_proj.weight"][5] *= 64
        tensors[f"{block}.mlp.down_proj.weight"][:, 5] /= 64
        value, out = (f"{block}.self_attn.{leaf}.weight" for leaf in ("v_proj", "o_proj"))
        rows, columns = len(tensors[value]), tensors[out].shape[1]
        head_dim, repeat = rows // 2, columns // rows
        tensors[value][7] *= 64
        by_head = tensors[out].reshape(-1, 2, repeat, head_dim)
        by_head[:, 0, :, 7] /= 64
        tensors[out] = by_head.reshape(-1, columns)
        bias = f"{block}.self_attn.v_proj.bias"
        if bias in tensors:
            tensors[bias][7] *= 64
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
